"""Losses of rows of two sources, wrong and right ones, and trainings with them."""

import torch
from torch.nn.functional import cross_entropy, kl_div, logsigmoid

from hf_gradutils import GradUtilsTrainer
from tests.harness.trainer_cases import make_data, make_model, train

IN_ORDER = {"train_sampling_strategy": "sequential"}
CLASSES, TOKENS = "bert classes", "bert tokens"


def collate(rows):
    """What is no tensor becomes a list; what some rows lack is left out for these."""
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row[name] for row in rows if name in row] for name in names}
    return {k: torch.stack(column) if isinstance(column[0], torch.Tensor) else column for k, column in columns.items()}


def mean(losses):
    """Of none it is 0, as users write it."""
    return losses.sum() / max(len(losses), 1)


def trainer_of(loss):
    """A Trainer with the loss (logits, labels, the rest of the batch) → shape ()."""

    class Own(GradUtilsTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return loss_of(loss, model, inputs)

    return Own


def loss_of(loss, model, inputs):
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    return loss(logits, rest.pop("labels", None), rest)


def truth(head, loss, data):
    """The gradient of one process with the whole batch in float64."""
    model, batch = make_model(head).double(), collate(data)
    loss_of(loss, model, {k: v.double() if _is_float(v) else v for k, v in batch.items()}).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _is_float(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def each(logits, labels):
    return cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").view_as(labels)


# ---- Means of two data sets ----


def by_number(logits, labels, rest):
    losses = each(logits, labels)
    return mean(losses[rest["source"] == 0]) + 0.3 * mean(losses[rest["source"] == 1])


def by_name(logits, labels, rest):
    is_web = torch.tensor([name == "web" for name in rest["source"]])
    losses = each(logits, labels)
    return mean(losses[is_web]) + mean(losses[~is_web])


def by_flag(logits, labels, rest):
    losses, counted = each(logits, labels), labels.ne(-100)
    of_synthetic = rest["is_synthetic"][:, None] & counted
    return mean(losses[counted & ~of_synthetic]) + 2 * mean(losses[of_synthetic])


def without_labels(logits, labels, rest):
    """Entropy of rows without a label."""
    has_label = labels.ne(-100)
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    return mean(each(logits, labels)[has_label]) + 0.5 * mean(entropy[~has_label])


def by_first_word(logits, labels, rest):
    """Nothing tells the source but the place in the data set."""
    losses, is_high = each(logits, labels), rest["weights"][:, 0] > 0.5
    return mean(losses[is_high]) + 0.3 * mean(losses[~is_high])


def named(index):
    return {"source": "web" if index else "code"}


MEANS_OF_TWO = {
    "number": (CLASSES, by_number, lambda i: {"source": torch.tensor(i)}),
    "name": (CLASSES, by_name, named),
    "flag": (TOKENS, by_flag, lambda i: {"is_synthetic": torch.tensor(bool(i))}),
    "labels": (CLASSES, without_labels, lambda i: {"labels": torch.tensor(-100)} if i else {}),
    "place": (CLASSES, by_first_word, lambda i: {"weights": torch.rand(3) / 2 + i / 2}),
}


def concatenated(head, entries, num_rows=16):
    rows = make_data(head, num_rows)
    return [row | entries(int(2 * index >= num_rows)) for index, row in enumerate(rows)]


def train_of(head, loss, layout, data, *, batch_size=4, arguments=IN_ORDER, base=None, **options):
    accumulation = len(data) // batch_size // (1 if layout == "one_rank" else 2)
    options |= {"arguments": {"per_device_train_batch_size": batch_size} | arguments}
    own = trainer_of(loss)
    own = type("Own", (own, base), {}) if base else own
    return train(head, accumulation, trainer_class=own, data=data, **{"data_collator": collate} | options)


# ---- Right losses ----


def weighted_sum(logits, labels, rest):
    """A weight for each source, over the number of all rows."""
    return (each(logits, labels) * (1 + 2 * rest["source"])).mean()


def weighted_tokens(logits, labels, rest):
    return (each(logits, labels) * (1 + 2 * rest["source"])[:, None]).sum() / labels.ne(-100).sum()


def weighted_mean(logits, labels, rest):
    weights = 1.0 + 2 * rest["source"]
    return (each(logits, labels) * weights).sum() / weights.sum()


def of_one_source(logits, labels, rest):
    return mean(each(logits, labels)[rest["source"] == 1])


def distilled(logits, labels, rest):
    teacher = torch.stack([logits.new_tensor([1.0, -1.0, 0.5]) * (s + 1) for s in rest["source"]])
    of_teacher = kl_div(logits.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
    return 0.5 * each(logits, labels).mean() + 0.5 * of_teacher


def class_weighted(logits, labels, rest):
    return cross_entropy(logits, labels, weight=logits.new_tensor([1.0, 3.0, 0.5]))


RIGHT = {
    "weighted sum": (CLASSES, weighted_sum, None),
    "weighted tokens": (TOKENS, weighted_tokens, None),
    "weighted mean": (CLASSES, weighted_mean, lambda batch: (1.0 + 2 * batch["source"]).sum()),
    "one source": (CLASSES, of_one_source, lambda batch: (batch["source"] == 1).sum()),
    "distilled": (CLASSES, distilled, None),
    "classes": (CLASSES, class_weighted, lambda batch: torch.tensor([1.0, 3.0, 0.5])[batch["labels"]].sum()),
}


def pairs(logits, labels, rest):
    return -logsigmoid(logits[::2, 0] - logits[1::2, 0]).mean()


def pairs_in_blocks(logits, labels, rest):
    chosen, rejected = logits[:, 0].chunk(2)
    return -logsigmoid(chosen - rejected).mean()


def pairs_of_two_sources(loss):
    """The pairs, and what makes batches of them."""
    rows = [{k: v for k, v in row.items() if k != "labels"} for row in make_data(CLASSES, 32)]
    data = [tuple(row | {"source": torch.tensor(int(i >= 16))} for row in rows[i : i + 2]) for i in range(0, 32, 2)]

    def collate_pairs(pairs_of_rows):
        in_turn = [row for pair in pairs_of_rows for row in pair]
        return collate(in_turn if loss is pairs else in_turn[::2] + in_turn[1::2])

    return data, collate_pairs
