"""The end of a window, ours beside what others clip with, on the same gradients in the same processes.

Each peer is called the way its own training loop calls it. Theirs is the norm and the clip; ours also carries the
targets and the loss of the window, which they communicate elsewhere.
"""

import gc
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.page import short_reason
from benchmarks.performance.methods import ACCELERATE, FOLDED, METHODS, OURS, Method
from hf_gradutils.upstream.dtensor import local_tensor
from tests.harness.counting import Traffic, collectives, events_of, num_host_syncs, top_level
from tests.harness.layouts import LAYOUTS
from tests.harness.ranks import run_ranks

MIXED = ("plain_beside_fsdp2x2", "two_meshes2x2")
"""Layouts in which gradients of one model are on different meshes, or on one and on none."""

LAYOUTS_MEASURED = ("one_rank", "ddp2", "fsdp2x2", "hsdp2x2", "tp2_fsdp2x2", *MIXED)

SIZES = (30, 300, 3000)
"""Parameters of a model; each has 128 elements, so that calls are what costs."""

MOST_ON_FOUR = 300
"""Parameters up to which others are measured on four ranks: their first call on 3000 DTensors takes a minute there."""


@dataclass(frozen=True)
class Cost:
    """One call on one rank; ``cpu_s`` and the largest of the counts over ranks once they are put together."""

    calls: int
    """Top-level aten operations."""
    collectives: int
    syncs: int
    reads: float
    """Bytes of the gradients read, in multiples of their size; ``writes`` likewise."""
    writes: float
    norm_error: float
    """Of the norm before clipping, relative to float64."""
    first_s: float
    """CPU time of the very first call; what the methods before have made torch remember is not made again."""
    cpu_s: tuple[float, ...]
    """Process CPU time of every repeat, added over the ranks; entry i of two methods belongs together."""
    thread_s: tuple[float, ...]
    """The part of it that the training's own thread took; the rest is gloo's, for the collectives."""


Outcome = Cost | str
"""Or what it raised."""


def methods(layout: str, num_parameters: int) -> dict[str, Method]:
    """Those to measure; accelerate's is left out where it calls torch's function and does nothing else."""
    names = [OURS, FOLDED] if num_parameters > MOST_ON_FOUR and LAYOUTS[layout].num_ranks > 2 else list(METHODS)
    return {name: METHODS[name] for name in names if name != ACCELERATE or layout in MIXED}


# ---- The model ----


class _Parameters(nn.Module):
    def __init__(self, num_parameters: int):
        super().__init__()
        self.items = nn.ParameterList(nn.Parameter(torch.randn(16, 8)) for _ in range(num_parameters))


def _make_model(layout: str, num_parameters: int, mesh: DeviceMesh | None) -> tuple[nn.Module, float]:
    """A model whose gradients equal its parameters, the same on all ranks, and their norm in float64."""
    torch.manual_seed(11)
    num_beside = {"plain_beside_fsdp2x2": num_parameters // 10, "two_meshes2x2": num_parameters // 2}.get(layout, 0)
    model = nn.Module()
    model.main, model.beside = _Parameters(num_parameters - num_beside), _Parameters(num_beside)
    norm = sum(p.detach().double().square().sum().item() for p in model.parameters()) ** 0.5
    if mesh is not None and "tp" in mesh.mesh_dim_names:
        items = model.beside.items if layout == "two_meshes2x2" else model.main.items
        for index, parameter in enumerate(items):
            items[index] = nn.Parameter(distribute_tensor(parameter.detach(), mesh["tp"], [Shard(0)]))
    if layout == "ddp2":
        model = DistributedDataParallel(model)
    elif mesh is not None:
        fully_shard(model.main, mesh=mesh["dp"] if "tp" in mesh.mesh_dim_names else mesh)
    for parameter in model.parameters():
        parameter.grad = parameter.detach().clone()
    _check(layout, model, num_parameters, num_beside)
    return model, norm


def _check(layout: str, model: nn.Module, num_parameters: int, num_beside: int) -> None:
    meshes = [p.grad.device_mesh if isinstance(p.grad, DTensor) else None for p in model.parameters()]
    assert len(meshes) == num_parameters
    assert len(set(meshes)) == (2 if layout in MIXED else 1)
    num_plain = {"one_rank": num_parameters, "ddp2": num_parameters, "plain_beside_fsdp2x2": num_beside}
    assert meshes.count(None) == num_plain.get(layout, 0)


# ---- Measuring ----


def measure(layout: str, num_parameters: int, num_repeats: int) -> dict[str, Outcome]:
    """Method → cost. Rank by rank and repeat by repeat every method has its turn, so that load hits all of them."""
    results = on_ranks(_measure_on_rank, layout, num_parameters, num_repeats)
    return {name: _over_ranks([result[name] for result in results]) for name in results[0]}


def on_ranks(function: Callable[..., Any], layout: str, *args: Any) -> list[Any]:
    """Rank by rank what a function returned; one rank is a process that no launcher has started."""
    is_alone = LAYOUTS[layout].num_ranks == 1
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    env = dict.fromkeys(launcher) if is_alone else {}
    return run_ranks(function, LAYOUTS[layout].num_ranks, layout, *args, init=not is_alone, env=env, deadline_s=400)


def _over_ranks(outcomes: list[Outcome]) -> Outcome:
    costs = [outcome for outcome in outcomes if isinstance(outcome, Cost)]
    if len(costs) < len(outcomes):
        return next(outcome for outcome in outcomes if isinstance(outcome, str))
    counted = ("calls", "collectives", "syncs", "reads", "writes", "norm_error", "first_s")
    most = {name: max(getattr(cost, name) for cost in costs) for name in counted}
    cpu_s, thread_s = (
        tuple(sum(times) for times in zip(*(getattr(cost, name) for cost in costs), strict=True))
        for name in ("cpu_s", "thread_s")
    )
    return Cost(**most, cpu_s=cpu_s, thread_s=thread_s)


def _measure_on_rank(layout: str, num_parameters: int, num_repeats: int) -> dict[str, Outcome]:
    logging.disable(logging.WARNING)
    axes = LAYOUTS[layout].axes
    mesh = init_device_mesh("cpu", tuple(axes.values()), mesh_dim_names=tuple(axes)) if axes else None
    model, norm = _make_model(layout, num_parameters, mesh)
    gradients = [local_tensor(p.grad) for p in model.parameters()]
    saved = [gradient.clone() for gradient in gradients]

    def ready(method: Method) -> Callable[[], Tensor]:
        for gradient, value in zip(gradients, saved, strict=True):
            gradient.copy_(value)
        call = method(model)
        if mesh is not None:
            dist.barrier()
        return call

    outcomes: dict[str, Any] = {}
    running = methods(layout, num_parameters)
    for name, method in list(running.items()):
        try:
            found, first_s, _ = _cpu_time(ready(method))  # whatever is made once is made here
        except RuntimeError as error:
            outcomes[name] = f"raises {type(error).__name__}: {str(error).splitlines()[0]}"
            del running[name]
        else:
            whole = found.full_tensor() if isinstance(found, DTensor) else found
            outcomes[name] = _counted(method, ready, model)
            outcomes[name] |= {"norm_error": abs(whole.item() / norm - 1), "first_s": first_s}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in running}
    order = list(running)
    gc.collect()
    gc.freeze()
    for repeat in range(num_repeats):
        for name in order[repeat % len(order) :] + order[: repeat % len(order)]:
            times[name].append(_cpu_time(ready(running[name]))[1:])
    for name in running:
        cpu_s, thread_s = zip(*times[name], strict=True)
        outcomes[name] = Cost(**outcomes[name], cpu_s=cpu_s, thread_s=thread_s)
    return outcomes


def _counted(method: Method, ready: Callable[[Method], Callable[[], Tensor]], model: nn.Module) -> dict[str, Any]:
    events = events_of(ready(method))
    call = ready(method)
    with Traffic(model) as traffic:
        call()
    return {
        "calls": len(top_level(events)),
        "collectives": collectives(events).total(),
        "syncs": num_host_syncs(events),
        "reads": round(traffic.read, 6),
        "writes": round(traffic.written, 6),
    }


def _cpu_time(call: Callable[[], Tensor]) -> tuple[Tensor, float, float]:
    """The result of a call, and the CPU time of the process and of this thread."""
    gc.disable()
    try:
        start, start_here = time.process_time(), time.thread_time()
        return call(), time.process_time() - start, time.thread_time() - start_here
    finally:
        gc.enable()


# ---- Recorded ----


def record(costs: dict[str, Outcome]) -> dict[str, Any]:
    """Method → its counts, the median of its CPU times, and its times beside ours; or that it raises."""
    return {name: _record_of(name, costs) for name in costs}


def _record_of(name: str, costs: dict[str, Outcome]) -> dict[str, Any] | str:
    cost = costs[name]
    if isinstance(cost, str):
        return short_reason(cost)
    found = asdict(cost)
    del found["cpu_s"], found["thread_s"]
    found["cpu_us"] = statistics.median(cost.cpu_s) * 1e6
    for own in (OURS, FOLDED):
        ours = costs[own]
        if name not in (OURS, FOLDED) and isinstance(ours, Cost):
            found[f"beside {own}"] = spread(ratios(cost.cpu_s, ours.cpu_s))
            found[f"thread beside {own}"] = spread(ratios(cost.thread_s, ours.thread_s))
    return found


def ratios(ones: Sequence[float], others: Sequence[float]) -> list[float]:
    """Of the turns of each repeat."""
    return [one / other for one, other in zip(ones, others, strict=True)]


def spread(values: Sequence[float]) -> list[float]:
    """Smallest, median, largest."""
    return [min(values), statistics.median(values), max(values)]
