"""The layouts of ranks that tests and benchmarks name, and `@on_layouts`: a test that runs in each of them.

    @on_layouts("one_rank", "ddp2", "fsdp2x2")
    def test_the_gradient_is_exact(layout, mesh):
        model = parallelize(make_net(), layout, mesh)

The body runs on every rank of the layout, in pytest's own process where there is one. ``mesh`` is made if it is
asked for.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.harness.ranks import run_ranks
from tests.harness.ranks.decorator import F, run_plan, without_mesh
from tests.harness.ranks.launch import Plan
from tests.harness.ranks.server import seed


@dataclass(frozen=True)
class Layout:
    """How a model is spread over ranks."""

    axes: Mapping[str, int]
    """Of the mesh, outermost first. Ranks along ``rep`` and ``dp`` see different rows, ranks along ``tp`` the same."""
    is_right: Callable[[nn.Module], bool]
    """Whether a wrapped model is spread like that: FSDP on CPU silently becomes DDP."""
    loading: Mapping[str, Any] | None = None
    """For ``from_pretrained``, where transformers spreads the model itself."""
    is_fsdp: bool = False
    """Whether accelerate shards the model."""

    @property
    def num_ranks(self) -> int:
        return math.prod(self.axes.values())

    @property
    def num_data_ranks(self) -> int:
        return self.num_ranks // self.axes.get("tp", 1)

    def arguments(self, layers: tuple[str, ...]) -> dict[str, Any]:
        """``TrainingArguments`` for accelerate; ``layers`` are the class names of the repeated ones."""
        if not self.is_fsdp:
            return {}
        arguments: dict[str, Any] = {
            "fsdp": True,
            "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": list(layers)},
        }
        if "rep" in self.axes:
            from accelerate.utils import ParallelismConfig  # slow, and most tests of layouts do without

            arguments["parallelism_config"] = ParallelismConfig(
                dp_replicate_size=self.axes["rep"], dp_shard_size=self.axes["dp"]
            )
        return arguments


def _meshes(model: nn.Module) -> set[tuple[int, ...]]:
    return {tuple(p.device_mesh.shape) for p in model.parameters() if isinstance(p, DTensor)}


def _is_ddp(model: nn.Module) -> bool:
    return isinstance(model, DistributedDataParallel)


def _is_fsdp(*shape: int) -> Callable[[nn.Module], bool]:
    return lambda model: isinstance(model, FSDPModule) and _meshes(model) == {shape}


def _is_tp(model: nn.Module) -> bool:
    return (2,) in _meshes(model) and not isinstance(model, FSDPModule)


def _is_tp_in_fsdp(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule) and (2, 2) in _meshes(model)


def _is_partly_sharded(model: nn.Module) -> bool:
    return not all(isinstance(p, DTensor) for p in model.parameters()) and _meshes(model) == {(2,)}


FSDP, HSDP, TP = {"dp": 2}, {"rep": 2, "dp": 2}, {"tp": 2}

LAYOUTS: dict[str, Layout] = {
    "one_rank": Layout({}, lambda model: not _meshes(model)),
    "ddp2": Layout({"dp": 2}, _is_ddp),
    "ddp4": Layout({"dp": 4}, _is_ddp),
    "fsdp2x2": Layout(FSDP, _is_fsdp(2), is_fsdp=True),
    "fsdp2x4": Layout({"dp": 4}, _is_fsdp(4), is_fsdp=True),
    "hsdp2x2": Layout(HSDP, _is_fsdp(2, 2), is_fsdp=True),
    "native_fsdp2x2": Layout(FSDP, _is_fsdp(2), {"fsdp_size": 2}),
    "native_hsdp2x2": Layout(HSDP, _is_fsdp(2, 2), {"fsdp_size": 2, "dp_replicate_size": 2}),
    "tp2": Layout(TP, _is_tp, {"tp_size": 2, "tp_plan": "auto"}),
    "tp2_fsdp2x2": Layout(FSDP | TP, _is_tp_in_fsdp, {"tp_size": 2, "tp_plan": "auto", "fsdp_size": 2}),
    "ep2_fsdp2x2": Layout(
        FSDP, lambda model: len(_meshes(model)) == 2, {"fsdp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"}
    ),
    "plain_beside_fsdp2x2": Layout(FSDP, _is_partly_sharded),
    "two_meshes2x2": Layout(FSDP | TP, _is_partly_sharded),
}

NET_LAYOUTS = tuple(name for name in LAYOUTS if not name.startswith(("native", "ep2")))
"""Those of `tiny_net`, spread by hand."""

HEAD_LAYOUTS = tuple(name for name in LAYOUTS if name not in ("fsdp2x4", "plain_beside_fsdp2x2", "two_meshes2x2"))
"""Those of models of transformers: spread by accelerate (DDP, FSDP2 and HSDP) or while they are loaded."""


def on_layouts(*names: str, **options: Any) -> Callable[[F], F]:
    """Run a test function on every rank of each layout; it is given the name as ``layout``.

    Args:
        *names: Of ``LAYOUTS``. None where another mark parametrizes ``layout``.
        **options: As for `ranks`: ``deadline_s``, ``env``, ``nodes``.
    """

    def decorate(body: F) -> F:
        @functools.wraps(body)
        def in_layout(*, layout: str, **kwargs: Any) -> None:
            __tracebackhide__ = True
            axes, kwargs = LAYOUTS[layout].axes, kwargs | {"layout": layout}
            if axes:
                run_plan(Plan(world_size=math.prod(axes.values()), mesh_dims=axes, **options), body, (), kwargs)
                return
            seed()
            body(**kwargs | ({"mesh": None} if wants_mesh else {}))

        wants_mesh = "mesh" in inspect.signature(body).parameters
        visible = without_mesh(in_layout)
        return pytest.mark.parametrize("layout", names)(visible) if names else visible

    return decorate


def run(function: Callable[..., Any], layout: str, *args: Any) -> list[Any]:
    """Call ``function(layout, *args)`` on every rank of the layout; what each returned."""
    num_ranks = LAYOUTS[layout].num_ranks
    return [function(layout, *args)] if num_ranks == 1 else run_ranks(function, num_ranks, layout, *args)
