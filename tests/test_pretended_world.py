"""User code reads another number of ranks; collectives do not, and nothing is left afterwards."""

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import TrainingArguments

from hf_gradutils import GradUtilsAccelerator
from hf_gradutils._pretended_world import pretending
from tests.harness.ranks import ranks
from tests.harness.trainer_cases import reset_accelerate


def _read(accelerator, args):
    sizes = [accelerator.num_processes, args.world_size]
    return [*sizes, dist.get_world_size()] if dist.is_initialized() else sizes


@ranks(2)
def test_user_code_reads_the_pretended_number_and_collectives_reach_all_ranks():
    reset_accelerate()
    args = TrainingArguments("unused", use_cpu=True, report_to=[])
    for kind in (Accelerator, GradUtilsAccelerator):
        accelerator = kind(cpu=True)
        for number in (1, 8):
            with pretending(accelerator, args, number):
                assert _read(accelerator, args) == [number] * 3
                assert dist.get_world_size(dist.group.WORLD) == 2
                total = torch.ones(())
                dist.all_reduce(total)
                assert total == 2
            assert _read(accelerator, args) == [2] * 3


def test_everything_is_restored_also_after_an_error_and_when_nested():
    reset_accelerate()
    args = TrainingArguments("unused", use_cpu=True, report_to=[])
    accelerator = Accelerator(cpu=True)
    before = dict(vars(Accelerator)), dict(vars(TrainingArguments)), dist.get_world_size

    def fails():
        with pretending(accelerator, args, 3):
            with pretending(accelerator, args, 4):
                assert _read(accelerator, args) == [4, 4]
            assert _read(accelerator, args) == [3, 3]
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert _read(accelerator, args) == [1, 1]
    assert (dict(vars(Accelerator)), dict(vars(TrainingArguments)), dist.get_world_size) == before
