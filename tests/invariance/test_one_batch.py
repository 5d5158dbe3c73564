"""A collator that draws random numbers, such as masks, is compared: it draws once, and its batch is cut."""

import torch
from transformers import BatchEncoding, Trainer

from hf_gradutils import GradUtilsTrainer
from hf_gradutils.invariance._one_batch import alike, can_be_cut, cut
from tests.harness.heads import HEADS
from tests.harness.layouts import on_layouts
from tests.invariance import planted
from tests.invariance.checks import HEAD, LAYOUT, TRAINING, of, report_of


def masks(rows):
    """Leaves out targets at random, as for a masked language model."""
    batch = HEADS[HEAD].collate(rows)
    leave_out = torch.rand(batch["labels"].shape) < 0.4
    leave_out[:, 1] = False
    batch["labels"] = batch["labels"].masked_fill(leave_out, -100)
    return BatchEncoding(batch)


def masks_and_counts(rows):
    """With a number that depends on the rows, of which that of a part is unknown."""
    batch = masks(rows)
    batch["labels_kept"] = int((batch["labels"] != -100).sum())
    return batch


class WithoutCount:
    def compute_loss(self, model, inputs, *args, **kwargs):
        return super().compute_loss(model, {n: x for n, x in inputs.items() if n != "labels_kept"}, *args, **kwargs)


@on_layouts("one_rank", "ddp2")
def test_a_collator_that_draws_is_compared(layout):
    for kind in (Trainer, GradUtilsTrainer):
        report = report_of(kind, layout=layout, data_collator=masks)
        assert report.passed, str(report)
        assert [row.not_compared for row in report.comparisons] == [""] * 4
        assert report.comparisons[LAYOUT].gradient_error < 2e-6
    wrong = report_of(of(planted.OwnMean, planted.MeansAreDivided, Trainer), layout=layout, data_collator=masks)
    assert wrong.verdict == "FAILED", str(wrong)
    unknown = report_of(of(WithoutCount, Trainer), layout=layout, data_collator=masks_and_counts)
    assert unknown.verdict == "NOT COMPARED"  # control: with a batch that cannot be cut, as before
    assert "differs between two equal runs" in unknown.comparisons[TRAINING].not_compared


def test_batches_are_cut_between_rows():
    batch = BatchEncoding({"ids": torch.arange(12).view(4, 3), "words": ["a", "b", "c", "d"], "return_loss": True})
    one = BatchEncoding({"ids": torch.arange(3).view(1, 3), "words": ["a"], "return_loss": True})
    assert can_be_cut(batch, 4, one)
    part = cut(batch, 4, 1, 3)
    assert isinstance(part, BatchEncoding)
    assert part["ids"].tolist() == [[3, 4, 5], [6, 7, 8]]
    assert (part["words"], part["return_loss"]) == (["b", "c"], True)
    part["ids"].zero_()
    part.pop("words")
    assert batch["ids"][1].tolist() == [3, 4, 5]
    assert batch["words"] == ["a", "b", "c", "d"]
    assert not can_be_cut({"ids": torch.zeros(1, 12)}, 4, {"ids": torch.zeros(1, 3)})
    assert not can_be_cut(dict(batch) | {"num": torch.tensor(4)}, 4, dict(one) | {"num": torch.tensor(1)})
    assert not can_be_cut(torch.zeros(4, 3), 4, torch.zeros(1, 3))


def test_batches_are_alike_if_their_contents_are():
    batch = {"ids": torch.arange(4), "spans": [(0, 1), (1, 2)], "tag": "x"}
    assert alike(batch, {"ids": torch.arange(4), "spans": [(0, 1), (1, 2)], "tag": "x"})
    for other in ({"ids": torch.arange(4) + 1}, {"spans": [(0, 1), (1, 3)]}, {"tag": "y"}, {"more": 1}):
        assert not alike(batch, batch | other)


def test_an_entry_of_as_many_numbers_as_rows_is_not_cut():
    weights = torch.ones(4)
    batch = {"labels": torch.zeros(4, 3), "weights": weights}
    assert not can_be_cut(batch, 4, {"labels": torch.zeros(1, 3), "weights": weights})
    batch = {"labels": torch.zeros(5, 3), "weights": weights}
    assert can_be_cut(batch, 5, {"labels": torch.zeros(1, 3), "weights": weights})
