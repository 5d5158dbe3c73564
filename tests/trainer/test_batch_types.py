"""Batches that are no plain dict reach a user's code as they are, and padding with them."""

import collections

import pytest
from torch.nn.functional import cross_entropy
from transformers import BatchEncoding

from hf_gradutils import GradUtilsPlugin
from tests.harness.gradients import relative_error
from tests.harness.heads import HEADS
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import make_data, train, truth
from tests.trainer.test_overrides import CAUSAL, PLACES, TOLERANCE, placed

NAMES = ("input_ids", "attention_mask", "labels")


def as_type(kind, batch):
    values = [batch[name] for name in NAMES]
    return {
        "encoding": lambda: BatchEncoding(batch),
        "user dict": lambda: collections.UserDict(batch),
        "ordered": lambda: collections.OrderedDict(batch),
        "tuple": lambda: tuple(values),
        "list": lambda: values,
    }[kind]()


class Collate:
    def __init__(self, kind):
        self.kind = kind

    def __call__(self, rows):
        return as_type(self.kind, HEADS[CAUSAL].collate(rows))


def reads(kind):
    """A Trainer that reads its batches by attribute, key or position."""

    def make(base):
        class Reads(base):
            def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
                assert isinstance(inputs, type(as_type(kind, dict.fromkeys(NAMES))))
                if kind == "encoding":
                    tensors = (inputs.input_ids, inputs.attention_mask, inputs.labels)
                else:
                    tensors = tuple(inputs) if kind in ("tuple", "list") else tuple(inputs[name] for name in NAMES)
                input_ids, attention_mask, labels = tensors
                logits = model(input_ids=input_ids, attention_mask=attention_mask).logits
                loss = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
                return (loss, logits) if return_outputs else loss

        return Reads

    return make


def count_in(batch):
    labels = batch[-1] if isinstance(batch, tuple | list) else batch["labels"]
    return (labels[:, 1:] != -100).sum()


@pytest.mark.parametrize("kind", ["encoding", "user dict", "ordered", "tuple", "list"])
@pytest.mark.parametrize(
    ("layout", "place", "counts"),
    [("one_rank", "around", "streamed"), ("one_rank", "behind", "first"), ("ddp2", "behind", "streamed")],
)
@on_layouts()
def test_a_batch_keeps_its_type(layout, place, kind, counts):
    plugin = GradUtilsPlugin(counts=counts, count_targets=count_in)
    trainer_class = placed(reads(kind), place)
    want, _ = truth(CAUSAL, make_data(CAUSAL))
    _, tap = train(
        CAUSAL, 4, layout=layout, trainer_class=trainer_class, data_collator=Collate(kind), grad_plugin=plugin
    )
    assert relative_error(tap.steps[0], want) < TOLERANCE


@PLACES
@pytest.mark.parametrize("kind", ["encoding", "user dict", "ordered", "tuple", "list"])
def test_nothing_is_counted_where_no_count_is_needed(place, kind):
    want, _ = truth(CAUSAL, make_data(CAUSAL))
    _, tap = train(CAUSAL, 1, trainer_class=placed(reads(kind), place), data_collator=Collate(kind))
    assert relative_error(tap.steps[0], want) < TOLERANCE


@on_layouts("ddp2")
@pytest.mark.parametrize("kind", ["encoding", "tuple"])
@pytest.mark.parametrize("counts", ["streamed", "first"])
def test_a_rank_without_batches_is_padded_with_one_of_the_same_type(layout, kind, counts):
    data = make_data(CAUSAL, 7)
    want, _ = truth(CAUSAL, data)
    trainer, tap = train(
        CAUSAL,
        4,
        layout=layout,
        data=data,
        trainer_class=placed(reads(kind), "around"),
        data_collator=Collate(kind),
        arguments={"per_device_train_batch_size": 1, "accelerator_config": {"even_batches": False}},
        grad_plugin=GradUtilsPlugin(counts=counts, count_targets=count_in),
    )
    assert relative_error(tap.steps[0], want) < TOLERANCE
    assert trainer.state.log_history[0]["num_targets"] == HEADS[CAUSAL].targets(HEADS[CAUSAL].collate(data))
