"""A test function, or any function, run by several processes."""

import functools
import inspect
import math
import pickle
import tempfile
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.harness.ranks.forkserver import start_forkserver
from tests.harness.ranks.launch import GRACE_S, Plan, environment, meeting_point, warning_filters
from tests.harness.ranks.processes import Worker, end, watch
from tests.harness.ranks.reports import RankReport, judge
from tests.harness.ranks.server import FunctionName, Job

most_ranks = math.inf
"""A test that starts more is left out: 1 under --fast."""

F = TypeVar("F", bound=Callable[..., Any])


def ranks(
    world_size: int,
    *,
    nodes: int = 1,
    deadline_s: float = 60,
    grace_s: float = GRACE_S,
    init: bool = True,
    agent: bool = True,
    env: Mapping[str, str | None] | None = None,
    **mesh_dims: int,
) -> Callable[[F], F]:
    """Run a test function in `world_size` processes, all of which must succeed.

    Args:
        world_size: How many ranks.
        nodes: Simulated nodes; the ranks are split evenly over them.
        deadline_s: From the start of the ranks to the end of the last; then they hang.
        grace_s: Time for the others to report after a first failure.
        init: Initialise the default gloo process group before the body.
        agent: The parent hosts the store, as torchrun's agent does. Without, nothing listens at
            MASTER_PORT until rank 0 does, as with plain processes; the port is kept free.
        env: Variables to add, or to unset where None.
        **mesh_dims: Of the `DeviceMesh` that a parameter called `mesh` receives, outermost first.

    Raises:
        RankFailure: When the test runs and a rank raises, hangs or dies.
        ValueError: The nodes or the mesh dims do not fit `world_size`.
    """
    plan = Plan(
        world_size=world_size,
        nodes=nodes,
        deadline_s=deadline_s,
        grace_s=grace_s,
        init=init,
        agent=agent,
        env=env or {},
        mesh_dims=mesh_dims,
    )

    def decorate(function: F) -> F:
        plan.check_mesh(function)

        @functools.wraps(function)
        def in_ranks(*args: Any, **kwargs: Any) -> None:
            __tracebackhide__ = True
            run_plan(plan, function, args, kwargs)

        return without_mesh(in_ranks)

    return decorate


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    nodes: int = 1,
    deadline_s: float = 60,
    grace_s: float = GRACE_S,
    init: bool = True,
    agent: bool = True,
    env: Mapping[str, str | None] | None = None,
    mesh_dims: Mapping[str, int] | None = None,
    **kwargs: Any,
) -> list[Any]:
    """Call a function in `world_size` processes and return what each returned, in rank order.

    See `ranks` for the arguments; `args` and `kwargs` are pickled to every rank.
    """
    __tracebackhide__ = True
    plan = Plan(
        world_size=world_size,
        nodes=nodes,
        deadline_s=deadline_s,
        grace_s=grace_s,
        init=init,
        agent=agent,
        env=env or {},
        mesh_dims=mesh_dims or {},
    )
    plan.check_mesh(function)
    return [report.value for report in run_plan(plan, function, args, kwargs)]


def without_mesh(wrapper: F) -> F:
    """Hide the parameter that the ranks fill in from pytest, which would look for a fixture."""
    signature = inspect.signature(wrapper)
    visible = [parameter for name, parameter in signature.parameters.items() if name != "mesh"]
    wrapper.__signature__ = signature.replace(parameters=visible)  # type: ignore[attr-defined]
    return wrapper


def run_plan(
    plan: Plan, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> list[RankReport]:
    """Call a function in every rank of a plan, and fail with the first failure."""
    __tracebackhide__ = True
    if plan.world_size > most_ranks:
        pytest.skip(f"--fast leaves out tests of {plan.world_size} ranks")
    named = FunctionName.of(function) if isinstance(function, types.FunctionType) else function
    body = pickle.dumps((named, args, kwargs))
    start_forkserver()
    workers: list[Worker] = []
    with meeting_point(plan.agent) as port, tempfile.TemporaryDirectory(prefix="ranks-") as scratch:
        try:
            for global_rank in range(plan.world_size):
                job = Job(
                    body=body,
                    global_rank=global_rank,
                    env=environment(plan, global_rank, port, scratch),
                    cwd=str(Path.cwd()),
                    warning_filters=warning_filters(),
                    init=plan.init,
                    mesh_dims=dict(plan.mesh_dims),
                    timeout_s=plan.deadline_s + 60,
                )
                workers.append(Worker(job))
            reports = watch(workers, plan)
        finally:
            end(workers)
    for report in reports:
        for line in report.output.splitlines():
            print(f"[rank {report.global_rank}] {line}")
    judge(reports)
    return reports
