"""Trainers of sentence-transformers: stock ones that are right pass on any number of ranks, and the check ends."""

import pytest
import torch.distributed as dist
from datasets import Dataset, DatasetDict

from hf_gradutils import check_invariance
from tests.harness.layouts import on_layouts
from tests.harness.sentence_cases import MARKS, ExactSentences, losses, make_model, make_trainer, pairs, scored, st
from tests.invariance import sentence_kinds
from tests.invariance.checks import LAYOUT, TRAINING

pytestmark = [
    *MARKS,
    pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning"),
]
RIGHT = ("cosine", "softmax", "triplet", "mse", "matryoshka cosine", "adaptive cosine")
FEW = ("cosine", "softmax", "mnr", "cosent")
WHOLE = ("mnr", "mnr gathered", "cosent", "online contrastive", "batch hard")


def _num_ranks():
    return dist.get_world_size() if dist.is_initialized() else 1


def _check(name, kind, accumulation=4):
    return check_invariance(make_trainer(name, kind, accumulation, num_ranks=_num_ranks()), num_samples=8)


@on_layouts("one_rank", "ddp2")
def test_stock_means_over_rows_pass_and_losses_of_the_whole_batch_fail(layout):
    for name in RIGHT if layout == "one_rank" else FEW[:2]:
        report = _check(name, st.SentenceTransformerTrainer)
        assert report.answer.startswith("EXACT"), f"{name}: {report}"
        assert report.comparisons[LAYOUT].gradient_error < 5e-6, f"{name}: {report}"
    for name in WHOLE if layout == "one_rank" else FEW[2:]:
        report = _check(name, st.SentenceTransformerTrainer)
        assert report.answer.startswith("WRONG: the gradient is"), f"{name}: {report}"
        assert report.answer.endswith("is a loss of the whole batch"), report.answer
        assert report.comparisons[TRAINING].gradient_error > 1e-2, str(report)


def test_without_accumulation_a_loss_of_the_whole_batch_is_right():
    report = _check("mnr", st.SentenceTransformerTrainer, 1)
    assert report.passed, str(report)
    assert "with more the gradient is 0 times" in str(report)  # a single row has no negatives


def test_a_loss_that_shares_parameters_with_the_model_trains_the_copy_only():
    report = _check("auto encoder", ExactSentences)
    assert report.passed, str(report)
    assert report.comparisons[TRAINING].gradient_error < 5e-6
    assert _check("auto encoder", st.SentenceTransformerTrainer).verdict == "FAILED"  # means over other tokens


def test_gradients_of_parameters_of_a_loss_are_put_back():
    trainer = make_trainer("softmax", st.SentenceTransformerTrainer, 4)
    assert check_invariance(trainer).passed
    assert [p.grad for p in trainer.loss.parameters()] == [None] * len(list(trainer.loss.parameters()))


def test_of_several_datasets_the_row_says_that_one_is_checked():
    model = make_model()
    right, whole = losses.CosineSimilarityLoss(model), losses.MultipleNegativesRankingLoss(model)
    data = {"scored": Dataset.from_list(scored()), "pairs": Dataset.from_list(pairs())}
    for names, verdict in ((("scored", "pairs"), "passed"), (("pairs", "scored"), "FAILED")):
        rows = DatasetDict({name: data[name] for name in names})
        loss = {"scored": right, "pairs": whole}
        options = {"model": model, "loss": loss, "rows": rows}
        report = check_invariance(make_trainer("cosine", st.SentenceTransformerTrainer, 4, **options))
        assert report.verdict == verdict, str(report)
        assert report.comparisons[TRAINING].name.startswith("as you train (the first of 2 datasets): 4 micro-batches")


@on_layouts("one_rank", "ddp2")
def test_cross_encoders_end_and_pass(layout):
    for loss in ("BinaryCrossEntropyLoss", "CrossEntropyLoss"):
        trainer = sentence_kinds.make_cross(loss, 4, _num_ranks())
        report = check_invariance(trainer)
        assert report.answer.startswith("EXACT"), f"{loss}: {report}"
        assert report.comparisons[LAYOUT].gradient_error < 2e-6, f"{loss}: {report}"
        assert getattr(trainer.loss.model, "module", trainer.loss.model) is trainer.model
    wrong = sentence_kinds.make_cross("BinaryCrossEntropyLoss", 4, _num_ranks())
    wrong.loss_is_scaled_for_ga = True  # so that nothing divides by the number of micro-batches
    assert "the gradient is 4.0 times what one batch would give" in check_invariance(wrong).answer


@on_layouts("one_rank", "ddp2")
def test_a_regularizer_over_the_batch_is_found_though_its_weight_is_zero_at_first(layout):
    report = check_invariance(sentence_kinds.make_sparse(4, _num_ranks()))
    assert report.answer.endswith("SpladeLoss is a loss of the whole batch"), str(report)
    assert report.comparisons[TRAINING].gradient_error > 1e-4, str(report)
    if layout == "one_rank":
        assert check_invariance(sentence_kinds.make_sparse(1)).passed
