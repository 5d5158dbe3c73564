"""Heads that draw masks or points in every forward: by row, so that micro-batches add up given what is drawn."""

import pytest
import torch
import transformers
from transformers import Trainer, TrainerCallback

from benchmarks.heads.classes import build
from benchmarks.heads.configs import tiny_config
from benchmarks.heads.rows import collate, find_rows
from hf_gradutils._undisturbed import RowsDrawAlike
from hf_gradutils.errors import LossUnitError
from hf_gradutils.targets.known_heads import DRAWS_BY_ROW
from tests.harness.gradients import relative_error
from tests.harness.trainer_cases import IS_OLD, train, warnings_of

TOLERANCE = 1e-5


# ---- Equal draws ----


@pytest.mark.parametrize("draw", [torch.rand, torch.randn])
def test_rows_draw_alike_whatever_is_beside_them_and_in_any_precision(draw):
    with RowsDrawAlike():
        first, more = draw(2, 5), draw(7, 5, dtype=torch.float64)
        like = (torch.rand_like if draw is torch.rand else torch.randn_like)(first)
        other = draw(2, 6)
    assert torch.equal(first, more[:2].float())
    assert torch.equal(first, like)
    assert torch.equal(more[0], more[6])
    assert first[0].unique().numel() == 5
    assert not torch.equal(draw(2, 5)[0], draw(2, 5)[1]), "outside of it they do not"
    assert torch.isfinite(other).all()


def test_random_states_go_on_as_if_rows_drew_for_themselves():
    torch.manual_seed(3)
    torch.rand(4)
    want = torch.rand(4)
    torch.manual_seed(3)
    with RowsDrawAlike():
        torch.rand(4)
        own = torch.rand(4, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.rand(4), want)
    assert own.unique().numel() == 4, "of a generator that is named"


# ---- Masks of images ----

MAE = {"image_size": 16, "patch_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
MAE |= {"intermediate_size": 32, "decoder_hidden_size": 16, "decoder_intermediate_size": 32, "initializer_range": 0.2}
MAE |= {"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}


def _gradient_of(model, batch):
    model = model.double()
    model(**{name: value.double() for name, value in batch.items()})["loss"].backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _masked_images(num_rows, **more):
    generator = torch.Generator().manual_seed(6)
    return [
        {"pixel_values": (1 + i) * torch.randn(3, 16, 16, generator=generator)}
        | {name: torch.rand(16, generator=generator) for name in more}
        for i in range(num_rows)
    ]


def _autoencoder(head_class=transformers.ViTMAEForPreTraining):
    torch.manual_seed(3)
    return head_class(transformers.ViTMAEConfig(**MAE))


UNEVEN = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "max_steps": 1, "num_train_epochs": 1}
OF_IMAGES = {"data_collator": collate, "arguments": {"train_sampling_strategy": "sequential"} | UNEVEN}


def test_masks_that_are_drawn_for_each_row_are_exact_given_what_is_drawn():
    rows = _masked_images(10, noise=True)  # of which the masks are made
    assert not torch.equal(rows[0]["noise"], rows[1]["noise"])
    want = _gradient_of(_autoencoder(), collate(rows))
    _, tap = train("vit images", 3, model=_autoencoder(), data=rows, **OF_IMAGES)
    assert relative_error(tap.steps[0], want) < TOLERANCE
    _, stock = train("vit images", 3, trainer_class=Trainer, model=_autoencoder(), data=rows, **OF_IMAGES)
    assert relative_error(stock.steps[0], want) > TOLERANCE, "two rows of the last micro-batch weigh as four"


def test_masks_that_are_drawn_in_the_forward_are_checked_as_if_rows_drew_the_same():
    rows = _masked_images(10)
    with warnings_of("hf_gradutils") as said:
        trainer, tap = train("vit images", 3, model=_autoencoder(), data=rows, **OF_IMAGES)
    assert trainer.state.log_history[0]["num_targets"] == 10
    assert not said
    _, other = train("vit images", 3, model=_autoencoder(), data=rows, **OF_IMAGES | {"callback": _Drawing()})
    assert relative_error(other.steps[0], tap.steps[0]) > 1e-2, "training itself draws as it would"
    with pytest.raises(LossUnitError, match=r"L\(AB\)·n\(AB\)"):
        train("vit images", 3, model=_autoencoder(_Squared), data=rows, **OF_IMAGES)


class _Drawing(TrainerCallback):
    def on_step_begin(self, *_, **__):
        torch.rand(1)


class _Squared(transformers.ViTMAEForPreTraining):
    """By a class above it one that is a mean over rows, and is not."""

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs["loss"] = outputs["loss"].square()
        return outputs


# ---- Points of masks ----

SEGMENTERS = [name for name in sorted(DRAWS_BY_ROW) if "Segmentation" in name]


@pytest.mark.parametrize("name", [*SEGMENTERS, "RfDetrForInstanceSegmentation"])
def test_heads_that_draw_by_row_draw_as_many_numbers_beside_more_rows(name, monkeypatch):
    """All but the one that is refused for it."""
    pytest.importorskip("scipy")
    if IS_OLD and not hasattr(transformers, name):
        pytest.skip("newer than this transformers")
    head_class = getattr(transformers, name)
    head = build(head_class, tiny_config(head_class.config_class, num_labels=3))
    make_row, _ = find_rows(head)
    generator = torch.Generator().manual_seed(6)
    rows = [make_row(generator) for _ in range(6)]
    shapes, rand = [], torch.rand
    monkeypatch.setattr(torch, "rand", lambda *s, **options: shapes[-1].add(s[1:]) or rand(*s, **options))
    for num_rows in (2, 6):
        shapes.append(set())
        with torch.no_grad():
            head(**collate(rows[:num_rows]))
    assert shapes[0]
    assert (shapes[0] == shapes[1]) == (name in DRAWS_BY_ROW)
