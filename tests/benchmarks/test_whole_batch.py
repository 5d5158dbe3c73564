"""The part of ``make matrix`` with a page of its own, on a small part of it."""

import copy

import pytest
import torch
from torch import nn

from benchmarks import page
from benchmarks.exactness import whole_batch, whole_batch_cost
from benchmarks.exactness.__main__ import main
from benchmarks.exactness.whole_batch_page import render
from tests.harness.counting import SavedBytes


@pytest.mark.slow
def test_ours_has_no_fault_and_stock_is_off(monkeypatch):
    monkeypatch.setattr(whole_batch, "CASES", {"CLIPModel": whole_batch.CASES["CLIPModel"]})
    cells = whole_batch.measure(seed=3)
    assert whole_batch.faults(cells, [ROUTED]) == []
    assert min(cells["CLIPModel"]["stock"][1:]) > 0.1


ROUTED = {"layout": "one_rank", "coefficient": 1.0, 'ours, aux="exact"': 1e-7, 'ours, aux="mean"': 0.2, "stock": 1.2}
CELLS = {
    "A": {"ours": [1e-7] * 5, "stock": [1e-7] + [0.5] * 4, "ours, bf16": [0.01] * 5, "one pass, bf16": [0.01]},
    "B": {"ours": [1e-7] * 5, "stock": ["ValueError: no"] * 5},
}


def test_wrong_cells_and_comparisons_that_show_nothing_are_faults():
    assert whole_batch.faults(CELLS, [ROUTED]) == []
    for column, place, value, said in (
        ("ours", 2, 1e-4, "A, ('one_rank', 8): 0.0001"),
        ("ours", 0, "ValueError: no", "A, ('one_rank', 1): ValueError: no"),
        ("ours", 1, float("nan"), "A, ('one_rank', 4): nan"),
        ("stock", 3, 1e-7, "A, ('ddp2', 1): stock is right, which shows nothing"),
        ("ours, bf16", 4, 0.02, "A, ('ddp2', 4), bf16: 0.02, one pass 0.01"),
    ):
        cells = copy.deepcopy(CELLS)
        cells["A"][column][place] = value
        assert whole_batch.faults(cells, [ROUTED]) == [said]
    assert len(whole_batch.faults(CELLS, [ROUTED | {'ours, aux="exact"': 1e-3}])) == 1
    assert len(whole_batch.faults(CELLS, [ROUTED | {'ours, aux="mean"': 1e-7}])) == 1


WORK = {
    "two passes": {"forwards": 16, "rows": 128, "activations": 2_000_000},
    "one pass": {"forwards": 1, "rows": 64, "activations": 16_000_000},
    "mean of means": {"forwards": 8, "rows": 64, "activations": 1_950_000},
}
A_WINDOW = {"collectives": {"all_gather": 2, "all_reduce": 3}, "syncs": 1}
CALLS = {name: {"1": A_WINDOW, "8": A_WINDOW} for name in ("two passes", "stock")}


def test_counts_that_are_not_as_promised_are_faults():
    assert whole_batch_cost.faults({"work": WORK, "calls": CALLS}) == []

    def with_work(way, **numbers):
        return whole_batch_cost.faults({"work": WORK | {way: WORK[way] | numbers}, "calls": CALLS})

    assert with_work("two passes", forwards=24) == ["two passes: 24 forwards of 8 micro-batches"]
    assert with_work("two passes", activations=2_100_000) == ["two passes keep 2100000 bytes, a micro-batch 1950000"]
    assert "shows nothing" in with_work("one pass", activations=2_000_000)[0]
    for change in ({"syncs": 8}, {"collectives": {"all_gather": 16}}):
        calls = CALLS | {"two passes": {"1": A_WINDOW, "8": A_WINDOW | change}}
        assert "a window of 8 micro-batches costs" in whole_batch_cost.faults({"work": WORK, "calls": calls})[0]


@pytest.mark.slow
def test_activations_of_two_passes_are_those_of_a_micro_batch(monkeypatch):
    monkeypatch.setattr(whole_batch_cost, "large", whole_batch_cost.small)
    work = {name: vars(whole_batch_cost._work_of(*way)) for name, way in whole_batch_cost.WAYS.items()}
    assert whole_batch_cost.faults({"work": work, "calls": CALLS}) == []


def test_bytes_that_autograd_keeps_are_counted_once_and_given_back():
    model = nn.Linear(4, 4, bias=False)
    saved, rows = SavedBytes(model), torch.randn(8, 4)
    with saved.counted():
        hidden = model(rows)
        assert saved.now == rows.nbytes, "the weight is a parameter"
        kept = hidden.exp()  # keeps its result
        assert saved.now == rows.nbytes + hidden.nbytes
        loss = (kept * kept).sum()
        assert saved.now == rows.nbytes + hidden.nbytes, "again"
        loss.backward()
        assert saved.now == 0
        left = model(rows).exp()
        del left
    assert saved.now == 0, "without a backward too"
    assert saved.peak == rows.nbytes + hidden.nbytes


def test_the_page_says_what_is_not_measured_and_its_command_renders_it(tmp_path, capsys):
    assert render({}).count(page.NOT_MEASURED) == 6
    out = tmp_path / "whole_batch.md"
    assert main(["--part", "whole_batch", "--render", "--out", str(out)]) == 0
    assert out.read_text() == render({})
    assert not (tmp_path / "exactness.md").exists()
