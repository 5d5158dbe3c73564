"""No false alarm: stock trainers that are right pass, whatever they are fed with, and an error of one rank ends all."""

import re
from pathlib import Path

import pytest
import torch.distributed as dist
from transformers import Trainer

from hf_gradutils import GradUtilsPlugin, GradUtilsTrainer, GradUtilsTrainerMixin
from hf_gradutils.errors import GradUtilsError, InvarianceError
from tests.harness.heads import HEADS
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import make_data, reset_accelerate
from tests.invariance import data_cases, planted
from tests.invariance.checks import HEAD, LAYOUT, TRAINING, of, report_of, trains_exactly

# ---- Data ----


@on_layouts("one_rank", "ddp2")
def test_any_data_of_a_right_trainer_pass(layout):
    for name, (kind, options) in data_cases.RIGHT.items():
        if layout == "ddp2" and name in ("workers", "by length", "consumes rows"):  # as on one rank
            continue
        report = report_of(kind, layout=layout, num_samples=None, **options)
        assert report.answer.startswith("EXACT"), f"{name}: {report}"
        assert report.comparisons[TRAINING].gradient_error < 2e-6, f"{name}: {report}"
        few = {"few": 7, "a few streamed": 10}.get(name)
        assert (f"(not 16: the dataset has only {few})" in report.what) == (few is not None), report.what


@on_layouts("one_rank", "ddp2")
def test_the_same_data_of_a_wrong_trainer_fail(layout):
    for name, (kind, options) in data_cases.RIGHT.items():
        if name in ("streamed", "few", "noisy", "consumes rows"):
            report = report_of(of(planted.OwnMean, kind), layout=layout, num_samples=None, **options)
            assert report.verdict == "FAILED", f"{name}: {report}"


def test_batches_without_rows_are_not_compared():
    report = report_of(data_cases.LoaderOfBatches)
    assert report.verdict == "NOT COMPARED"
    assert "a DataLoader with a dataset of rows and a collate_fn" in report.answer


# ---- The number of samples ----


def test_samples_are_added_until_each_micro_batch_has_two():
    def samples(accumulation):
        arguments = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 1}
        report = report_of(Trainer, data=make_data(HEAD, 80), num_samples=None, arguments=arguments)
        assert report.passed, str(report)
        return report.num_samples, report.num_micro_batches, report.comparisons[TRAINING].name

    assert samples(1) == (16, 1, "as you train: 1 micro-batch on 1 rank")
    assert samples(12) == (24, 12, "as you train: 12 micro-batches on 1 rank")
    assert samples(40) == (40, 40, "as you train: 40 micro-batches on 1 rank")
    assert samples(70) == (16, 16, "as you train: 16 of your 70 micro-batches on 1 rank")


# ---- The training's own set-up ----


@on_layouts("one_rank", "ddp2")
def test_the_set_up_decides_for_stock_and_every_cut_for_ours(layout):
    num_ranks = dist.get_world_size() if layout == "ddp2" else 1
    alone = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 16 // num_ranks}
    report = report_of(Trainer, "bert classes", layout, arguments=alone)
    if layout == "one_rank":
        assert report.answer.startswith("EXACT: the gradient is that of one batch (1 micro-batch, 1 rank)"), str(report)
        assert "with more the gradient is 8 times what it should be" in " ".join(str(report).split())
        assert "WRONG" not in str(report)
    else:
        assert report.answer == (
            "WRONG: the gradient is 2.0 times what one batch would give: the forward of BertForSequenceClassification "
            "ignores num_items_in_batch"
        )
    report = report_of(Trainer, "bert classes", layout)
    assert report.answer.startswith(f"WRONG: the gradient is {4.0 * num_ranks} times what one batch would give")
    assert report.comparisons[TRAINING].factor == pytest.approx(4 * num_ranks, rel=1e-4)
    assert not report.comparisons[LAYOUT].decides
    assert "to train exactly: hf-gradutils run" in str(report)
    ours = report_of(GradUtilsTrainer, "bert classes", layout)
    assert ours.passed
    assert ours.comparisons[LAYOUT].decides


def test_a_mean_of_means_is_no_factor():
    report = report_of(of(planted.OwnMean, planted.MeansAreDivided, Trainer))
    assert "the mean of the losses of 4 micro-batches is not the loss of one batch" in report.answer
    assert " times what" not in report.answer


# ---- An old pattern ----


def passes(trainer_class, **options):
    """Whether the check passes; a Trainer that is refused does not."""
    try:
        return report_of(trainer_class, **options).passed
    except GradUtilsError:
        return False


@on_layouts("one_rank", "ddp2")
def test_a_step_that_divides_by_the_accumulation_is_right_in_stock_and_exact_or_refused_with_ours(layout):
    for step in (planted.DividesAndGoesBack, planted.DividesByAccumulation):
        old = of(step, planted.MeanOfRows, Trainer)
        report = report_of(old, layout=layout)
        assert report.passed, str(report)
        ours = of(GradUtilsTrainerMixin, old)
        for plugin in (GradUtilsPlugin(), GradUtilsPlugin(loss_unit="rows", check_loss_unit=False)):
            want = planted.gradient_of_rows()
            is_exact = trains_exactly(ours, want, layout, grad_plugin=plugin)
            assert passes(ours, layout=layout, grad_plugin=plugin) == is_exact


# ---- The page ----


def test_the_page_shows_what_its_example_prints(capsys, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "invariance.md").read_text()
    code, shown = page.partition("```python\n")[2].split("```")[0], page.partition("which prints")[2].split("```")[1]
    monkeypatch.chdir(tmp_path)
    reset_accelerate()
    exec(compile(code, "the example", "exec"), {"__name__": "__main__"})
    printed = " ".join(capsys.readouterr().out.split())
    for paragraph in shown.strip().split("\n\n"):
        assert re.sub(r"\d\.\d{4,}", "…", " ".join(paragraph.split())) in re.sub(r"\d\.\d{4,}", "…", printed)
    assert "of BertForTokenClassification" not in printed  # control


# ---- One rank alone ----


def _fails_on_one_rank(rows):
    if dist.get_rank() == 1:
        raise KeyError("audio")
    return HEADS[HEAD].collate(rows)


class _FailsOnFirst(data_cases.Streamed):
    def __iter__(self):
        raise OSError("no such shard")
        yield


@on_layouts("ddp2")
def test_an_error_of_one_rank_is_raised_on_all(layout):
    kind, words = (KeyError, "audio") if dist.get_rank() == 1 else (InvarianceError, "on rank 1: KeyError: 'audio'")
    with pytest.raises(kind, match=words):
        report_of(Trainer, layout=layout, data_collator=_fails_on_one_rank)
    kind = OSError if dist.get_rank() == 0 else InvarianceError
    with pytest.raises(kind, match="no such shard"):
        report_of(Trainer, layout=layout, data=_FailsOnFirst())
    assert report_of(Trainer, layout=layout).passed  # control: the ranks are still in step
