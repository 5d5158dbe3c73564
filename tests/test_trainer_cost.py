"""What a step of the Trainer costs beyond the model: batches held, collectives, host syncs. Counted, not timed."""

import pytest
from heads import collate
from ranks import run_ranks
from torch.profiler import profile
from trainer_cases import LAYOUTS, train
from transformers import Trainer

from hf_gradutils import GradUtilsTrainer


def run(function, layout, *args):
    num_ranks = LAYOUTS[layout].num_ranks
    return [function(layout, *args)] if num_ranks == 1 else run_ranks(function, num_ranks, layout, *args)


@pytest.mark.parametrize("layout", ["1 rank", "ddp2"])
@pytest.mark.parametrize("trainer_class", [GradUtilsTrainer, Trainer])
def test_micro_batches_are_fetched_one_ahead_and_not_all_at_once(trainer_class, layout):
    ahead = run(_largest_look_ahead, layout, trainer_class is Trainer)
    assert ahead == ([7] if trainer_class is Trainer else [1]) * len(ahead), "the stock Trainer is the control"


def _largest_look_ahead(layout, is_stock):
    num_fetched, num_trained, ahead = 0, 0, []

    def counting_collate(rows):
        nonlocal num_fetched
        num_fetched += 1
        return collate(rows)

    class Counting(Trainer if is_stock else GradUtilsTrainer):
        def training_step(self, *args, **kwargs):
            nonlocal num_trained
            num_trained += 1
            ahead.append(num_fetched - num_trained)
            return super().training_step(*args, **kwargs)

    train("bert classes", 8, trainer_class=Counting, data_collator=counting_collate)
    assert num_trained == 8
    return max(ahead)


@pytest.mark.parametrize("accumulation", [1, 8])
def test_a_step_costs_one_all_reduce_besides_the_models_own(accumulation):
    counts = run_ranks(_all_reduces_per_step, 2, accumulation)
    assert counts == [(2, 0)] * 2, "one bucket of DDP and ours; nothing else"


def _all_reduces_per_step(accumulation):
    seen = []
    for max_steps in (3, 5):
        arguments = {"max_steps": max_steps, "logging_strategy": "no"}
        arguments |= {"ddp_find_unused_parameters": False, "max_grad_norm": 1.0}
        with profile() as profiler:
            train("t5 seq2seq", accumulation, arguments=arguments)
        names = [event.name for event in profiler.events() if event.name.startswith("gloo:")]
        seen.append((names.count("gloo:all_reduce"), len(names) - names.count("gloo:all_reduce")))
    (fewer, fewer_others), (more, more_others) = seen
    return (more - fewer) / 2, (more_others - fewer_others) / 2


def test_micro_batches_cost_no_host_sync():
    assert _syncs_per_micro_batch(GradUtilsTrainer) == 0
    assert _syncs_per_micro_batch(Trainer) == 2, "the control: its filter of non-finite losses asks twice"


def _syncs_per_micro_batch(trainer_class):
    short, long = (_syncs(trainer_class, n, 5) - _syncs(trainer_class, n, 3) for n in (1, 8))
    return (long - short) / (2 * 7)


def _syncs(trainer_class, accumulation, max_steps):
    """``item()``, ``bool()`` and their like; a plain module has none of its own."""
    arguments = {"max_steps": max_steps, "logging_strategy": "no", "max_grad_norm": 1.0}
    with profile() as profiler:
        train("plain module", accumulation, trainer_class=trainer_class, arguments=arguments)
    return sum(event.name == "aten::_local_scalar_dense" for event in profiler.events())
