"""Trainings of one optimizer step for the Trainer's tests: every head in every layout, and the float64 truth."""

import contextlib
import functools
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from packaging.version import Version
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.distributed import DistributedConfig

from hf_gradutils import GradUtilsTrainer
from tests.harness import heads
from tests.harness.gradients import cast, whole_gradients
from tests.harness.heads import without_batch_statistics
from tests.harness.layouts import LAYOUTS
from tests.harness.shared_heads import SHARED_HEADS

HEADS = heads.HEADS | SHARED_HEADS
NUM_SAMPLES = 16
ONE_STEP: dict[str, Any] = {
    "output_dir": str(Path(tempfile.gettempdir()) / "hf_gradutils-tests"),  # nothing is saved there
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "max_steps": 1,
    "optim": "sgd",
    "learning_rate": 0.0,
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
}
"""Arguments of a training that is silent and leaves the weights as they are."""
IS_OLD = Version(transformers.__version__) < Version("5.23")
"""Checked on 5.17, which cannot do everything that 5.23 can."""
CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
"""The argument that switches activation checkpointing on; from 5.23 on the first."""

Rows = list[dict[str, Tensor]]


def make_model(head: str) -> nn.Module:
    return without_batch_statistics(HEADS[head].build())


def make_data(head: str, num_samples: int = NUM_SAMPLES, *, seed: int = 5) -> Rows:
    return HEADS[head].rows(num_samples, seed)


def truth(head: str, data: Rows) -> tuple[dict[str, Tensor], float]:
    """Gradient and loss of one process and one batch in float64: what the model's own mean gives there."""
    return truth_of_micro_batches(head, [data])


def truth_of_micro_batches(head: str, micro_batches: list[Rows]) -> tuple[dict[str, Tensor], float]:
    """The same for a loss with a term that no split leaves alone: the mean of the parts', weighted by targets."""
    model = make_model(head).double()
    batches = [HEADS[head].collate(rows) for rows in micro_batches]
    counts = [HEADS[head].targets(batch) for batch in batches]
    total = 0.0
    for batch, count in zip(batches, counts, strict=True):
        loss = model(**cast(batch, torch.float64))["loss"] * (count / sum(counts))
        loss.backward()
        total += loss.item()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, total


def micro_batches_of(data: Rows, layout: str, accumulation: int) -> list[Rows]:
    """How the loader of a Trainer that does not shuffle splits the data over ranks and micro-batches."""
    size = len(data) // (LAYOUTS[layout].num_data_ranks * accumulation)
    return [data[start : start + size] for start in range(0, len(data), size)]


# ---- Layouts ----

TIED = ("bert masked", "bert pretraining")
"""Heads whose tied parameters accelerate 1.15 puts into two FSDP2 groups, which torch 2.13 refuses."""


def shard_tied(model: nn.Module, layers: tuple[str, ...], dtype: torch.dtype | None = None) -> None:
    """FSDP2 by hand: each layer a group, and all that is tied in the root's; computing in ``dtype``."""
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32 if dtype else None)
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def load(head: str, options: dict[str, Any]) -> nn.Module:
    """The head, spread over the ranks by transformers while it is loaded."""
    if IS_OLD and set(options) != {"tp_size", "tp_plan"}:
        pytest.skip("transformers 5.17 spreads a model by tensor parallelism only")
    model = make_model(head)
    assert isinstance(model, PreTrainedModel), f"transformers does not load {type(model).__name__}"
    with tempfile.TemporaryDirectory() as own_folder:
        folders = [own_folder]
        dist.broadcast_object_list(folders)
        model.save_pretrained(folders[0])  # on rank 0 only: it sees to that itself
        dist.barrier()
        loaded = type(model).from_pretrained(
            folders[0],
            distributed_config=DistributedConfig(**options),
            experts_implementation="eager" if "moe" in head else None,  # as it was built; this is not saved
        )
        dist.barrier()
    return without_batch_statistics(loaded)


class GradientTap(TrainerCallback):
    """Keeps the gradients that the optimizer is about to see: whole, in float64, on the CPU."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.steps.append(whole_gradients(model))


def train(
    head: str,
    accumulation: int = 1,
    *,
    layout: str | None = None,
    trainer_class: type[Trainer] = GradUtilsTrainer,
    model: nn.Module | None = None,
    data: Any = None,
    eval_data: Any = None,
    arguments: dict[str, Any] | None = None,
    callback: TrainerCallback | None = None,
    taps: bool = True,
    resume: str | None = None,
    **kwargs: Any,
) -> tuple[Trainer, GradientTap]:
    """One optimizer step over all the data, on the ranks there are.

    Args:
        layout: Of ``HEAD_LAYOUTS``; None for what accelerate makes of the ranks, DDP or one process.
        resume: The checkpoint to go on from.
        taps: Keep the gradients of each step; a callback, which folding into the optimizer refuses.
    """
    reset_accelerate()
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    spread = LAYOUTS[layout or ("one_rank" if world_size == 1 else f"ddp{world_size}")]
    assert spread.num_ranks == world_size
    data = make_data(head) if data is None else data
    num_samples = len(data) if hasattr(data, "__len__") else NUM_SAMPLES
    options = ONE_STEP | {
        "per_device_train_batch_size": max(1, num_samples // (accumulation * spread.num_data_ranks)),
        "gradient_accumulation_steps": accumulation,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "remove_unused_columns": False,
    }
    layers = HEADS[head].layers
    with fsdp_on_cpu() if spread.loading or spread.arguments(layers) else contextlib.nullcontext():
        if model is None:
            model = load(head, spread.loading) if spread.loading else make_model(head)
        if layout == "fsdp2x2" and head in TIED:
            named = {"bf16": torch.bfloat16, "fp16": torch.float16}
            shard_tied(
                model, layers, next((dtype for name, dtype in named.items() if (arguments or {}).get(name)), None)
            )
            layers = tuple(f"FSDP{layer}" for layer in layers)  # what fully_shard has made of their names
        tap = GradientTap()
        trainer = trainer_class(
            model=model,
            args=TrainingArguments(**options | spread.arguments(layers) | (arguments or {})),
            train_dataset=data,
            eval_dataset=eval_data,
            callbacks=[*([tap] if taps else []), *([callback] if callback else [])],
            **{"data_collator": HEADS[head].collate} | kwargs,
        )
        trainer.train(resume_from_checkpoint=resume)
    wrapped = trainer.model_wrapped
    inside = getattr(wrapped, "_orig_mod", wrapped)  # of what torch.compile returns
    if spread.loading and hasattr(inside, "get_base_model"):
        inside = inside.get_base_model()  # peft's is around what transformers has sharded
    assert spread.is_right(wrapped) or spread.is_right(inside), (layout, type(wrapped))
    return trainer, tap


@contextlib.contextmanager
def warnings_of(name: str) -> Iterator[list[str]]:
    """What a logger warns of: on each rank, where a fixture of pytest's cannot be."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(name).addHandler(handler)
    try:
        yield said
    finally:
        logging.getLogger(name).removeHandler(handler)


def reset_accelerate() -> None:
    """Several Trainers in one process: accelerate keeps its state for good."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@contextlib.contextmanager
def fsdp_on_cpu() -> Iterator[None]:
    """Test only: accelerate ignores FSDP on CPU silently and would run DDP."""
    from accelerate import state

    original = state.PartialState.__init__

    @functools.wraps(original)
    def patched(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        shared = state.PartialState._shared_state
        if shared.get("distributed_type") == state.DistributedType.MULTI_CPU:
            shared["distributed_type"] = state.DistributedType.MULTI_GPU

    state.PartialState.__init__ = patched
    try:
        yield
    finally:
        state.PartialState.__init__ = original
