"""The bodies of ``tests/gpu``, on CPU as far as they go there: they are often changed without a GPU."""

import pytest
import torch

from hf_gradutils import GradUtilsTrainer
from tests.gpu import test_gpu_exactness as exactness
from tests.gpu import test_gpu_graph as graph
from tests.gpu import test_gpu_memory as memory
from tests.gpu import test_gpu_nonfinite as nonfinite
from tests.gpu import test_gpu_norms as norms
from tests.gpu import test_gpu_waiting as waiting
from tests.gpu.cuda_cases import DEADLINE_S
from tests.harness.ranks import ranks

CPU = "cpu"


@pytest.mark.slow
def test_bodies_of_one_rank():
    exactness.trainer_is_exact("one_rank", CPU, ["bert classes"])
    exactness.other_norms("one_rank", CPU)
    exactness.half_is_as_near("one_rank", CPU, {"bf16": True}, {"mixed_precision": "bf16"}, 0.06)
    exactness.half_is_as_near("one_rank", CPU, {"fp16": True}, {"mixed_precision": "fp16"}, 0.015)
    graph.replayed(CPU, 2.0, torch.float32)
    memory.peaks_of_batches("one_rank", CPU)
    nonfinite.skips("one_rank", CPU, "fused adamw")
    nonfinite.folded_skips("one_rank", CPU)
    norms.large(CPU, torch.bfloat16, 1_000_000)
    norms.extremes(CPU)
    few, many = norms.work_of_two_sizes(CPU, ["float32", "bfloat16"])
    assert few["calls"] == many["calls"]
    waiting.windows_end(CPU, [torch.float32, torch.bfloat16])
    waiting.whole_window(CPU, True)
    waiting.steps_of_trainer("one_rank", CPU, GradUtilsTrainer, 8, 3)
    waiting.steps_of_loop(CPU, 8, 3)
    waiting.judged_later(CPU)


@ranks(2, nodes=2, deadline_s=DEADLINE_S)
def test_bodies_of_two_ranks():
    exactness.loop_is_exact("fsdp2x2", CPU, ["t5 seq2seq"])
    exactness.loop_is_exact("ddp2", CPU, ["bert classes"])
    exactness.stock_is_wrong("ddp2", CPU, "bert classes")
    exactness.fused_step("fsdp2x2", CPU, True)
    memory.policies_agree(CPU, "fsdp2x2")
    memory.trainer_agrees("ddp2", CPU)
    nonfinite.raises("fsdp2x2", CPU, "sgd")
    nonfinite.ignores("fsdp2x2", CPU)
    norms.empty_ranks(CPU)


@ranks(2, nodes=2, deadline_s=DEADLINE_S, init=False)
def test_bodies_of_offloaded_gradients():
    norms.offloaded(CPU, "cpu:gloo")
