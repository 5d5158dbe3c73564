"""Labels of another kind than the first batch's: the head is asked about its shift when a batch can tell."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import IterableDataset

from hf_gradutils.accelerator import GradUtilsPlugin
from hf_gradutils.errors import TargetCountError
from tests.harness.gradients import relative_error
from tests.harness.heads import HEADS
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import make_data, train

TOLERANCE = 1e-5
IN_ORDER = {"train_sampling_strategy": "sequential"}


def mean_over_targets(model, batches, counts):
    """The gradient of one process in float64: each batch's mean, weighted by its targets."""
    model = model.double()
    for batch, count in zip(batches, counts, strict=True):
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        (model(**batch)["loss"] * count / sum(counts)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


# ---- Labels of another kind ----


class TwoHeads(nn.Module):
    """Classes of rows, or the next token, by the labels that come."""

    shift = 1

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Embedding(48, 8)
        self.words, self.classes = nn.Linear(8, 48), nn.Linear(8, 3)

    def forward(self, input_ids, labels=None, attention_mask=None):
        x = self.embed(input_ids)
        if labels.dim() == 1:
            return {"loss": cross_entropy(self.classes(x.mean(1)), labels)}
        logits, labels = (self.words(x[:, :-1]), labels[:, 1:]) if self.shift else (self.words(x), labels)
        return {"loss": cross_entropy(logits.flatten(0, 1), labels.flatten())}


class TwoHeadsWithoutShift(TwoHeads):
    shift = 0


def mixed_rows(order):
    """Batches of two rows, of classes (c) or of words (w), in this order."""
    classes, words = iter(make_data("bert classes", 32)), iter(make_data("llama causal", 32))
    return [next(classes if kind == "c" else words) for kind in order for _ in range(2)]


def mixed_truth(model, rows):
    batches = [HEADS["llama causal"].collate(rows[i : i + 2]) for i in range(0, len(rows), 2)]
    counts = []
    for batch in batches:
        labels = batch["labels"]
        counts.append(len(labels) if labels.dim() == 1 else int(labels[:, model.shift :].ne(-100).sum()))
    return mean_over_targets(model, batches, counts)


ORDERS = ["ccccwwww", "cwcwcwcw", "wcwcwcwc", "wwcccwwc"]


@on_layouts("one_rank", "ddp2")
@pytest.mark.parametrize("model_class", [TwoHeads, TwoHeadsWithoutShift])
@pytest.mark.parametrize("order", ORDERS)
def test_the_shift_is_asked_of_a_batch_that_can_tell(order, model_class, layout):
    rows = mixed_rows(order)
    want = mixed_truth(model_class(), rows)
    arguments = IN_ORDER | {"per_device_train_batch_size": 2}
    options = {"model": model_class(), "data": rows, "data_collator": HEADS["llama causal"].collate}
    _, tap = train("bert classes", 8 if layout == "one_rank" else 4, arguments=arguments, **options)
    assert relative_error(tap.steps[0], want) < TOLERANCE


@pytest.mark.parametrize("model_class", [TwoHeads, TwoHeadsWithoutShift])
def test_labels_of_another_kind_in_a_stream_are_asked_about_when_they_come(model_class):
    rows = mixed_rows("ccwwcwcw")
    want = mixed_truth(model_class(), rows)
    arguments = {"per_device_train_batch_size": 2}
    options = {"model": model_class(), "data": Stream(rows), "data_collator": HEADS["llama causal"].collate}
    _, tap = train("bert classes", 8, arguments=arguments, **options)
    assert relative_error(tap.steps[0], want) < TOLERANCE


@on_layouts("ddp2")
@pytest.mark.parametrize(("model_class", "unit"), [(TwoHeads, "shifted_tokens"), (TwoHeadsWithoutShift, "tokens")])
def test_ranks_with_a_surprise_in_a_stream_stop_and_the_advice_helps(model_class, unit, layout):
    rows = mixed_rows("ccccwwcw")
    want = mixed_truth(model_class(), rows)
    arguments = {"per_device_train_batch_size": 2, "accelerator_config": {"dispatch_batches": False}}
    options = {"data": Stream(rows), "data_collator": HEADS["llama causal"].collate, "arguments": arguments}
    with pytest.raises(TargetCountError, match=r"first labels of two .* set loss_unit='shifted_tokens' if .*'tokens'"):
        train("bert classes", 4, model=model_class(), **options)
    _, tap = train("bert classes", 4, model=model_class(), grad_plugin=GradUtilsPlugin(loss_unit=unit), **options)
    assert relative_error(tap.steps[0], want) < TOLERANCE


@on_layouts("ddp2", "fsdp2x2")
def test_ranks_that_begin_with_other_kinds_in_a_stream_ask_together(layout):
    rows = mixed_rows("cwwcwcwc")
    want = mixed_truth(TwoHeads(), rows)
    arguments = {"per_device_train_batch_size": 2, "accelerator_config": {"dispatch_batches": False}}
    options = {"data": Stream(rows), "data_collator": HEADS["llama causal"].collate, "arguments": arguments}
    _, tap = train("bert classes", 4, model=TwoHeads(), **options)
    assert relative_error(tap.steps[0], want) < TOLERANCE
