"""DeepSpeed's sequence parallelism (Ulysses): ranks share each row, and gradient and loss are those of one process."""

import copy
import tempfile

import pytest
import torch
import torch.distributed as dist
from accelerate import DeepSpeedPlugin, PartialState
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM, Trainer
from transformers.trainer_pt_utils import LabelSmoother

from hf_gradutils import GradUtilsAccelerator, GradUtilsPlugin, GradUtilsTrainer
from hf_gradutils.errors import InvalidArgumentError, LossUnitError
from tests.harness.deepspeed_cases import config, reference, reset, whole_weights
from tests.harness.gradients import norm_of, relative_error
from tests.harness.heads import HEADS, collate
from tests.harness.ranks import ranks
from tests.harness.trainer_cases import make_model, truth, warnings_of
from tests.harness.ulysses_cases import (
    HEAD,
    IN_ORDER,
    LENGTH,
    SIZE,
    make_rows,
    sharing_config,
    sharing_rows,
    train_shards,
)

pytest.importorskip("deepspeed")
pytest.importorskip("deepspeed.runtime.zero.muon.original_muon")  # loads the compiler: once, and not in every rank

TOLERANCE = 1e-5


def assert_exact(done, want, loss, data=None):
    entry = done.log[0]
    assert relative_error(done.change, want) < TOLERANCE
    assert entry["loss"] == pytest.approx(loss, rel=TOLERANCE)
    if entry["grad_norm"]:
        assert entry["grad_norm"] == pytest.approx(norm_of(want), rel=TOLERANCE)
    assert entry["num_targets"] == num_targets(make_rows() if data is None else data)


def num_targets(rows):
    return sum(int(row["labels"][1:].ne(-100).sum()) for row in rows)


def divisor(done):
    return done.trainer.accelerator.windows.engine.num_averaged


# ---- Exact at every stage ----


@ranks(2)
def test_two_ranks_that_share_rows_take_the_step_of_one():
    want = truth(HEAD, make_rows())
    for stage, num_averaged in ((0, 1), (1, 1), (2, 1), (3, 2)):
        for accumulation in (1, 4):
            done = train_shards(stage, accumulation)
            assert_exact(done, *want)
            assert divisor(done) == num_averaged, stage


@ranks(4)
def test_two_groups_of_two_ranks_take_the_step_of_one():
    want = truth(HEAD, make_rows())
    for stage, num_averaged in ((1, 2), (2, 2), (3, 4)):
        done = train_shards(stage, 2)
        assert_exact(done, *want)
        assert divisor(done) == num_averaged, stage


@ranks(2)
def test_control_stock_takes_the_mean_of_means_and_sp_size_times_that_below_stage_3():
    want, want_loss = truth(HEAD, make_rows())
    means = [truth(HEAD, make_rows()[start : start + 4]) for start in (0, 4, 8, 12)]
    mean = {name: sum(gradient[name] for gradient, _ in means) / 4 for name in want}
    assert relative_error(mean, want) > 0.1
    for stage, factor in ((1, SIZE), (3, 1)):
        stock = train_shards(stage, 4, trainer_class=Trainer, arguments=IN_ORDER)
        assert relative_error(stock.change, {name: factor * g for name, g in mean.items()}) < TOLERANCE
        assert stock.log[0]["loss"] == pytest.approx(sum(loss for _, loss in means) / 4, rel=TOLERANCE)
        assert stock.log[0]["loss"] != pytest.approx(want_loss, rel=1e-3)


@ranks(2)
def test_the_engine_divides_by_what_we_think_however_it_reduces():
    want = truth(HEAD, make_rows())
    all_reduces = {"reduce_scatter": False}
    by_parts = {"contiguous_gradients": False}
    for stage, settings, num_averaged in (
        (1, {"zero": all_reduces}, 1),
        (1, {"prescale_gradients": True}, 1),
        (2, {"zero": {"overlap_comm": True} | by_parts}, 1),
        (3, {"zero": {"overlap_comm": True}}, 2),
        (3, {"zero": all_reduces}, 1),
        (3, {"zero": all_reduces | by_parts}, 2),
    ):
        done = train_shards(stage, 2, settings=settings)
        assert_exact(done, *want)
        assert divisor(done) == num_averaged, (stage, settings)
    with pytest.raises(InvalidArgumentError, match="by another number than others"):
        train_shards(3, 2, settings={"zero": all_reduces | {"reduce_bucket_size": 400}})


# ---- Data ----


@ranks(2)
def test_shards_without_targets_count_for_nothing():
    rows = make_rows(prompt=LENGTH // SIZE + 1)  # the first rank has no target at all
    for row in rows[:4]:
        row["labels"][:] = -100  # and the second none in the first micro-batch
    for row in rows[4:]:
        row["labels"][LENGTH // SIZE + 1 :] = row["input_ids"][LENGTH // SIZE + 1 :]
    rows[7]["labels"][-3:] = -100
    for stage in (1, 3):
        done = train_shards(stage, 4, data=rows, arguments=IN_ORDER)
        assert_exact(done, *truth(HEAD, rows), rows)


@ranks(2)
def test_epochs_end_with_a_short_window_and_begin_anew():
    rows = make_rows(12)
    windows = [rows[:8], rows[8:]] * 2
    want, losses, norms = reference(HEAD, windows, rate=0.5)
    for stage in (1, 3):
        arguments = IN_ORDER | {
            "per_device_train_batch_size": 2,
            "max_steps": -1,
            "num_train_epochs": 2,
            "learning_rate": 0.5,
        }
        done = train_shards(stage, 4, data=rows, arguments=arguments)
        assert done.trainer.state.global_step == 4
        assert relative_error(done.change, want) < TOLERANCE
        assert [entry["loss"] for entry in done.log[:4]] == pytest.approx(losses, rel=TOLERANCE)
        assert [entry["grad_norm"] for entry in done.log[:4]] == pytest.approx(norms, rel=TOLERANCE)
        assert [entry["num_targets"] for entry in done.log[:4]] == [num_targets(window) for window in windows]


@ranks(4)
def test_a_group_that_has_run_out_of_rows_repeats_some_for_nothing():
    rows = make_rows(12)  # of the 6 batches the ranks of the first group have 2 each, those of the second one each
    arguments = IN_ORDER | {
        "per_device_train_batch_size": 2,
        "accelerator_config": {"even_batches": False},
    }
    done = train_shards(1, 4, data=rows, arguments=arguments)
    assert_exact(done, *truth(HEAD, rows), rows)


@ranks(2)
def test_ranks_that_share_rows_need_equally_many_batches():
    arguments = {"per_device_train_batch_size": 2, "accelerator_config": {"even_batches": False}}
    with pytest.raises(InvalidArgumentError, match=r"equally many batches, got \[2, 1\]"):
        train_shards(1, 1, data=make_rows(6), arguments=arguments)


@ranks(2)
def test_one_row_in_a_batch_is_checked_on_rows_of_the_data_set():
    with warnings_of("hf_gradutils.loss_unit") as said:
        done = train_shards(1, 16)
    assert_exact(done, *truth(HEAD, make_rows()))
    assert said == []


@ranks(2)
def test_evaluation_counts_each_row_once():
    rows = make_rows(7, seed=8)
    arguments = {"learning_rate": 0.0, "per_device_eval_batch_size": 2}
    for stage in (1, 3):
        done = train_shards(stage, 2, arguments=arguments, eval_dataset=rows, evaluates=True)
        assert done.evaluation["eval_loss"] == pytest.approx(truth(HEAD, rows)[1], rel=TOLERANCE)


def refused(rows, match, **kwargs):
    with pytest.raises(InvalidArgumentError, match=match):
        train_shards(1, 1, data=rows, **kwargs)


@ranks(2)
def test_rows_that_attention_would_see_otherwise_are_refused():
    left, packed, classes = make_rows(), make_rows(), make_rows()
    for row in left:
        row["attention_mask"][0] = 0
    refused(left, "pad rows on the right")
    for row in packed:
        row["position_ids"] = torch.arange(LENGTH) % 5
        row["labels"][-1] = 7
    refused(packed, "position_ids start anew within a row")
    for row in classes:
        row["labels"] = torch.tensor(1)
    refused(classes, "one class for each token", model=HEADS["llama classes"].build())
    refused(make_rows(), "must have the 16 rows", data_collator=lambda rows: collate(rows[1:]))
    padded = make_rows()
    for row in padded:
        row["labels"][9:] = -100
        row["attention_mask"][9:] = 0
        row["position_ids"][9:] = 1
    assert_exact(train_shards(1, 2, data=padded), *truth(HEAD, padded), padded)


@ranks(2)
def test_a_window_of_attention_shorter_than_the_row_is_refused():
    torch.manual_seed(11)
    refused(make_rows(), "attend to 8 tokens", model=windowed_model())


def windowed_model():
    from transformers import MistralConfig, MistralForCausalLM

    from tests.harness import head_configs

    return MistralForCausalLM(MistralConfig(**copy.deepcopy(head_configs.LLAMA), sliding_window=8))


@ranks(2)
def test_a_checkpoint_in_the_middle_of_an_epoch_is_refused():
    with tempfile.TemporaryDirectory() as own_folder:
        folders = [own_folder]
        dist.broadcast_object_list(folders)
        arguments = {"output_dir": folders[0], "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
        train_shards(1, 2, arguments=arguments | {"per_device_train_batch_size": 4})
        dist.barrier()
        arguments |= {"per_device_train_batch_size": 4, "max_steps": 2}
        with pytest.raises(InvalidArgumentError, match="ignore_data_skip"):
            train_shards(1, 2, arguments=arguments, resume=f"{folders[0]}/checkpoint-1")
        dist.barrier()


# ---- Accelerator ----


def loop(stage, rows, num_steps):
    """A loop of accelerate's over one window; the weights' change, the report, and which shard ends the loader."""
    reset()
    PartialState(cpu=True)
    accelerator = GradUtilsAccelerator(
        deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config(stage, gradient_clipping=0.0)),
        parallelism_config=sharing_config(),
        gradient_accumulation_plugin=GradUtilsPlugin(num_steps=num_steps),
    )
    model = make_model(HEAD)
    before = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    loader = DataLoader(rows, len(rows) // num_steps, collate_fn=collate)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0), loader)
    ends = [accelerator.gradient_state.end_of_dataloader for _ in range(2) for _ in loader]
    shards = [{name: value.contiguous() for name, value in shard.items()} for shard in loader]
    numbers = [shard["shift_labels"].ne(-100).sum() for shard in shards]
    accelerator.start_window(sum(numbers), model=model)
    for shard, number in zip(shards, numbers, strict=True):
        with accelerator.accumulate(model):
            shard["shift_labels"][0, -1].masked_fill_(number == 0, 0)  # the mean over nothing is no number
            loss = model(**shard, labels=shard["shift_labels"]).loss
            accelerator.backward(loss, number)
            optimizer.step()
            optimizer.zero_grad()
    after = whole_weights(model.module)
    return {name: before[name] - after[name] for name in after}, accelerator.report, ends


@ranks(2)
def test_a_loop_of_accelerates_takes_the_step_of_one_process():
    want, want_loss = truth(HEAD, make_rows())
    for stage in (1, 3):
        with sharing_rows():
            got, report, ends = loop(stage, make_rows(), 4)
        assert relative_error(got, want) < TOLERANCE
        assert report.loss.item() == pytest.approx(want_loss, rel=TOLERANCE)
        assert report.grad_norm.item() == pytest.approx(norm_of(want), rel=TOLERANCE)
        assert ends == [False, False, False, True] * 2


# ---- Losses ----


def smoothed_truth(rows):
    """Label smoothing in one process and one batch, in float64."""
    model, batch = make_model(HEAD).double(), collate(rows)
    labels = batch.pop("labels")
    loss = LabelSmoother(epsilon=0.3)(model(**batch), labels, shift_labels=True)
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, loss.item()


class Calling(GradUtilsTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return (loss[0] * 3, *loss[1:]) if isinstance(loss, tuple) else loss * 3


class OfItsOwn(GradUtilsTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.get("shift_labels")
        outputs = model(**{name: value for name, value in inputs.items() if "labels" not in name})
        loss = cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
        return (loss, outputs) if return_outputs else loss


class OverTheGroup(GradUtilsTrainer):
    """As accelerate's guide to sequence parallelism has it: the mean over the targets of all shards."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs)
        number = inputs["shift_labels"].ne(-100).sum().to(loss.dtype)
        losses, numbers = (
            torch.stack(list(torch.distributed.nn.functional.all_gather(value))) for value in (loss, number)
        )
        return (losses * numbers).nan_to_num().sum() / numbers.sum()


class Unshifted(LlamaForCausalLM):
    """As the head of a masked language model, labels are those of their own positions."""

    def forward(self, input_ids, labels=None, **kwargs):
        shift_labels = kwargs.pop("shift_labels", None)
        outputs = super().forward(input_ids, **kwargs)
        labels = labels if shift_labels is None else shift_labels
        if labels is not None:
            outputs["loss"] = cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
        return outputs


class ShiftingAlways(LlamaForCausalLM):
    """Takes no notice of ``shift_labels``."""

    def forward(self, input_ids, labels=None, shift_labels=None, **kwargs):
        return super().forward(input_ids, labels=labels, **kwargs)


@ranks(2)
def test_label_smoothing_is_that_of_one_process():
    done = train_shards(1, 4, arguments={"label_smoothing_factor": 0.3})
    assert_exact(done, *smoothed_truth(make_rows()))


@ranks(2)
def test_losses_of_the_users_own_are_means_over_their_shard():
    want, loss = truth(HEAD, make_rows())
    assert_exact(train_shards(1, 4, trainer_class=OfItsOwn), want, loss)
    done = train_shards(3, 4, trainer_class=Calling)
    assert_exact(done, {name: 3 * gradient for name, gradient in want.items()}, 3 * loss)


@ranks(2)
def test_losses_that_shards_cannot_have_are_refused_before_the_first_step():
    with pytest.raises(LossUnitError, match="not a mean over the targets counted"):
        train_shards(1, 4, trainer_class=OverTheGroup)
    rows = make_rows()
    refused(rows, "override compute_loss", compute_loss_func=lambda outputs, labels, num_items_in_batch: outputs.loss)
    refused(rows, "loss_unit='rows'", grad_plugin=GradUtilsPlugin(loss_unit="rows"))
    for model_class, match in ((Unshifted, "does not shift its labels"), (ShiftingAlways, "not take shift_labels")):
        model = make_model(HEAD)
        model.__class__ = model_class
        refused(rows, match, model=model)
