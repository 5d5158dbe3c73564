"""A window's end in a CUDA graph.

A graph can hold it because it is a fixed list of kernels on fixed memory: no read by the host, no shape or branch that
depends on a value, nothing made anew from Python's numbers once the plan is there. On one rank: with more there is a
collective in it, which NCCL lets a graph hold and gloo, through the host, does not.
"""

import pytest
import torch
from torch import nn

from hf_gradutils.accelerator._optimizer import as_flag
from hf_gradutils.window import AccumulationWindow
from tests.gpu.cuda_cases import DEVICE, on_ranks

NUM_STEPS = 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("p", [2.0, float("inf")])
def test_a_replayed_window_gives_the_same_gradients_norms_and_weights(p, dtype):
    on_ranks(replayed, 1, DEVICE, p, dtype)


def replayed(device, p, dtype):
    eager = steps(device, p, dtype, run_eagerly)
    again = steps(device, p, dtype, run_as_graph if device != "cpu" else run_eagerly)
    for (norm, loss, gradients, weights), (norm_again, loss_again, gradients_again, weights_again) in zip(
        eager, again, strict=True
    ):
        assert norm_again == pytest.approx(norm, rel=1e-12)
        assert loss_again == pytest.approx(loss, rel=1e-12)
        for one, other in zip([*gradients, *weights], [*gradients_again, *weights_again], strict=True):
            assert torch.equal(one, other)
    norms = [norm for norm, *_ in eager]
    assert len(set(norms)) == NUM_STEPS, "each step has gradients of its own"
    assert not torch.equal(eager[0][3][0], eager[1][3][0]), "and moves the weights"


def run_eagerly(function):
    """The function itself, called once to warm up."""
    function()
    return function


def run_as_graph(function):
    """The same, by a graph: warmed up on a side stream and captured, as torch's documentation asks."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def steps(device, p, dtype, make_runner):
    generator = torch.Generator().manual_seed(3)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    model = nn.ParameterList(nn.Parameter(random(n + 1).to(device, dtype)) for n in range(40))
    for parameter in model:
        parameter.grad = random(len(parameter)).to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True, capturable=device != "cpu")
    window = AccumulationWindow(torch.device(device), loss_scale=4.0)
    loss, count = torch.ones((), device=device), torch.tensor(3, device=device)
    norm, mean_loss = torch.zeros((2,), device=device, dtype=torch.float64).unbind()

    def one_step():
        for _ in range(2):
            window.weigh(loss, count)
        report = window.close(model, 0.5, norm_type=p)
        optimizer.found_inf = as_flag(report.is_finite)
        optimizer.step()
        norm.copy_(report.grad_norm)
        mean_loss.copy_(report.loss)

    step = make_runner(one_step)
    with torch.no_grad():  # whatever the warm-up did
        for parameter in model:
            parameter.fill_(1.0)
        for state in optimizer.state.values():
            for value in state.values():
                value.zero_()
    seen = []
    for number in range(NUM_STEPS):
        with torch.no_grad():
            for parameter in model:
                parameter.grad.copy_(random(len(parameter)))
            loss.fill_(number)
        step()
        seen.append(
            (
                norm.item(),
                mean_loss.item(),
                [parameter.grad.clone() for parameter in model],
                [parameter.detach().clone() for parameter in model],
            )
        )
    return seen
