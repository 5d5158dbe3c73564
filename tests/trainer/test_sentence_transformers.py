"""The losses of sentence-transformers: each in micro-batches and on ranks, against one process with the whole batch."""

import importlib
import inspect

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset, DatasetDict
from transformers import TrainerCallback

from hf_gradutils import GradUtilsPlugin, check_invariance
from hf_gradutils.errors import LossUnitError
from hf_gradutils.targets.sentence_losses import KINDS, WRAPPERS, kind_of, losses_of
from hf_gradutils.upstream import sentence_transformers as upstream
from tests.harness.gradients import norm_of, relative_error
from tests.harness.ranks import ranks
from tests.harness.sentence_cases import (
    CASES,
    MARKS,
    Case,
    Exact,
    Stock,
    binary,
    gradients_of,
    losses,
    make_model,
    make_trainer,
    pairs,
    scored,
    st,
    stock_loss,
    train,
    truth,
)

pytestmark = MARKS
TOLERANCE = 1e-5

FEW = ("mnr negatives", "cached mnr", "cached gist", "matryoshka gist", "softmax", "2d drawn")
"""Losses whose test is never left out: they take all the ways there are."""


def _is_exact(name, accumulation=4, **kwargs):
    want, loss = truth(name)
    gradients, logged = train(name, Exact, accumulation, **kwargs)
    assert relative_error(gradients, want) < TOLERANCE, name
    assert logged == pytest.approx(loss, rel=TOLERANCE), name


@pytest.mark.parametrize("name", FEW)
def test_micro_batches_give_the_gradient_of_the_whole_batch(name):
    _is_exact(name)


@pytest.mark.wide
@pytest.mark.parametrize("name", sorted(set(CASES) - set(FEW)))
def test_every_loss_gives_the_gradient_of_the_whole_batch(name):
    _is_exact(name)


@pytest.mark.parametrize("name", ["mnr", "cosent"])
def test_stock_micro_batches_are_another_loss(name):
    want, loss = truth(name)
    gradients, logged = train(name, Stock, 4)
    assert relative_error(gradients, want) > 0.1
    assert logged < 0.7 * loss


# ---- Ranks ----


@ranks(2)
def test_two_ranks_give_the_gradient_of_the_whole_batch():
    want, loss = truth("mnr negatives")
    for accumulation in (1, 4):
        _is_exact("mnr negatives", accumulation, num_ranks=2)
        gradients, logged = train("mnr negatives", Stock, accumulation, num_ranks=2)
        assert relative_error(gradients, want) > 0.05, "each rank has its own negatives"
        assert logged < 0.95 * loss
    for name in ("mnr gathered", "cached gist"):
        _is_exact(name, num_ranks=2)


@ranks(2)
def test_two_ranks_average_what_is_outside_of_the_wrapped_model():
    """Parameters of a loss, and models that it keeps under other names: the stock trainer leaves both alone."""
    for name in ("softmax", "batch hard", "tension"):
        _is_exact(name, num_ranks=2)
        assert relative_error(train(name, Stock, num_ranks=2)[0], truth(name)[0]) > 0.3, name


@ranks(2)
def test_two_ranks_may_have_batches_of_different_data_sets():
    trainer, want, loss = _train_on_two_data_sets(num_ranks=2)
    assert relative_error(trainer.seen, want) < TOLERANCE
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=TOLERANCE)
    mine = torch.tensor([len(trainer.data_sets)])
    dist.all_reduce(mine, op=dist.ReduceOp.MIN)
    assert mine == 1, "a rank has seen one data set only"


# ---- Several data sets ----


class _NotesDataSets(Exact):
    data_sets = frozenset()

    def training_step(self, model, inputs, *args):
        self.data_sets |= {inputs["dataset_name"]}
        return super().training_step(model, inputs, *args)


def _train_on_two_data_sets(num_ranks=1):
    rows = {"a": pairs()[:12], "b": scored()[:4]}

    def both(model):
        return {"a": losses.MultipleNegativesRankingLoss(model), "b": losses.CosineSimilarityLoss(model)}

    model = make_model().double()
    loss = sum(len(rows[name]) / 16 * stock_loss(model, one, rows[name]) for name, one in both(model).items())
    loss.backward()
    model_of_trainer = make_model()
    trainer = make_trainer(
        "mnr",
        _NotesDataSets,
        4 // num_ranks,
        num_ranks=num_ranks,
        rows=DatasetDict({name: Dataset.from_list(own) for name, own in rows.items()}),
        model=model_of_trainer,
        loss=both(model_of_trainer),
        arguments={"multi_dataset_batch_sampler": "proportional"},
    )
    trainer.train()
    return trainer, gradients_of(model, torch.nn.Identity()), loss.item()


def test_each_data_set_has_a_loss_of_its_own_rows():
    trainer, want, loss = _train_on_two_data_sets()
    assert relative_error(trainer.seen, want) < TOLERANCE
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=TOLERANCE)
    assert trainer.data_sets == {"a", "b"}


def test_one_loss_for_several_data_sets_is_refused():
    rows = DatasetDict(a=Dataset.from_list(pairs()[:8]), b=Dataset.from_list(pairs()[8:]))
    with pytest.raises(LossUnitError, match=r"pass loss=\{name: loss\}"):
        make_trainer("mnr", Exact, 4, rows=rows).train()


def test_losses_of_different_units_are_refused():
    model = make_model()
    loss = {"a": losses.ContrastiveTensionLoss(model), "b": losses.CosineSimilarityLoss(model)}
    rows = DatasetDict(a=Dataset.from_list(binary()[:8]), b=Dataset.from_list(scored()[8:]))
    with pytest.raises(LossUnitError, match="have different units"):
        make_trainer("mnr", Exact, 4, rows=rows, model=model, loss=loss).train()


# ---- Trainings ----


def test_a_smaller_last_batch_is_exact():
    rows = pairs()[:13]
    trainer = make_trainer("mnr", Exact, 4, rows=Dataset.from_list(rows))
    trainer.train()
    want, loss = truth("mnr", rows)
    assert relative_error(trainer.seen, want) < TOLERANCE
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=TOLERANCE)


@pytest.mark.parametrize("name", ["softmax", "mnr"])
def test_four_steps_end_where_one_micro_batch_of_the_stock_trainer_ends(name):
    weights = []
    for trainer_class, accumulation in ((Stock, 1), (Exact, 4)):
        arguments = {"max_steps": 4, "learning_rate": 0.1, "max_grad_norm": 0.5}  # which clips the model, not the loss
        trainer = make_trainer(name, trainer_class, accumulation, arguments=arguments)
        before = {key: p.detach().clone() for key, p in trainer.loss.named_parameters()}
        trainer.train()
        assert trainer.state.log_history[0]["grad_norm"] > 0.5
        weights.append({key: p.detach() - before[key] for key, p in trainer.loss.named_parameters()})
    assert relative_error(weights[1], weights[0]) < 1e-4
    assert norm_of(weights[0]) > 0.01


def test_dropout_is_the_same_in_both_passes():
    trainer = make_trainer("mnr", Exact, 4, dropout=0.1)
    trainer.train()
    assert relative_error(trainer.seen, truth("mnr")[0]) > 1e-2, "there was dropout"


def test_components_are_logged_as_those_of_the_whole_batch():
    logs = []
    for trainer_class, accumulation in ((Stock, 1), (Exact, 4)):
        trainer = make_trainer("orthogonal", trainer_class, accumulation)
        trainer.train()
        logs.append(trainer.state.log_history[0])
    for name in ("loss", "gor_mean", "gor_second_moment"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=1e-3), name


class _Scales(TrainerCallback):
    """Changes a loss when a step begins, as the schedule of SPLADE's regularizers does."""

    def __init__(self, loss):
        self.loss = loss

    def on_step_begin(self, args, state, control, **kwargs):
        self.loss.scale = (5.0, 20.0, 10.0)[state.global_step]


def test_a_loss_that_a_callback_changes_is_that_of_the_step():
    logs = []
    for trainer_class, accumulation in ((Stock, 1), (Exact, 4)):
        trainer = make_trainer("mnr", trainer_class, accumulation, arguments={"max_steps": 3})
        trainer.add_callback(_Scales(trainer.loss))
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history[:3]])
    assert logs[1] == pytest.approx(logs[0], rel=TOLERANCE)
    assert max(logs[0]) > 1.3 * min(logs[0])


def test_the_trainer_is_left_as_it_was():
    trainer = make_trainer("gist", Exact, 4)
    loss, model, guide = trainer.loss, trainer.model, trainer.loss.guide
    trainer.train()
    assert trainer.loss is loss
    assert loss.model is model
    assert loss.guide is guide
    assert "forward" not in vars(model)
    assert "forward" not in vars(guide)


# ---- Losses that do not fit ----


class _ReadsTokens(losses.MultipleNegativesRankingLoss):
    """Has a weight that is no embedding."""

    def forward(self, features, labels):
        width = features[0]["input_ids"].shape[1] if features[0] else 1
        return super().forward(features, labels) * width


def test_a_loss_that_reads_more_than_embeddings_is_refused():
    with pytest.raises(LossUnitError, match="when it is put together from two halves"):
        make_trainer(Case(_ReadsTokens, pairs, "whole"), Exact, 4).train()


def test_a_loss_unknown_to_the_library_is_checked_to_be_a_mean():
    class Own(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, features, labels):
            rows = [self.model(column)["sentence_embedding"] for column in features]
            return (rows[0] @ rows[1].T).logsumexp(1).mean()

    with pytest.raises(LossUnitError, match="not a mean over the targets counted"):
        make_trainer(Case(Own, pairs, "unknown"), Exact, 4).train()


def test_without_the_check_it_is_the_mean_of_micro_batches():
    plugin = GradUtilsPlugin(check_loss_unit=False)
    trainer = make_trainer("mnr", Exact, 4, grad_plugin=plugin)
    trainer.train()
    gradients, logged = train("mnr", Stock, 4)
    assert relative_error(trainer.seen, gradients) < TOLERANCE
    assert trainer.state.log_history[0]["loss"] == pytest.approx(logged, rel=TOLERANCE)


# ---- Names of sentence-transformers that the package relies on ----


def test_every_loss_of_the_library_is_in_the_table():
    exported = {name for name in losses.__all__ if name.endswith(("Loss", "InBatchNegatives"))}
    assert exported - set(KINDS) - set(WRAPPERS) == set()
    of_sparse = {"SpladeLoss", "CachedSpladeLoss"}
    assert {*KINDS, *WRAPPERS} - exported - of_sparse == set()
    sparse = importlib.import_module("sentence_transformers.sparse_encoder.losses")
    assert all(hasattr(sparse, name) for name in of_sparse)


def test_every_loss_of_the_table_is_trained_here_as_what_it_is():
    made = {name: case.make(make_model()) for name, case in CASES.items()}
    for name, loss in made.items():
        assert kind_of(loss) == CASES[name].group, name
    trained = {type(loss).__name__ for loss in made.values()}
    assert {*KINDS, *WRAPPERS} - trained == {"SpladeLoss", "CachedSpladeLoss"}


def test_the_librarys_names_are_still_there():
    base = importlib.import_module("sentence_transformers.base.losses.gradcache").CachedLossMixin
    assert {upstream.CACHED_LOSS, upstream.CACHED_EMBEDDING} <= set(vars(base))
    assert "with_backward" in inspect.signature(getattr(base, upstream.CACHED_LOSS)).parameters
    guided = losses.CachedGISTEmbedLoss
    assert [*inspect.signature(getattr(guided, upstream.CACHED_LOSS)).parameters][1:3] == ["reps", "reps_guided"]
    assert callable(importlib.import_module(upstream._MERGING).column_merging_disabled)
    assert any(base.__name__ == upstream.ENCODER for base in st.SentenceTransformer.__mro__)
    assert "num_layers" in inspect.getsource(inspect.getmodule(losses.AdaptiveLayerLoss).TransformerDecorator)
    splade = importlib.import_module("sentence_transformers.sparse_encoder.losses").CachedSpladeLoss
    assert f"self.{upstream.COMPONENTS} = " in inspect.getsource(splade)
    for name in (upstream.GATHERS, upstream.RETOKENIZES):
        assert f"self.{name} = " in inspect.getsource(losses.GISTEmbedLoss)
    assert hasattr(CASES["auto encoder"].make(make_model()), upstream.DECODERS_TOKENIZER)


def test_only_its_own_trainers_are_looked_at():
    assert losses_of(object()) == {}
    assert list(losses_of(make_trainer("mnr", Exact))) == [None]


# ---- The check of invariance ----


@ranks(2)
def test_the_check_of_invariance_lets_the_reference_train_its_own_model():
    """A loss keeps the wrapped model, whose backward would wait for the other rank."""
    for name in ("mnr", "cosine"):
        report = check_invariance(make_trainer(name, Exact, 4, num_ranks=2))
        assert report.passed, str(report)
