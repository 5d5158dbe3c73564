"""The table of heads whose labels do not show the unit of their loss, and heads that have no unit."""

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers.loss.loss_for_object_detection import ImageLoss

from benchmarks.heads.classes import build
from benchmarks.heads.configs import tiny_config
from benchmarks.heads.rows import collate, find_rows
from hf_gradutils.accelerator import GradUtilsPlugin
from hf_gradutils.errors import LossUnitError, TargetCountError
from hf_gradutils.targets.contrastive_heads import whole_batch_loss_of
from hf_gradutils.targets.counter import TargetCounter
from hf_gradutils.targets.known_heads import DRAWS_BY_ROW, NO_UNIT, UNITS, known_head
from hf_gradutils.targets.several_means import several_means_of
from hf_gradutils.upstream.accelerate import without_accelerate_state
from tests.harness.gradients import relative_error
from tests.harness.heads import HEADS
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import IS_OLD, make_data, make_model, train

TOLERANCE = 1e-5


@pytest.mark.parametrize("name", sorted({*NO_UNIT, *UNITS, *DRAWS_BY_ROW}))
def test_the_classes_in_the_table_are_still_there(name):
    if IS_OLD and not hasattr(transformers, name):
        pytest.skip("newer than this transformers")
    assert issubclass(getattr(transformers, name), transformers.PreTrainedModel)


def test_subclasses_and_what_fully_shard_makes_of_a_class_are_found():
    model_class = type("FSDPMine", (type("Mine", (transformers.ElectraForPreTraining,), {}),), {})
    model = make_model("electra discriminator")
    model.__class__ = model_class
    assert known_head(model).loss_unit == "attended_tokens"
    assert known_head(make_model("bert masked")) is None


@pytest.mark.parametrize(("num_denoising", "want"), [(0, "boxes"), (100, None)])
def test_detectors_that_draw_noisy_boxes_have_a_unit_without_them_only(num_denoising, want):
    config = transformers.RTDetrConfig(num_denoising=num_denoising)
    model = type("RTDetrForObjectDetection", (nn.Module,), {})()
    model.config = config
    known = known_head(model)
    assert known.loss_unit == want
    assert ("num_denoising=0" in known.reason) == (want is None)


def test_transducers_count_labels_that_are_not_the_blank():
    model = type("MineForRNNT", (nn.Module,), {})()
    model.config = transformers.PretrainedConfig(blank_token_id=7)
    known = known_head(model)
    labels = {"labels": torch.tensor([[1, 7, 2], [7, 7, 7]])}
    assert TargetCounter(known.loss_unit, ignore_index=known.ignore_index)(labels) == 2


MBART = {
    "vocab_size": 48,
    "d_model": 16,
    "init_std": 0.2,
    "dropout": 0.0,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 32),
}


def test_a_head_that_fails_without_any_label_is_exact():
    head = "bart seq2seq"
    data = make_data(head)
    for name, model_class in (("listed", transformers.MBartForConditionalGeneration), ("unlisted", _unlisted())):
        torch.manual_seed(3)
        model = model_class(transformers.MBartConfig(**MBART))
        want = _gradient_of(copy.deepcopy(model), HEADS[head].collate(data))
        _, tap = train(head, 4, model=model, data=data)
        assert relative_error(tap.steps[0], want) < TOLERANCE, name


def _unlisted():
    """The same head under a name, and a hierarchy, that the table does not know."""

    class OwnHead(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.inner = transformers.MBartForConditionalGeneration(config)
            self.config = config

        def forward(self, input_ids, labels, attention_mask=None):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    return OwnHead


# ---- Heads without a unit ----


class _Coupled(nn.Module):
    """A head whose rows depend on each other: the larger the mean of all, the more each counts."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(6, 1)

    def forward(self, pixels, labels):
        scores = self.linear(pixels)
        return {"loss": (scores.mean().exp() * (scores.squeeze(-1) - labels).square()).mean(), "logits": scores}


class AutoformerForPrediction(_Coupled):
    """By its name one of those that couple the rows of a micro-batch."""


def _numbers():
    generator = torch.Generator().manual_seed(6)
    pixels = torch.randn(16, 6, generator=generator)
    return [{"pixels": row, "labels": row.sum()} for row in pixels]


COUPLED = {"data_collator": collate, "arguments": {"train_sampling_strategy": "sequential"}}


@on_layouts("one_rank", "ddp2")
def test_a_head_without_a_unit_stops_and_says_why_and_what_to_do(layout):
    reason = r"AutoformerForPrediction: its autocorrelation .* loss_unit or count_targets .*=1"
    with pytest.raises(LossUnitError, match=reason):
        train("vit images", 2, model=AutoformerForPrediction(), data=_numbers(), **COUPLED)


def test_a_head_without_a_unit_trains_where_nothing_is_split_or_where_the_user_says_so():
    rows = _numbers()
    want = _gradient_of(AutoformerForPrediction(), collate(rows))
    trainer, tap = train("vit images", 1, model=AutoformerForPrediction(), data=rows, **COUPLED)
    assert relative_error(tap.steps[0], want) < TOLERANCE
    assert trainer.state.log_history[0]["num_targets"] == len(rows)
    accepting = {"grad_plugin": GradUtilsPlugin(check_loss_unit=False)} | COUPLED
    trainer, tap = train("vit images", 2, model=AutoformerForPrediction(), data=rows, **accepting)
    assert trainer.state.global_step == 1
    assert relative_error(tap.steps[0], want) > TOLERANCE
    with pytest.raises(LossUnitError, match=r"L\(AB\)·n\(AB\)"):
        train(
            "vit images",
            2,
            model=AutoformerForPrediction(),
            data=rows,
            grad_plugin=GradUtilsPlugin(loss_unit="rows"),
            **COUPLED,
        )


@pytest.mark.parametrize(
    ("name", "config", "word"),
    [
        ("DFineForObjectDetection", {"num_denoising": 100}, "num_denoising=0"),
        ("Deimv2ForObjectDetection", {"num_denoising": 100}, "num_denoising=0"),
        ("RTDetrV2ForObjectDetection", {"num_denoising": 100}, "num_denoising=0"),
        ("EomtDinov3ForUniversalSegmentation", {"pos_embed_rescale": 2.0}, "pos_embed_rescale"),
        ("PatchTSTForPretraining", {"mask_type": "forecast", "num_forecast_mask_patches": [2, 3]}, "with one length"),
        ("XCLIPModel", {"prompt_attention_dropout": 0.1, "prompt_projection_dropout": 0.0}, "dropout"),
    ],
)
def test_what_a_configuration_makes_inexact_is_named_in_the_reason(name, config, word):
    head = _of_class(name, config)
    known = known_head(head)
    assert known.loss_unit is None
    assert known.reason.startswith(f"{name}: ")
    assert word in known.reason
    assert several_means_of(head) is None
    assert whole_batch_loss_of(head) is None


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("DFineForObjectDetection", {"num_denoising": 0}),
        ("EomtDinov3ForUniversalSegmentation", {"pos_embed_rescale": None}),
        ("PatchTSTForPretraining", {"mask_type": "forecast", "num_forecast_mask_patches": [2]}),
        ("PatchTSTForPretraining", {"mask_type": "random", "num_forecast_mask_patches": [2, 3]}),
        ("BertForPreTraining", {}),
        ("CLIPModel", {}),
    ],
)
def test_heads_that_are_exact_in_another_way_count_rows_where_that_is_not_wanted(name, config):
    assert known_head(_of_class(name, config)).loss_unit == "rows"


def _of_class(name, config):
    head = type(name, (nn.Module,), {})()
    head.config = transformers.PretrainedConfig(**config)
    return head


def test_a_head_of_several_means_trains_as_their_mean_where_the_user_accepts_that():
    torch.manual_seed(3)
    model = transformers.BertForPreTraining(BERT)
    rows = [row | {"next_sentence_label": torch.tensor(i % 2)} for i, row in enumerate(make_data("bert masked"))]
    want = _gradient_of(copy.deepcopy(model), HEADS["bert masked"].collate(rows))
    accepting = GradUtilsPlugin(check_loss_unit=False)
    trainer, tap = train("bert masked", 2, model=copy.deepcopy(model), data=rows, grad_plugin=accepting)
    assert trainer.state.log_history[0]["num_targets"] == len(rows)
    assert relative_error(tap.steps[0], want) > TOLERANCE
    _, tap = train("bert masked", 2, model=model, data=rows)
    assert relative_error(tap.steps[0], want) < TOLERANCE


BERT = transformers.BertConfig(
    vocab_size=48,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=32,
    initializer_range=0.2,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)


def _gradient_of(model, batch):
    model = model.double()
    model(**{k: v.double() if v.is_floating_point() else v for k, v in batch.items()})["loss"].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ---- Answers ----


def test_answers_that_the_sequence_was_cut_before_are_no_targets():
    head = "bert answers"
    data = make_data(head)
    for row in data[1::3]:
        row["start_positions"] = row["end_positions"] = torch.tensor(500)
    want = _gradient_of(make_model(head), HEADS[head].collate(data))
    trainer, tap = train(head, 4, data=data)
    assert relative_error(tap.steps[0], want) < TOLERANCE
    assert trainer.state.log_history[0]["num_targets"] == len(data) - len(data[1::3])


@pytest.mark.parametrize("where", [0, -1])
def test_answers_with_one_end_only_are_an_error(where):
    data = make_data("bert answers")
    data[where]["end_positions"] = torch.tensor(500)
    arguments = {"train_sampling_strategy": "sequential"}
    with pytest.raises(TargetCountError, match="some answers have only one end in the sequence"):
        train("bert answers", 4, data=data, arguments=arguments)


def test_rows_whose_class_is_masked_are_no_targets():
    head = "bert classes"
    data = make_data(head)
    for row in data[1::3]:
        row["labels"] = torch.tensor(-100)
    want = _gradient_of(make_model(head), HEADS[head].collate(data))
    _, tap = train(head, 4, data=data)
    assert relative_error(tap.steps[0], want) < TOLERANCE


# ---- Boxes ----


class _Detector(nn.Module):
    """A detector as small as it gets, with the loss of transformers' detectors: everything divided by the boxes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.classes = nn.Linear(6, 4 * 3)
        self.boxes = nn.Linear(6, 4 * 4)
        self.config = transformers.PretrainedConfig(num_labels=3)

    def forward(self, pixels, labels):
        logits = self.classes(pixels).view(-1, 4, 3)
        boxes = self.boxes(pixels).view(-1, 4, 4).sigmoid()
        loss_of = ImageLoss(_Matcher(), num_classes=3, eos_coef=0.1, losses=["boxes"])
        losses = loss_of({"logits": logits, "pred_boxes": boxes}, labels)
        num_boxes = max(sum(len(row["class_labels"]) for row in labels), 1)
        seeing_none = nn.functional.softplus(logits).sum() / num_boxes
        return {"loss": losses["loss_bbox"] + losses["loss_giou"] + seeing_none, "logits": logits}


class DabDetrForObjectDetection(_Detector):
    """By its name one of those that divide by their boxes."""


class _Matcher(nn.Module):
    def forward(self, outputs, targets):
        return [(torch.arange(len(t["class_labels"])),) * 2 for t in targets]


def _boxes():
    generator = torch.Generator().manual_seed(6)
    rows = []
    for index in range(16):
        count = (index * 3) % 5  # some images show nothing
        boxes = 0.2 + 0.2 * torch.rand(count, 4, generator=generator)
        labels = {"class_labels": torch.zeros(count, dtype=torch.int64), "boxes": boxes}
        rows.append({"pixels": torch.randn(6, generator=generator), "labels": labels})
    rows[0]["labels"] = {"class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}
    return rows


def _collate_boxes(rows):
    return {"pixels": torch.stack([row["pixels"] for row in rows]), "labels": [row["labels"] for row in rows]}


@on_layouts("one_rank", "ddp2")
@pytest.mark.parametrize("accumulation", [4, 8])
def test_boxes_are_counted_and_images_without_any_have_their_loss(accumulation, layout):
    rows = _boxes()
    model = DabDetrForObjectDetection()
    with without_accelerate_state():
        model(**_collate_boxes(rows))["loss"].backward()
    want = {name: p.grad.double() for name, p in model.named_parameters()}
    options = {"arguments": {"train_sampling_strategy": "sequential"}, "data_collator": _collate_boxes}
    trainer, tap = train("vit images", accumulation, model=DabDetrForObjectDetection(), data=rows, **options)
    assert relative_error(tap.steps[0], want) < TOLERANCE
    assert trainer.state.log_history[0]["num_targets"] == sum(len(row["labels"]["class_labels"]) for row in rows)


@on_layouts("one_rank", "ddp2")
def test_boxes_are_counted_by_losses_that_ask_torch_for_other_ranks(layout):
    pytest.importorskip("scipy")
    torch.manual_seed(3)
    head = build(transformers.LwDetrForObjectDetection, tiny_config(transformers.LwDetrConfig, num_labels=3))
    make_row, _ = find_rows(head)
    generator = torch.Generator().manual_seed(6)
    rows = [make_row(generator) for _ in range(8)]
    with without_accelerate_state():
        whole = copy.deepcopy(head)
        whole(**collate(rows))["loss"].backward()
    want = {name: p.grad.double() for name, p in whole.named_parameters() if p.grad is not None}
    options = {"arguments": {"train_sampling_strategy": "sequential"}, "data_collator": collate}
    _, tap = train("vit images", 2, model=head, data=rows, **options)
    assert relative_error(tap.steps[0], want) < TOLERANCE


# ---- Counting by hand ----


@pytest.mark.parametrize(
    ("unit", "batch", "message"),
    [
        ("boxes", {"labels": torch.ones(2, 3)}, "boxes are counted in a list of dicts"),
        (
            "masked_patches",
            {"pixel_values": torch.ones(2, 3)},
            "masked_patches are counted in a tensor 'bool_masked_pos'",
        ),
        ("tokens", {"labels": torch.ones(2, 3)}, "tokens are counted in integer labels"),
        ("answers", {"input_ids": torch.ones(2, 3)}, "answers are counted in a tensor 'start_positions'"),
    ],
)
def test_a_unit_that_the_batch_has_nothing_for_is_an_error(unit, batch, message):
    with pytest.raises(TargetCountError, match=message):
        TargetCounter(unit)(batch)


def test_attended_tokens_without_a_mask_are_all_tokens():
    assert TargetCounter("attended_tokens")({"labels": torch.zeros(2, 5)}) == 10
