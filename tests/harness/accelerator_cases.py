"""accelerate's own loop with GradUtilsAccelerator: every head in every layout, one window or a few."""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import DistributedDataParallelKwargs, FullyShardedDataParallelPlugin, ParallelismConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_gradutils import GradUtilsAccelerator, GradUtilsPlugin
from tests.harness.gradients import whole_gradients
from tests.harness.heads import HEADS
from tests.harness.layouts import LAYOUTS, Layout
from tests.harness.trainer_cases import (
    TIED,
    fsdp_on_cpu,
    load,
    make_data,
    make_model,
    reset_accelerate,
    shard_tied,
)

HEAD = "llama causal"
TOLERANCE = 1e-5
SGD = functools.partial(torch.optim.SGD, lr=0.1)
FUSED = functools.partial(torch.optim.AdamW, lr=0.1, fused=True)


def spread(layout: Layout, layers: tuple[str, ...]) -> dict[str, Any]:
    """Options of the Accelerator; ``layers`` are the class names of the repeated ones."""
    # Some heads have parts that text alone does not use; Trainer switches this on by itself.
    options: dict[str, Any] = {"kwargs_handlers": [DistributedDataParallelKwargs(find_unused_parameters=True)]}
    axes = {"rep": "dp_replicate_size", "dp": "dp_shard_size", "tp": "tp_size"}
    if layout.is_fsdp:
        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=list(layers)
        )
    if (layout.is_fsdp and "rep" in layout.axes) or "tp" in layout.axes:
        sizes = {axes[name]: size for name, size in layout.axes.items()}
        options["parallelism_config"] = ParallelismConfig(**sizes)
    return options


@dataclass
class Loop:
    """What a loop left behind."""

    head: str
    accelerator: GradUtilsAccelerator
    model: nn.Module
    optimizer: Any
    scheduler: Any
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    """Before each optimizer step: whole, in float64, on the CPU."""
    norms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    num_targets: list[float] = field(default_factory=list)

    def backward(self, batch: dict[str, Tensor]) -> None:
        num_targets = torch.tensor(HEADS[self.head].targets(batch))
        self.accelerator.backward(self.model(**batch)["loss"], num_targets=num_targets)


def make(
    head: str,
    layout: str,
    *,
    plugin: GradUtilsPlugin,
    rows: Any,
    batch_size: int,
    optimizer: Callable[..., torch.optim.Optimizer] = SGD,
    cpu: bool = True,
    **options: Any,
) -> tuple[Loop, DataLoader]:
    """Everything prepared, in the layout that is asked for."""
    reset_accelerate()
    spec, layers = LAYOUTS[layout], HEADS[head].layers
    assert spec.num_ranks == (dist.get_world_size() if dist.is_initialized() else 1)
    told = spread(spec, layers)
    with fsdp_on_cpu() if spec.loading or spec.arguments(layers) else contextlib.nullcontext():
        model = load(head, spec.loading) if spec.loading else make_model(head)
        if layout == "fsdp2x2" and head in TIED:
            shard_tied(model, layers)
            told["fsdp_plugin"].transformer_cls_names_to_wrap = [f"FSDP{layer}" for layer in layers]
        accelerator = GradUtilsAccelerator(cpu=cpu, gradient_accumulation_plugin=plugin, **told | options)
        made = optimizer(model.parameters())
        scheduler = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.5**step)
        loader = DataLoader(rows, batch_size=batch_size, collate_fn=HEADS[head].collate)
        model, made, loader, scheduler = accelerator.prepare(model, made, loader, scheduler)
    inside = getattr(model, "_orig_mod", model)
    assert spec.is_right(model) or spec.is_right(inside), (layout, type(model))
    return Loop(head, accelerator, model, made, scheduler), loader


def run_loop(
    head: str,
    layout: str,
    accumulation: int = 1,
    *,
    rows: Any = None,
    batch_size: int | None = None,
    plugin: GradUtilsPlugin | None = None,
    max_norm: float | None = None,
    after_backward: Callable[[Loop], None] | None = None,
    **options: Any,
) -> Loop:
    """One pass over the rows, as accelerate's documentation writes it; by default one window."""
    rows = make_data(head) if rows is None else rows
    batch_size = batch_size or max(1, len(rows) // (accumulation * LAYOUTS[layout].num_data_ranks))
    plugin = plugin or GradUtilsPlugin(num_steps=accumulation)
    loop, loader = make(head, layout, plugin=plugin, rows=rows, batch_size=batch_size, **options)
    accelerator, model, optimizer = loop.accelerator, loop.model, loop.optimizer
    for batch in loader:
        with accelerator.accumulate(model):
            loop.backward(batch)
            if after_backward is not None:
                after_backward(loop)
            if accelerator.sync_gradients and max_norm is not None:
                loop.norms.append(float(accelerator.clip_grad_norm_(model.parameters(), max_norm)))
                loop.gradients.append(whole_gradients(model))
            optimizer.step()
            if accelerator.sync_gradients:
                if max_norm is None:
                    loop.gradients.append(whole_gradients(model))
                loop.losses.append(float(accelerator.report.loss))
                loop.num_targets.append(float(accelerator.report.num_targets))
            loop.scheduler.step()
            optimizer.zero_grad()
    return loop
