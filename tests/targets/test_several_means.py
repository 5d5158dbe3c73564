"""Heads whose loss is a sum of means over different targets, against one batch in float64."""

import functools
import importlib
import inspect
import itertools
import warnings

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.loss import loss_d_fine, loss_for_object_detection, loss_rt_detr

from benchmarks.heads.classes import build
from benchmarks.heads.configs import tiny_config
from benchmarks.heads.inputs import LENGTH
from benchmarks.heads.rows import collate, find_rows
from hf_gradutils._undisturbed import RowsDrawAlike
from hf_gradutils.targets.means_of_boxes import MEANS_OF_BOXES, means_of_matches_of
from hf_gradutils.targets.several_means import SEVERAL_MEANS, several_means_of
from hf_gradutils.targets.terms import shares_of_totals
from hf_gradutils.upstream.accelerate import without_accelerate_state
from tests.harness.gradients import cast, default_dtype, loss_of_micro_batches, relative_error, whole_gradients
from tests.harness.trainer_cases import IS_OLD

EXACT, OFF = 1e-9, 1e-4
ROUNDED = 1e-6
"""For LXMERT, which adds its losses up in float32, and OneFormer, which computes in it."""
BOUNDS = (0, 2, 5, 6, 10)
"""Of the micro-batches' rows."""
_HEAVY = {"weight_loss_ddf": 1e4}
"""Distillation is the smallest term of D-FINE by far."""
CASES = [
    *((name, {}) for name in SEVERAL_MEANS),
    *((name, {}) for name in MEANS_OF_BOXES if name not in ("DFineForObjectDetection", "Deimv2ForObjectDetection")),
    ("DetrForObjectDetection", {"auxiliary_loss": True}),
    ("TableTransformerForObjectDetection", {"auxiliary_loss": True}),
    ("MaskFormerForInstanceSegmentation", {"use_auxiliary_loss": True, "output_hidden_states": True}),
    ("SpeechT5ForTextToSpeech", {"reduction_factor": 1}),
    ("DFineForObjectDetection", _HEAVY),
    ("Deimv2ForObjectDetection", _HEAVY | {"use_dense_one_to_one": False}),
]
DENSE = ("Deimv2ForObjectDetection", _HEAVY | {"use_dense_one_to_one": True})


@pytest.fixture(autouse=True)
def _in_float64(monkeypatch):
    """Detection losses make their class weights in the default type, and D-FINE's targets are float32 always."""
    targets_of = loss_d_fine.translate_gt

    def translate(boxes, bins, scale, up):
        return tuple(part.double() for part in targets_of(boxes.float(), bins, scale, up.float()))

    monkeypatch.setattr(loss_d_fine, "translate_gt", translate)
    with default_dtype(torch.float64):
        yield


@pytest.fixture(autouse=True)
def _matching(monkeypatch):
    """Match without scipy, which nothing else here needs."""
    for module in (loss_for_object_detection, loss_rt_detr, *_segmenters()):
        monkeypatch.setattr(module, "requires_backends", lambda *_: None)
        monkeypatch.setattr(module, "linear_sum_assignment", _cheapest, raising=False)


def _segmenters():
    names = [f"transformers.models.{x}.modeling_{x}" for x in ("maskformer", "mask2former", "oneformer", "eomt")]
    names += [] if IS_OLD else ["transformers.models.eomt_dinov3.modeling_eomt_dinov3"]
    return map(importlib.import_module, names)


@pytest.fixture(autouse=True)
def _drawing_alike():
    """Let heads that draw points draw the same ones for every row, so that splits of a batch can be compared."""
    with RowsDrawAlike():
        yield


def _cheapest(cost):
    """The cheapest assignment of each column to a row of its own: sorted rows, and their columns."""
    costs = np.asarray(cost)
    num_rows, num_columns = costs.shape
    best = {0: (0.0, ())}  # columns assigned, as bits → cost, pairs
    for row in range(num_rows):
        extended = dict(best)
        for columns, (total, pairs) in best.items():
            for column in range(num_columns):
                key, price = columns | 1 << column, total + costs[row, column]
                if key != columns and price < extended.get(key, (np.inf,))[0]:
                    extended[key] = (price, (*pairs, (row, column)))
        best = extended
    pairs = best[2**num_columns - 1][1]
    return np.array([row for row, _ in pairs], dtype=np.int64), np.array([c for _, c in pairs], dtype=np.int64)


@functools.cache
def _case(name, **options):
    """(head, whole batch, micro-batches); one micro-batch has a term without targets."""
    if IS_OLD and not hasattr(transformers, name):
        pytest.skip("newer than this transformers")
    head_class = getattr(transformers, name)
    labels = {"num_labels": 3} if name in MEANS_OF_BOXES else {}
    with warnings.catch_warnings(), default_dtype(torch.float32):
        warnings.simplefilter("ignore")  # of heads this tiny
        head = build(head_class, tiny_config(head_class.config_class, **labels, **options))
        make_row, _ = find_rows(head)
    head.double()
    generator = torch.Generator().manual_seed(5)
    rows = [cast(make_row(generator), torch.float64) for _ in range(BOUNDS[-1])]
    for row in rows[BOUNDS[1] : BOUNDS[2]]:
        _empty(row, "labels", "mask_labels", "class_labels")
    for row in rows[BOUNDS[2] : BOUNDS[3]]:
        _empty(row, "next_sentence_label", "sentence_order_label", "sentence_image_labels", "ans")
    whole = collate(rows)
    if name in _MORE:
        whole |= _MORE[name](head, generator)
    return head, whole, [_part(whole, *bounds) for bounds in itertools.pairwise(BOUNDS)]


def _empty(row, *names):
    for name in set(names) & set(row):
        labels = row[name]
        if isinstance(labels, dict):
            row[name] = {key: value[:0] for key, value in labels.items()}
        else:
            row[name] = labels[:0] if name in ("mask_labels", "class_labels") else torch.full_like(labels, -100)


def _entities(head, generator):
    """Three entities a row, the first of which is to be found; none in the second micro-batch."""
    rows = BOUNDS[-1]
    ids = torch.randint(1, head.config.entity_vocab_size, (rows, 3), generator=generator)
    masked = torch.rand(rows, 3, generator=generator) < 0.5
    masked[:, 0], masked[BOUNDS[1] : BOUNDS[2]] = True, False
    places = torch.full((rows, 3, 30), -1)
    places[..., 0] = torch.arange(3)
    return {
        "entity_ids": ids,
        "entity_attention_mask": torch.ones(rows, 3, dtype=torch.int64),
        "entity_position_ids": places,
        "entity_labels": ids.masked_fill(~masked, -100),
    }


def _tasks(head, generator):
    rows, objects = BOUNDS[-1], 4
    confidence = torch.rand(rows, objects, generator=generator)
    labels = {
        key: torch.randn(rows, objects, info["num"], generator=generator)
        if info["loss"] == "l2"
        else torch.randint(info["num"], (rows, objects), generator=generator)
        for key, info in head.visual_losses.items()
    }
    return {
        "matched_label": torch.randint(2, (rows,), generator=generator),
        "obj_labels": {key: (label, confidence) for key, label in labels.items()},
    }


def _words_of_other_numbers(head, generator):
    return {"attention_mask": (torch.arange(LENGTH) < torch.arange(2, 2 + BOUNDS[-1])[:, None]).long()}


_MORE = {
    "LukeForMaskedLM": _entities,
    "LxmertForPreTraining": _tasks,
    "SpeechT5ForTextToSpeech": _words_of_other_numbers,
}
"""What find_rows leaves out."""


def _part(value, start, end):
    if isinstance(value, dict):
        return {name: _part(part, start, end) for name, part in value.items()}
    return tuple(_part(part, start, end) for part in value) if isinstance(value, tuple) else value[start:end]


def _gradients(head, loss):
    head.zero_grad()
    loss.backward()
    return whole_gradients(head)


def _terms(head, means, batch):
    with without_accelerate_state(), means.watching(head):
        outputs = head(**batch)
        return outputs, torch.stack(means.terms(head, batch, outputs))


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_terms_add_up_to_the_heads_loss(name, options):
    head, whole, _ = _case(name, **options)
    outputs, terms = _terms(head, several_means_of(head), whole)
    tolerance = ROUNDED if name.startswith("Lx") else EXACT
    torch.testing.assert_close(terms.sum(), outputs.loss.double().reshape(()), rtol=tolerance, atol=0)
    want = _gradients(head, head(**whole).loss)
    assert relative_error(_gradients(head, terms.sum()), want) < EXACT


def _error(head, means, whole, parts, weigh):
    """The relative error of the gradient of micro-batches whose terms are weighted by weigh(counts)."""
    want = _gradients(head, head(**whole).loss)
    counts = torch.stack([means.counts(head, part) for part in parts])
    terms = torch.stack([_terms(head, means, part)[1] for part in parts])
    assert terms.isfinite().all()
    return relative_error(_gradients(head, (terms * weigh(counts)).sum()), want)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_weighted_terms_of_micro_batches_give_the_gradient_of_the_whole_batch(name, options):
    head, whole, parts = _case(name, **options)
    means = several_means_of(head)

    def exact(counts):
        assert counts.dtype == torch.float64
        assert (counts == 0).any(), "some term is to have no target in some micro-batch"
        torch.testing.assert_close(counts.sum(0), means.counts(head, whole))
        return torch.stack([shares_of_totals(means.divisors(n), means.divisors(counts.sum(0))) for n in counts])

    assert _error(head, means, whole, parts, exact) < (ROUNDED if name.startswith("One") else EXACT)
    assert _error(head, means, whole, parts, lambda counts: counts[:, :1] / counts[:, :1].sum()) > OFF


@pytest.mark.parametrize("name", ["DFineForObjectDetection", "Deimv2ForObjectDetection"])
def test_distillation_is_weighted_by_square_roots_of_the_numbers_of_queries(name):
    head, whole, parts = _case(name, **next(options for case, options in CASES if case == name))

    def without_roots(counts):
        return torch.cat([counts[:, :2].clamp(min=1), counts[:, 2:]], 1) / counts.sum(0)

    assert _error(head, several_means_of(head), whole, parts, without_roots) > OFF


@pytest.mark.parametrize(("name", "options"), CASES)
def test_counting_does_not_wait_for_the_device(name, options):
    head, whole, _ = _case(name, **options)
    with _WithoutHostSyncs():
        several_means_of(head).counts(head, whole)


class _WithoutHostSyncs(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func)
        return func(*args, **kwargs or {})


def test_two_passes_are_exact_where_predictions_decide_how_many_queries_are_matched():
    head, whole, parts = _case(DENSE[0], **DENSE[1])
    assert several_means_of(head) is None
    two_passes = means_of_matches_of(head)

    def rows_of(batch):
        with two_passes.watching(head):
            return two_passes.rows(head, batch, head(**batch))

    loss = head(**whole).loss
    want = _gradients(head, loss)
    torch.testing.assert_close(two_passes.loss(rows_of(whole), ()), loss, rtol=EXACT, atol=0)
    together = loss_of_micro_batches(two_passes, head, list(map(rows_of, parts)))
    assert relative_error(_gradients(head, together), want) < EXACT
    mean = sum(head(**part).loss for part in parts) / len(parts)
    assert relative_error(_gradients(head, mean), want) > OFF


@pytest.mark.parametrize("name", ["DFineForObjectDetection", "Deimv2ForObjectDetection"])
def test_detectors_that_draw_noisy_boxes_are_no_sum_of_means(name):
    head = type(name, (nn.Module,), {})()
    head.config = getattr(transformers, name).config_class()
    assert head.config.num_denoising
    assert several_means_of(head) is None
    assert means_of_matches_of(head) is None


def test_a_term_without_any_target_in_the_whole_batch_has_no_weight():
    means = several_means_of(_case("BertForPreTraining")[0])
    nothing = torch.zeros(2, dtype=torch.float64)
    assert shares_of_totals(means.divisors(nothing), means.divisors(nothing)).tolist() == [0.0, 0.0]


def test_speech_without_a_guided_attention_has_no_such_term():
    head, whole, _ = _case("SpeechT5ForTextToSpeech", use_guided_attention_loss=False)
    means = several_means_of(head)
    outputs, terms = _terms(head, means, whole)
    assert means.counts(head, whole)[2] == terms[2] == 0
    torch.testing.assert_close(terms.sum(), outputs.loss, rtol=EXACT, atol=0)


def test_labels_that_a_batch_does_not_have_are_no_targets():
    head, whole, _ = _case("LxmertForPreTraining")
    means = several_means_of(head)
    batch = {key: value for key, value in whole.items() if key not in ("matched_label", "obj_labels")}
    outputs, terms = _terms(head, means, batch)
    assert means.counts(head, batch)[[1, 3]].tolist() == [0.0, 0.0]
    assert terms[1] == 0
    torch.testing.assert_close(terms[:3].sum(), outputs.loss.double(), rtol=ROUNDED, atol=0)


def test_words_without_entities_are_one_mean():
    head, whole, _ = _case("LukeForMaskedLM")
    means = several_means_of(head)
    batch = {key: value for key, value in whole.items() if not key.startswith("entity_")}
    outputs, terms = _terms(head, means, batch)
    assert "entity_logits" not in outputs
    assert means.counts(head, batch)[1] == terms[1] == 0
    torch.testing.assert_close(terms.sum(), outputs.loss, rtol=EXACT, atol=0)


def test_subclasses_are_found_and_other_heads_are_not():
    head = _case("BertForPreTraining")[0]
    fully_sharded = type("FSDPMine", (type("Mine", (transformers.BertForPreTraining,), {}),), {})
    assert several_means_of(fully_sharded(head.config)) is SEVERAL_MEANS["BertForPreTraining"]
    assert several_means_of(nn.Linear(1, 1)) is None


@pytest.mark.parametrize("name", [*SEVERAL_MEANS, *MEANS_OF_BOXES])
def test_the_classes_in_the_table_are_still_there(name):
    if IS_OLD and not hasattr(transformers, name):
        pytest.skip("newer than this transformers")
    head_class = getattr(transformers, name)
    assert issubclass(head_class, transformers.PreTrainedModel)
    assert {"labels", "class_labels"} & set(inspect.signature(head_class.forward).parameters)
