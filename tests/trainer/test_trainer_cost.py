"""What a step of the Trainer costs beyond the model: batches held, collectives, host syncs. Counted, not timed."""

import sys
from collections import Counter

import pytest
import torch.distributed as dist
from torch.profiler import profile
from transformers import Trainer

from hf_gradutils import GradUtilsTrainer, WholeBatchLoss
from hf_gradutils.accelerator import GradUtilsPlugin
from hf_gradutils.gradients import partial_sums
from tests.harness.counting import Reads
from tests.harness.heads import collate
from tests.harness.layouts import on_layouts
from tests.harness.ranks import ranks
from tests.harness.trainer_cases import make_data, train


@on_layouts("one_rank", "ddp2")
@pytest.mark.parametrize("trainer_class", [GradUtilsTrainer, Trainer])
def test_micro_batches_are_fetched_one_ahead_and_not_all_at_once(trainer_class, layout):
    num_fetched, num_trained, ahead = 0, 0, []

    def counting_collate(rows):
        nonlocal num_fetched
        num_fetched += 1
        return collate(rows)

    class Counting(trainer_class):
        def training_step(self, *args, **kwargs):
            nonlocal num_trained
            num_trained += 1
            ahead.append(num_fetched - num_trained)
            return super().training_step(*args, **kwargs)

    plugin = GradUtilsPlugin(check_loss_unit=False, counts="streamed")  # an own step would have them counted first
    options = {"grad_plugin": plugin} if trainer_class is GradUtilsTrainer else {}
    train("bert classes", 8, trainer_class=Counting, data_collator=counting_collate, **options)
    assert num_trained == 8
    assert max(ahead) == (7 if trainer_class is Trainer else 1), "the stock Trainer is the control"


@on_layouts("ddp2", "fsdp2x2", "hsdp2x2", "native_fsdp2x2", "tp2", "tp2_fsdp2x2", "ep2_fsdp2x2")
def test_a_step_costs_one_all_reduce_of_ours_however_many_micro_batches_it_has(layout):
    for accumulation in (1, 8):
        short, long = (_collectives_of_ours(layout, accumulation, max_steps) for max_steps in (3, 5))
        per_step = {name: (long[name] - short[name]) / 2 for name in long if long[name] != short[name]}
        assert per_step == {"all_reduce": 1.0}, accumulation


NAMES = ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast", "barrier", "reduce")


def _collectives_of_ours(layout, accumulation, max_steps, head=None, **kwargs):
    """Calls of torch.distributed from this package; the hooks of tensor parallelism are the model's own."""
    counts = Counter()
    originals = {name: getattr(dist, name) for name in NAMES}

    def counting(name):
        def call(*args, **kwargs):
            caller = sys._getframe(1).f_globals["__name__"]
            counts[name] += caller.startswith("hf_gradutils.") and caller != partial_sums.__name__
            return originals[name](*args, **kwargs)

        return call

    for name in NAMES:
        setattr(dist, name, counting(name))
    try:
        arguments = {"max_steps": max_steps, "logging_strategy": "no", "max_grad_norm": 1.0}
        arguments |= {"optim": "adamw_torch_fused"}
        plugin = GradUtilsPlugin(grad_norm_groups="layer")
        head = head or ("mixtral moe" if layout.startswith("ep2") else "qwen3 causal")
        train(head, accumulation, layout=layout, arguments=arguments, grad_plugin=plugin, **kwargs)
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return counts


@ranks(2)
def test_ddp_communicates_once_a_window_besides():
    seen = []
    for max_steps in (3, 5):
        arguments = {"max_steps": max_steps, "logging_strategy": "no"}
        arguments |= {"ddp_find_unused_parameters": False, "max_grad_norm": 1.0}
        with profile() as profiler:
            train("plain module", 8, arguments=arguments)
        names = [event.name for event in profiler.events() if event.name.startswith("gloo:")]
        seen.append((names.count("gloo:all_reduce"), len(names) - names.count("gloo:all_reduce")))
    (fewer, fewer_others), (more, more_others) = seen
    assert (more - fewer) / 2 == 2, "one bucket of DDP and ours"
    assert more_others == fewer_others, "nothing else"


@pytest.mark.parametrize(
    ("optimizer", "on_nonfinite", "want"),
    [
        ("adamw_torch_fused", "raise", 0),  # skips on the device; the flag is read a step later
        ("adamw_torch_fused", "skip", 1),  # the scheduler has to know
        ("sgd", "raise", 1),
        ("sgd", "ignore", 0),
    ],
)
def test_a_step_costs_at_most_the_one_flag_that_the_optimizer_cannot_read_itself(optimizer, on_nonfinite, want):
    options = {"optimizer": optimizer, "grad_plugin": GradUtilsPlugin(on_nonfinite=on_nonfinite)}
    assert (_syncs(GradUtilsTrainer, 1, 5, **options) - _syncs(GradUtilsTrainer, 1, 3, **options)) / 2 == want


def test_micro_batches_cost_no_host_sync():
    assert _syncs_per_micro_batch(GradUtilsTrainer) == 0
    assert _syncs_per_micro_batch(Trainer) == 2, "the control: its filter of non-finite losses asks twice"


def _syncs_per_micro_batch(trainer_class):
    short, long = (_syncs(trainer_class, n, 5) - _syncs(trainer_class, n, 3) for n in (1, 8))
    return (long - short) / (2 * 7)


def _num_ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def _syncs(trainer_class, accumulation, max_steps, optimizer="sgd", **kwargs):
    """Of so many steps within an epoch; a plain module has none of its own."""
    data = make_data("plain module", 16 * 6)
    arguments = {"max_steps": max_steps, "logging_strategy": "no", "max_grad_norm": 1.0, "optim": optimizer}
    arguments |= {"per_device_train_batch_size": 16 // (accumulation * _num_ranks())}
    with Reads() as reads:
        train("plain module", accumulation, trainer_class=trainer_class, data=data, arguments=arguments, **kwargs)
    return reads.count


# ---- Losses of the whole batch ----


def _compare_rows(rows, scale):
    return scale.sum() + (rows @ rows.T).logsumexp(-1).mean()


WHOLE_BATCH = WholeBatchLoss(
    embed=lambda model, batch: model(**batch)["logits"].mean(1),
    loss=_compare_rows,
    parameters=lambda model: (model.head.bias,),
)


@on_layouts("ddp2", "fsdp2x2")
def test_two_passes_cost_two_gathers_and_an_all_reduce_a_window_however_many_micro_batches_it_has(layout):
    for accumulation in (1, 8):
        first, short, long = (
            _collectives_of_ours(layout, accumulation, n, "plain module", whole_batch_loss=WHOLE_BATCH)
            for n in (1, 3, 5)
        )
        per_step = {name: (long[name] - short[name]) / 2 for name in long if long[name] != short[name]}
        assert per_step == {"all_gather": 2.0, "all_reduce": 2.0}, "the rows; the counts at both ends of a window"
        assert first["all_reduce"] >= 2 + accumulation, "the first window compares the passes of each micro-batch"


@on_layouts("one_rank", "ddp2")
def test_two_passes_wait_for_the_sizes_of_other_ranks_rows_alone(layout):
    options = {"grad_plugin": GradUtilsPlugin(on_nonfinite="ignore"), "whole_batch_loss": WHOLE_BATCH}
    counts = {(n, steps): _syncs(GradUtilsTrainer, n, steps, **options) for n in (1, 8) for steps in (1, 3, 5)}
    for accumulation in (1, 8):
        per_step = (counts[accumulation, 5] - counts[accumulation, 3]) / 2
        assert per_step == (_num_ranks() > 1)
    assert counts[8, 1] - counts[1, 1] >= 7, "the control: the first window compares the passes of each micro-batch"
