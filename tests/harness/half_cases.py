"""Models and loops for the tests of half precision."""

from collections.abc import Callable
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn

from hf_gradutils import GradUtilsAccelerator
from tests.harness.heads import VOCAB, PlainLayer


class Seldom(nn.Module):
    """A part of it takes part in few micro-batches only; most kinds share an FSDP2 group with parts that always do."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.kind = kind
        self.embedding = nn.Embedding(VOCAB, 16)
        self.layers = nn.Sequential(PlainLayer(), PlainLayer())
        self.tower = nn.Linear(4, 16)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.rare_layer = PlainLayer()  # which FSDP2 puts into a group of its own
        self.gate = nn.Parameter(torch.tensor([0.3]))
        self.head = nn.Linear(16, VOCAB)

    def forward(self, input_ids: Tensor, labels: Tensor, flag: Tensor) -> dict[str, Tensor]:
        hidden = self.layers(self.embedding(input_ids))
        is_rare = bool(flag.any())  # rows of a micro-batch have it in common, on all ranks
        if self.kind == "vision tower":
            hidden = hidden + (self.tower(flag[:, None].repeat(1, 4).to(hidden.dtype))[:, None] if is_rare else 0)
        elif self.kind == "rare layer":
            hidden = self.rare_layer(hidden) if is_rare else hidden
        elif self.kind == "rare branch":
            hidden = hidden * (1 + self.gate) if is_rare else hidden
        else:
            hidden = hidden + self.experts[int(is_rare)](hidden)
        logits = self.head(hidden)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten()), "logits": logits}


SELDOM = {
    "vision tower": "tower.weight",
    "rare branch": "gate",
    "expert chosen in Python": "experts.1.weight",
    "rare layer": "rare_layer.linear.weight",
}
"""Kind → a parameter of the seldom part."""


def seldom_rows(num_rows: int, rare: Callable[[int], bool]) -> list[dict[str, Tensor]]:
    """Rows for :class:`Seldom`, with ragged targets; which of them need the seldom part."""
    generator = torch.Generator().manual_seed(3)
    rows = []
    for index in range(num_rows):
        words = torch.randint(8, VOCAB, (12,), generator=generator)
        labels = words.roll(1).clone()
        labels[1 + index % 11 :] = -100
        rows.append({"input_ids": words, "labels": labels, "flag": torch.tensor(float(rare(index)))})
    return rows


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def with_scaler(
    accelerator: GradUtilsAccelerator, init_scale: float = 1024.0, *, computes_in_half: bool = False
) -> None:
    """fp16's loss scaling, which accelerate offers on accelerators only, put in place by hand."""
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    accelerator.native_amp = True
    if not computes_in_half:
        accelerator.autocast_handler = AutocastKwargs(enabled=False)
    AcceleratorState._shared_state["_mixed_precision"] = "fp16"


def dtypes_in(value: Any) -> set[torch.dtype]:
    """Of all tensors with dimensions in what a module returns."""
    if isinstance(value, Tensor):
        return {value.dtype} if value.dim() and value.is_floating_point() else set()
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return {dtype for part in parts for dtype in dtypes_in(part)}
