"""Batches that are no dicts of rows: rows are counted by the labels, types stay, and it stops where it must."""

import collections
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, mse_loss
from transformers import BatchEncoding

from hf_gradutils import GradUtilsTrainer
from hf_gradutils.accelerator import GradUtilsPlugin
from hf_gradutils.errors import LossUnitError, TargetCountError
from tests.harness.gradients import relative_error
from tests.harness.heads import HEADS
from tests.harness.layouts import on_layouts
from tests.harness.trainer_cases import make_data, make_model, train, truth

TOLERANCE = 1e-5
IN_ORDER = {"train_sampling_strategy": "sequential"}


def mean_over_targets(model, batches, counts):
    """The gradient of one process in float64: each batch's mean, weighted by its targets."""
    model = model.double()
    for batch, count in zip(batches, counts, strict=True):
        batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        (model(**batch)["loss"] * count / sum(counts)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# ---- Rows that are not the first dim of the first tensor ----


class Graphs(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.net, self.out = nn.Linear(5, 6), nn.Linear(6, 1)

    def forward(self, x, graph, labels=None):
        nodes = torch.tanh(self.net(x))
        sums = nodes.new_zeros(int(graph.max()) + 1, 6).index_add(0, graph, nodes)
        values = self.out(sums)[:, 0]
        return {"loss": (values.tanh() ** 2).mean() if labels is None else mse_loss(values, labels)}


def graph_rows(seed=1):
    generator = torch.Generator().manual_seed(seed)
    sizes = [2 + (i * 5) % 7 for i in range(16)]
    return [
        {"x": torch.randn(size, 5, generator=generator), "y": torch.randn((), generator=generator)} for size in sizes
    ]


def collate_graphs(rows):
    sizes = torch.tensor([len(row["x"]) for row in rows])
    graph = torch.arange(len(rows)).repeat_interleave(sizes)
    return {"x": torch.cat([row["x"] for row in rows]), "graph": graph, "labels": torch.stack([r["y"] for r in rows])}


def collate_flattened(rows):
    """All nodes in one row, as flattened sequences are."""
    batch = collate_graphs(rows)
    return {"x": batch["x"][None], "graph": batch["graph"][None], "labels": batch["labels"]}


class FlattenedGraphs(Graphs):
    def forward(self, x, graph, labels=None):
        return super().forward(x[0], graph[0], labels)


def collate_without_labels(rows):
    batch = collate_graphs(rows)
    return {"x": batch["x"], "graph": batch["graph"], "sizes": torch.tensor([len(row["x"]) for row in rows])}


class WithoutLabels(Graphs):
    def forward(self, x, graph, sizes):
        return super().forward(x, graph)


RAGGED = [8, 4, 2, 2]
"""Graphs in each micro-batch."""


class InBatches:
    """Draws batches of other sizes."""

    def __init__(self, sizes):
        self.sizes = sizes

    def __len__(self):
        return len(self.sizes)

    def __iter__(self):
        start = 0
        for size in self.sizes:
            yield list(range(start, start + size))
            start += size


class OwnBatches(GradUtilsTrainer):
    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(
            self.train_dataset, batch_sampler=InBatches(RAGGED), collate_fn=self.data_collator
        )


@pytest.mark.parametrize(("model_class", "collator"), [(Graphs, collate_graphs), (FlattenedGraphs, collate_flattened)])
def test_labels_are_counted_where_other_tensors_have_other_rows(model_class, collator):
    rows = graph_rows()
    want = mean_over_targets(model_class(), [collator(rows)], [1])
    options = {"model": model_class(), "data": rows, "data_collator": collator, "trainer_class": OwnBatches}
    trainer, tap = train("bert classes", 4, **options)
    assert relative_error(tap.steps[0], want) < TOLERANCE
    assert trainer.state.log_history[0]["num_targets"] == 16


def test_where_nothing_tells_the_rows_it_stops_and_says_what_to_pass():
    rows = graph_rows()
    options = {"data": rows, "data_collator": collate_without_labels, "trainer_class": OwnBatches}
    with pytest.raises(TargetCountError, match=r"different first dims .*; pass count_targets"):
        train("bert classes", 4, model=WithoutLabels(), **options)
    want = mean_over_targets(WithoutLabels(), [collate_without_labels(rows)], [1])
    plugin = GradUtilsPlugin(count_targets=lambda batch: torch.tensor(len(batch["sizes"])))
    _, tap = train("bert classes", 4, model=WithoutLabels(), grad_plugin=plugin, **options)
    assert relative_error(tap.steps[0], want) < TOLERANCE


def test_where_no_count_is_needed_nothing_stops():
    rows = graph_rows()
    want = mean_over_targets(WithoutLabels(), [collate_without_labels(rows)], [1])
    _, tap = train("bert classes", 1, model=WithoutLabels(), data=rows, data_collator=collate_without_labels)
    assert relative_error(tap.steps[0], want) < TOLERANCE


class WeightedGraphs(Graphs):
    """By the nodes of each graph."""

    def forward(self, x, graph, labels=None):
        losses = (super().forward(x, graph)["loss"], torch.bincount(graph).to(x.dtype))
        nodes = torch.tanh(self.net(x))
        sums = nodes.new_zeros(int(graph.max()) + 1, 6).index_add(0, graph, nodes)
        weights = losses[1]
        return {"loss": ((self.out(sums)[:, 0] - labels) ** 2 * weights).sum() / weights.sum()}


def test_control_graphs_that_count_by_their_nodes_are_refused():
    with pytest.raises(LossUnitError, match=r"L\(AB\)·n\(AB\) ="):
        train("bert classes", 4, model=WeightedGraphs(), data=graph_rows(), data_collator=collate_graphs)


# ---- Types of batches ----


class ByAttribute(GradUtilsTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert isinstance(inputs, BatchEncoding)
        logits = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits
        return cross_entropy(logits.flatten(0, 1), inputs.labels.flatten())


class Own(collections.UserDict):
    def __getattr__(self, name):
        if name == "data" or name not in self.data:
            raise AttributeError(name)
        return self.data[name]


class ByOwnAttribute(ByAttribute):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        assert isinstance(inputs, Own)
        return super().compute_loss(model, BatchEncoding(inputs.data))


@on_layouts("one_rank", "ddp2")
@pytest.mark.parametrize(("trainer_class", "batch_type"), [(ByAttribute, BatchEncoding), (ByOwnAttribute, Own)])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_batch_keeps_its_type(trainer_class, batch_type, accumulation, layout):
    head = "bert masked"
    data = make_data(head)
    for index in (0, 1, 2, 3, 9):  # micro-batches without targets
        data[index]["labels"] = torch.full_like(data[index]["labels"], -100)
    want, _ = truth(head, data)
    collator = lambda rows: batch_type(HEADS[head].collate(rows))  # noqa: E731
    _, tap = train(head, accumulation, trainer_class=trainer_class, data=data, data_collator=collator)
    assert relative_error(tap.steps[0], want) < TOLERANCE


class FromTuple(GradUtilsTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ids, wanted = inputs
        return cross_entropy(model(input_ids=ids).logits, wanted)

    def floating_point_ops(self, inputs):
        return 0


@on_layouts("one_rank", "ddp2")
@pytest.mark.parametrize("kind", ["tuple", "list"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_tuples_and_lists_are_counted_by_their_rows(kind, accumulation, layout):
    data = [(row["input_ids"][:5], row["labels"]) for row in make_data("bert classes")]
    model = make_model("bert classes").double()
    ids, wanted = (torch.stack(part) for part in zip(*data, strict=True))
    cross_entropy(model(input_ids=ids).logits, wanted).backward()
    want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    make = {"tuple": tuple, "list": list}[kind]
    collator = lambda rows: make(torch.stack(part) for part in zip(*rows, strict=True))  # noqa: E731
    _, tap = train("bert classes", accumulation, trainer_class=FromTuple, data=data, data_collator=collator)
    assert relative_error(tap.steps[0], want) < TOLERANCE


class FromObject(FromTuple):
    def _prepare_inputs(self, inputs):
        return inputs if self._steps.micro_batch is None else super()._prepare_inputs(inputs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, (inputs["x"].ids, inputs["x"].wanted))


def test_a_batch_that_cannot_be_counted_says_so_only_where_a_count_is_needed():
    data = [(row["input_ids"][:5], row["labels"]) for row in make_data("bert classes")]

    def collator(rows):
        return {"x": SimpleNamespace(**{name: torch.stack([row[i] for row in rows]) for i, name in enumerate(names)})}

    names = ("ids", "wanted")
    options = {"trainer_class": FromObject, "data": data, "data_collator": collator}
    trainer, _ = train("bert classes", 1, **options)
    assert trainer.state.global_step == 1
    with pytest.raises(TargetCountError, match="pass count_targets"):
        train("bert classes", 4, **options)
    plugin = GradUtilsPlugin(count_targets=lambda batch: torch.tensor(len(batch["x"].ids)))
    assert train("bert classes", 4, grad_plugin=plugin, **options)[0].state.global_step == 1
