"""One head: built tiny, trained for one optimizer step by each Trainer, against one batch in float64.

A step has 4 micro-batches of 4 rows with ragged targets. The truth is the gradient of the head's own loss for all 16
rows at once. Nothing is random and batch normalisation is in evaluation mode; a head that draws random numbers in every
forward draws the same ones for every row, here as in the truth.
"""

import contextlib
import math
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from benchmarks.heads.classes import TooLargeError, build
from benchmarks.heads.configs import NUM_CLASSES, tiny_config
from benchmarks.heads.inputs import MakeRow
from benchmarks.heads.results import WRONG, Measured, Outcome
from benchmarks.heads.rows import NoLossError, collate, find_rows
from benchmarks.trainings import SETTINGS, TRAINERS
from hf_gradutils._undisturbed import RowsDrawAlike
from hf_gradutils.errors import LossUnitError, TargetCountError
from tests.harness.gradients import cast, relative_error
from tests.harness.trainer_cases import GradientTap, reset_accelerate

ACCUMULATION, ROWS_PER_MICRO_BATCH = 4, 4
Gradients = dict[str, Tensor]


def measure(head_class: type[PreTrainedModel], seed: int) -> Measured:
    """Build a head, make data for it, and train it with each Trainer."""
    measured = Measured(head_class.__name__)
    stage = "config"
    try:
        config = _config_of(head_class)
        stage = "model"
        model = build(head_class, config)
        stage = "inputs"
        make_row, measured.inputs = find_rows(model)
        _measure(measured, model, make_row, seed)
    except Exception as error:
        measured.not_built, measured.why = _class_of(error) or stage, f"{type(error).__name__}: {error}"
    return measured


def _class_of(error: Exception) -> str:
    """Of a failure; empty where its stage says more."""
    if isinstance(error, ImportError) or str(error).startswith("ImportError"):
        return "missing package"
    classes = {TooLargeError: "too large", NoLossError: "no loss", MemoryError: "memory"}
    return classes.get(type(error), "")


def _config_of(head_class: Any) -> Any:
    name = head_class.__name__
    if re.search(r"(Sequence|Token|Image|Video|Audio|Frame)Classification|XVector|Segmentation|Detection", name):
        return tiny_config(head_class.config_class, num_labels=NUM_CLASSES)
    return tiny_config(head_class.config_class)


def _measure(measured: Measured, model: nn.Module, make_row: MakeRow, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = [make_row(generator) for _ in range(ACCUMULATION * ROWS_PER_MICRO_BATCH)]
    measured.draws = is_random(model, rows)
    with DrawsAlike() if measured.draws else contextlib.nullcontext():
        if measured.draws and is_random(model, rows):
            measured.why = "random in every forward"
        _compare(measured, model, rows)


def _compare(measured: Measured, model: nn.Module, rows: list[Any]) -> None:
    """Measure the truth, and each Trainer against it."""
    try:
        want = gradient_of_one_batch(model, rows, torch.float64)
    except Exception:
        measured.precision = "float32"
        want = gradient_of_one_batch(model, rows, torch.float32)
    finally:
        model.float()
    if not 0 < squared_norm(want) < math.inf:
        measured.precision = "float32"
        want = gradient_of_one_batch(model, rows, torch.float32)
    if not 0 < squared_norm(want) < math.inf:
        measured.not_built, measured.why = "no gradient", f"its squared norm is {squared_norm(want)}"
        return
    is_noisy = bool(measured.why)
    measured.outcomes = {name: train(trainer, model, rows, want) for name, trainer in TRAINERS.items()}
    ours = measured.outcomes["ours"]
    if ours.status == "wrong" and not is_noisy and measured.precision == "float64":
        # A gradient that float32 cannot resolve, or a matching that it decides otherwise: is float64 exact?
        measured.error_in_float32 = ours.error
        rows = [cast(row, torch.float64) for row in rows]
        model.double()
        measured.outcomes = {name: train(trainer, model, rows, want) for name, trainer in TRAINERS.items()}
        ours = measured.outcomes["ours"]
    if is_noisy and ours.status != "refused":
        measured.not_built = "random"


class DrawsAlike(RowsDrawAlike):
    """Gumbel noise, too, is the same for every row."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not nn.functional.gumbel_softmax:
            return super().__torch_function__(func, types, args, kwargs)
        with self:
            return gumbel_softmax(*args, **kwargs)


def gumbel_softmax(logits: Tensor, tau: float, hard: bool, **_: Any) -> Tensor:
    """As torch's over the last dim, which hides its draws; with hard choices."""
    assert hard
    soft = ((logits - (-torch.rand_like(logits).log()).log()) / tau).softmax(dim=-1)
    chosen = nn.functional.one_hot(soft.argmax(dim=-1), soft.shape[-1]).to(soft)
    return chosen - soft.detach() + soft


def is_random(model: nn.Module, rows: list[Any]) -> bool:
    """Tell if two forwards of the same batch differ."""
    losses = []
    with torch.no_grad():
        for seed in (1, 2):
            torch.manual_seed(seed)
            losses.append(float(loss_of(model, collate(rows))))
    return abs(losses[0] - losses[1]) > 1e-6 * abs(losses[0])


def loss_of(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    outputs = model(**batch)
    loss: Tensor = outputs["loss"] if isinstance(outputs, dict) else outputs[0]
    return loss.sum() if loss.dim() else loss


def gradient_of_one_batch(model: nn.Module, rows: list[Any], dtype: torch.dtype) -> Gradients:
    """The gradient of the head's own loss for all rows at once."""
    model.to(dtype).zero_grad()
    loss_of(model, cast(collate(rows), dtype)).backward()
    gradients = {name: p.grad.double().clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients


def squared_norm(gradients: Gradients) -> float:
    return sum(float(grad.square().sum()) for grad in gradients.values())


def train(trainer_class: type[Trainer], model: nn.Module, rows: list[Any], want: Gradients) -> Outcome:
    """One optimizer step that changes nothing, for its gradient."""
    reset_accelerate()
    model.zero_grad()
    tap = GradientTap()
    arguments = TrainingArguments(
        **SETTINGS,
        use_cpu=True,
        per_device_train_batch_size=ROWS_PER_MICRO_BATCH,
        gradient_accumulation_steps=ACCUMULATION,
        max_steps=1,
        max_grad_norm=0.0,
        logging_steps=1,
        optim="sgd",
        learning_rate=0.0,
        lr_scheduler_type="constant",
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
    )
    try:
        trainer_class(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=[tap]).train()
    except (LossUnitError, TargetCountError) as error:
        return Outcome("refused", why=f"{type(error).__name__}: {error}")
    except Exception as error:
        return Outcome("crashed", why=f"{type(error).__name__}: {error}")
    error = relative_error(tap.steps[0], want)
    return Outcome("exact" if error < WRONG else "wrong", error)
