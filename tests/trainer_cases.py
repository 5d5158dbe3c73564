"""Heads and layouts for the Trainer's tests: tiny models, ragged data, and the float64 truth."""

import copy
import functools
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_gradutils import GradUtilsTrainer

NUM_SAMPLES = 16
LENGTH = 12
VOCAB = 48
_SMALL = {"vocab_size": VOCAB, "num_attention_heads": 2, "num_hidden_layers": 2, "hidden_size": 16}
_LLAMA = LlamaConfig(**_SMALL, intermediate_size=32, num_key_value_heads=2, pad_token_id=0, num_labels=3)
_BERT = BertConfig(**_SMALL, intermediate_size=32, num_labels=3, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
_GPT2 = GPT2Config(
    vocab_size=VOCAB,
    n_embd=16,
    n_layer=2,
    n_head=2,
    resid_pdrop=0,
    embd_pdrop=0,
    attn_pdrop=0,
    bos_token_id=1,
    eos_token_id=1,
)
_T5 = T5Config(
    vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0, decoder_start_token_id=0
)

HEADS: dict[str, tuple[type[nn.Module], Any, str]] = {
    "llama causal": (LlamaForCausalLM, _LLAMA, "tokens"),
    "gpt2 causal": (GPT2LMHeadModel, _GPT2, "tokens"),
    "t5 seq2seq": (T5ForConditionalGeneration, _T5, "tokens"),
    "bert masked": (BertForMaskedLM, _BERT, "tokens"),
    "bert classes": (BertForSequenceClassification, _BERT, "classes"),
    "llama classes": (LlamaForSequenceClassification, _LLAMA, "classes"),
    "bert regression": (BertForSequenceClassification, _BERT, "numbers"),
    "bert multi-label": (BertForSequenceClassification, _BERT, "several"),
}
"""Name → (class, configuration, kind of labels). The first label of a row counts for heads that do not shift."""

WRAPPED = {"llama": "LlamaDecoderLayer", "bert": "BertLayer", "gpt2": "GPT2Block", "t5": "T5Block"}

TIED = ("t5 seq2seq", "bert masked")
"""Heads whose tied parameters accelerate 1.15 puts into two FSDP2 groups, which torch 2.13 refuses."""


def shard_tied(model: nn.Module, layer: str) -> None:
    """FSDP2 by hand: each layer a group, and all that is tied in the root's."""
    for module in model.modules():
        if type(module).__name__ == layer:
            fully_shard(module)
    fully_shard(model)


def make_model(head: str) -> nn.Module:
    torch.manual_seed(11)
    model_class, config, kind = HEADS[head]
    config = copy.deepcopy(config)  # models write the kind of problem into it
    if kind == "numbers":
        config.num_labels = 1
    return model_class(config)


def make_data(head: str, num_samples: int = NUM_SAMPLES, *, seed: int = 5) -> list[dict[str, Tensor]]:
    """Rows of one length; the number of targets is ragged, from 1 up."""
    generator = torch.Generator().manual_seed(seed)
    kind, rows = HEADS[head][2], []
    for index in range(num_samples):
        input_ids = torch.randint(3, VOCAB, (LENGTH,), generator=generator)
        row = {"input_ids": input_ids, "attention_mask": torch.ones(LENGTH, dtype=torch.int64)}
        if kind == "tokens":
            labels = torch.randint(3, VOCAB, (LENGTH,), generator=generator)
            labels[2 + (index * 5) % (LENGTH - 2) :] = -100
            row["labels"] = labels
        elif kind == "classes":
            row["labels"] = torch.randint(0, 3, (), generator=generator)
        elif kind == "numbers":
            row["labels"] = torch.randn((), generator=generator)
        else:
            row["labels"] = torch.randint(0, 2, (3,), generator=generator).float()
        rows.append(row)
    return rows


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def truth(head: str, data: list[dict[str, Tensor]]) -> tuple[dict[str, Tensor], float]:
    """Gradient and loss of one process and one batch in float64: what the model's own mean gives there."""
    model = make_model(head).double()
    batch = collate(data)
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    loss = model(**batch).loss
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, loss.item()


class GradientTap(TrainerCallback):
    """Keeps the gradients that the optimizer is about to see, whole and in float64."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        gradients = {}
        for name, p in model.named_parameters():
            if p.grad is not None:
                grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
                gradients[name.removeprefix("module.")] = grad.detach().double().clone()
        self.steps.append(gradients)


def train(
    head: str,
    accumulation: int = 1,
    *,
    trainer_class: type[Trainer] = GradUtilsTrainer,
    fsdp: bool = False,
    model: nn.Module | None = None,
    data: Any = None,
    eval_data: Any = None,
    arguments: dict[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Trainer, GradientTap]:
    """One optimizer step over all the data, on the ranks there are."""
    reset_accelerate()
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    data = make_data(head) if data is None else data
    options: dict[str, Any] = {
        "output_dir": str(Path(tempfile.gettempdir()) / "hf_gradutils-tests"),  # nothing is saved there
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "per_device_train_batch_size": max(1, NUM_SAMPLES // (accumulation * world_size)),
        "gradient_accumulation_steps": accumulation,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    model = make_model(head) if model is None else model
    if fsdp:
        use_fsdp_on_cpu()
        layer = WRAPPED[head.split()[0]]
        if head in TIED:
            shard_tied(model, layer)
            layer = f"FSDP{layer}"  # what fully_shard has made of its name
        options |= {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": [layer]}}
    tap = GradientTap()
    trainer = trainer_class(
        model=model,
        args=TrainingArguments(**options | (arguments or {})),
        train_dataset=data,
        eval_dataset=eval_data,
        callbacks=[tap],
        **kwargs,
    )
    trainer.train()
    return trainer, tap


def relative_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    names = set(got) | set(want)
    pairs = [(got.get(n), want.get(n)) for n in names]
    difference = sum(float(((0 if g is None else g) - (0 if w is None else w)).square().sum()) for g, w in pairs)
    return math.sqrt(difference / sum(float(w.square().sum()) for w in want.values()))


def norm(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))


def reset_accelerate() -> None:
    """Several Trainers in one process: accelerate keeps its state for good."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@functools.cache
def use_fsdp_on_cpu() -> None:
    """Test only: accelerate ignores FSDP on CPU silently and would run DDP."""
    from accelerate import state

    original = state.PartialState.__init__

    def patched(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        shared = state.PartialState._shared_state
        if shared.get("distributed_type") == state.DistributedType.MULTI_CPU:
            shared["distributed_type"] = state.DistributedType.MULTI_GPU

    state.PartialState.__init__ = patched
