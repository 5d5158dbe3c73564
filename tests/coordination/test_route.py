"""Those who ask accelerate or transformers to let one rank go first get FirstRankPerNode."""

import contextlib
import os

import accelerate.state
import transformers.trainer  # noqa: F401 - loaded once, for all ranks
from accelerate import Accelerator, PartialState
from transformers import TrainingArguments

from hf_gradutils.accelerator import GradUtilsAccelerator, GradUtilsPlugin
from hf_gradutils.coordination.route import route_first_rank
from hf_gradutils.errors import FirstRankError
from tests.harness.first_rank_cases import rank
from tests.harness.ranks import run_ranks

ASKED = {
    "Accelerator, local": lambda: Accelerator(cpu=True).local_main_process_first(),
    "Accelerator": lambda: Accelerator(cpu=True).main_process_first(),
    "PartialState, local": lambda: PartialState(cpu=True).local_main_process_first(),
    "PartialState": lambda: PartialState(cpu=True).main_process_first(),
    "AcceleratorState": lambda: accelerate.state.AcceleratorState(cpu=True).main_process_first(),
    "TrainingArguments, local": lambda: _arguments().main_process_first(desc="tokenize"),
    "TrainingArguments": lambda: _arguments().main_process_first(local=False),
}


def _arguments():
    return TrainingArguments(output_dir=os.environ["TMPDIR"], use_cpu=True, report_to=[])


def test_each_of_them_is_routed_and_the_others_learn_of_a_failure():
    first, second = run_ranks(_fail_under_each, 2)
    assert first == [f"RuntimeError: disk full for {who}" for who in ASKED]
    for who, error in zip(ASKED, second, strict=True):
        assert error.startswith("FirstRankError: rank 0 of 2 on host")
        assert f"disk full for {who}" in error


def _fail_under_each():
    errors = []
    with route_first_rank():
        for who, ask in ASKED.items():
            try:
                with ask() as is_first:
                    assert is_first == (rank() == 0), who
                    raise RuntimeError(f"disk full for {who}")
            except (RuntimeError, FirstRankError) as error:
                errors.append(f"{type(error).__name__}: {error}")
    return errors


def test_the_trainers_accelerator_needs_no_routing():
    run_ranks(_in_our_accelerator, 4, nodes=2)


def _in_our_accelerator():
    ours = GradUtilsAccelerator.adopt(Accelerator(cpu=True), GradUtilsPlugin())
    with ours.local_main_process_first() as is_first:
        assert is_first == (rank() in (0, 2))
    with ours.main_process_first() as is_first:
        assert is_first == (rank() == 0)
    with ours.main_process_first(), ours.local_main_process_first() as is_first:  # as trl has it
        assert is_first == (rank() in (0, 2))


def test_the_prior_methods_are_restored():
    prior = TrainingArguments.main_process_first, PartialState.main_process_first
    with contextlib.suppress(ZeroDivisionError), route_first_rank():
        assert TrainingArguments.main_process_first is not prior[0]
        raise ZeroDivisionError
    assert prior == (TrainingArguments.main_process_first, PartialState.main_process_first)
