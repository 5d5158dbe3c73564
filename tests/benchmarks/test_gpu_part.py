"""The GPU part of ``make bench``, on the CPU: tiny, and without what only a GPU can say."""

from dataclasses import replace

import pytest
import torch

from benchmarks import page
from benchmarks.performance.__main__ import main
from benchmarks.performance.gpu import bandwidth, clock, folding, known_gradients, launches, memory, report, streaming
from benchmarks.performance.gpu.known_gradients import KnownGradients
from benchmarks.performance.gpu.render import NO_GPU, render, targets
from benchmarks.performance.methods import FOLDED, OURS, TORCH
from benchmarks.performance.render import render as render_page

CPU = torch.device("cpu")
SIZES = report.Sizes(
    num_elements=10_000,
    num_parameters=(5,),
    accumulation=3,
    layers=memory.Layers(depth=2, width=16),
    images=streaming.Images(num_rows=2, side=16),
)

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to measure")

# ---- What is measured elsewhere stays ----


@needs_no_gpu
def test_without_a_gpu_the_page_keeps_what_was_measured_on_one(tmp_path, capsys):
    out = tmp_path / "performance.md"
    page.publish(out, {"gpu": {"measured": {"date": "some day"}, "parts": PARTS}}, lambda data: "")
    assert main(["--layouts", "one_rank", "--sizes", "30", "--repeats", "1", "--no-trainer", "--out", str(out)]) == 0
    assert page.load(out)["gpu"]["measured"] == {"date": "some day"}
    assert NO_GPU in capsys.readouterr().out


@needs_no_gpu
def test_without_a_gpu_there_is_no_gpu_part_to_replace(tmp_path, capsys):
    out = tmp_path / "performance.md"
    out.write_text("A page.")
    assert main(["--only-cuda", "--out", str(out)]) == 1
    assert out.read_text() == "A page."
    assert capsys.readouterr().out == f"{NO_GPU}\n"
    assert NO_GPU in render_page({})


def test_the_gpu_part_alone_leaves_the_rest_of_the_page(tmp_path, monkeypatch, capsys):
    out = tmp_path / "performance.md"
    page.publish(out, {"repeats": 17, "gpu": None}, lambda data: "")
    monkeypatch.setattr(report.torch.cuda, "is_available", lambda: True)

    def measure_into(data, measured):
        data["gpu"] = {"measured": measured, "parts": PARTS}
        return ["ours: too slow"]

    monkeypatch.setattr(report, "measure_into", measure_into)
    assert main(["--only-cuda", "--out", str(out)]) == 1, "a fault"
    text = out.read_text()
    assert "of 17 repeats" in text
    assert "Everything:\n\n| a |\n|---|\n| 1 |\n\n### CUDA graphs" in text
    assert "1 faults\nours: too slow" in capsys.readouterr().out


NAMES = ("bandwidth", "folding", "launches", "graphs", "streaming", "memory")
PART = {"of": "Everything", "rows": [["a"], ["1"]], "fault": "", "dtype": "float32", "shares": {}}
PARTS = {name: [PART] for name in NAMES}


# ---- All of it, tiny ----


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch):
    monkeypatch.setattr(clock, "NUM_REPEATS", 1)


@pytest.mark.slow
def test_everything_runs_and_ours_keeps_its_promises(monkeypatch, capsys):
    monkeypatch.setattr(known_gradients, "LARGEST", 4096)
    parts, faults = report.measure(CPU, SIZES)
    assert faults == []
    assert tuple(parts) == NAMES
    assert not any(part["fault"] for tables in parts.values() for part in tables)
    rows = {name: [table["rows"][1:] for table in tables] for name, tables in parts.items()}
    methods = [name for name in known_gradients.methods() if name != "Automodel"]
    for part, bandwidths, steps in zip(parts["bandwidth"], rows["bandwidth"], rows["folding"], strict=True):
        assert part["of"] == f"0.00B elements in {part['dtype']}"
        assert [row[0] for row in bandwidths if row[0] != "Automodel"] == ["copy", *methods]
        assert [row[1] for row in steps] == ["7", "10", "9", "12"]
    (launched,) = rows["launches"]
    assert [row[1] for row in launched if row[1] != "Automodel"] == methods
    assert all(row[2].endswith("µs") and int(row[5]) > 0 for row in launched)
    assert [row[2] for row in rows["graphs"][0]] == ["as it is", "graph"] * 2
    assert [row[0] for row in rows["streaming"][0]] == ["ours", "stock"]
    assert [row[1].partition(":")[0] for row in rows["memory"][0]] == POLICIES * 2
    assert "fsdp2x2  defer" in capsys.readouterr().out, "rows are printed as they come"
    text = render({"measured": {}, "parts": parts})
    assert text.count("\n|---|") == 1 + sum(map(len, parts.values()))
    assert "2 linear layers of 16 × 16 in float32 (0.0 MiB), accumulation 3:" in text


POLICIES = ["every", "defer", "reduce_scatter", "auto"]


def test_a_part_that_fails_leaves_a_line_and_the_others(monkeypatch):
    def no_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.\nMore.")

    for module in (folding, memory, streaming):
        monkeypatch.setattr(module, "measure", no_memory)
    monkeypatch.setattr(bandwidth, "DTYPES", (torch.float32,))
    parts, faults = report.measure(CPU, SIZES)
    said = "raises OutOfMemoryError: CUDA out of memory. Tried to allocate 8.00 GiB."
    assert [name for name, (table,) in parts.items() if table["fault"] == said] == ["folding", "streaming", "memory"]
    assert len(faults) == 3
    assert faults[0] == f"folding, 0.00B elements in float32: {said}"
    assert render({"measured": {}, "parts": parts}).count(f"\n\n{said}\n") == 3
    assert parts["bandwidth"][0]["rows"]
    assert parts["graphs"][0]["rows"]


def test_a_peer_that_fails_leaves_a_row_and_the_others(monkeypatch):
    def raises(model):
        raise ValueError("no")

    methods = known_gradients.methods()
    methods[TORCH] = replace(methods[TORCH], prepare=raises)
    monkeypatch.setattr(known_gradients, "methods", lambda: methods)
    part = bandwidth.measure(CPU, torch.float32, 100)
    assert part.faults == [], "what others do is none"
    assert (TORCH, "2 reads, 1 write", "raises ValueError: no", "") in part.rows
    assert set(part.values) == set(methods) - {TORCH, "Automodel"}


# ---- What must hold ----


def of_ours(change):
    """Ours, with its norm changed on the way."""
    ours = known_gradients.methods()[OURS]

    def prepare(model):
        call = ours.prepare(model)
        return lambda: change(call())

    return replace(ours, prepare=prepare)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_that_is_off_or_waits_is_a_fault(dtype):
    known = KnownGradients([5, 100, 20_000], CPU, dtype)
    for name in (OURS, FOLDED):
        assert known_gradients.faults(name, known_gradients.methods()[name], known) == []
    known.fill()
    faults = known_gradients.faults("ours", of_ours(lambda norm: norm * 1.0001), known)
    assert faults == [f"ours, 20,105 elements in {known_gradients.name_of(dtype)}: the norm is off by 1.0e-04"]
    known.fill()
    faults = known_gradients.faults("ours", of_ours(lambda norm: norm.new_tensor(norm.item())), known)
    assert len(faults) == 1
    assert "waits for the device: 1 host syncs" in faults[0]


def test_gradients_that_are_not_scaled_right_are_a_fault():
    known = KnownGradients([100], CPU, torch.float32)
    not_scaling = replace(known_gradients.methods()[FOLDED], scales=True)
    assert "scaled gradients are off by" in known_gradients.faults("ours", not_scaling, known)[0]


def test_a_step_on_other_gradients_is_a_fault(monkeypatch):
    monkeypatch.setattr(folding, "_orders", lambda report, *, folds: {})
    faults = folding.measure(CPU, torch.float32, 100).faults
    assert len(faults) == 1, "who scales before the step needs no order"
    assert faults[0].startswith("the same, folded, float32: the step took gradients that are off by")


def test_a_graph_that_does_nothing_is_a_fault(monkeypatch):
    monkeypatch.setattr(clock, "captured", lambda call, device: call() and (lambda: None))
    faults = launches.measure_graphs(CPU, (5,)).faults
    assert faults[0] == "5, explicit, step, as a graph: a replay took no step"
    assert len(faults) == 4, "and its gradients are not scaled"


def test_the_norm_of_known_gradients_is_known():
    for sizes in ([1], [7, 8, 13], [20_000]):
        known = KnownGradients(sizes, CPU, torch.bfloat16)
        measured = sum(p.grad.double().square().sum().item() for p in known.model) ** 0.5
        assert measured == pytest.approx(known.norm, rel=1e-12)


def test_what_does_not_fit_into_memory_is_made_smaller():
    large = known_gradients.LARGEST
    fits = 4 * large
    assert known_gradients.fitting(2**30, 1e12, torch.float32, 2) == 2**30
    assert known_gradients.fitting(2**30, fits * 4 * 2 / 0.8 + 1e6, torch.float32, 2) == fits
    assert known_gradients.fitting(2**30, fits * 2 * 4 / 0.8 + 1e6, torch.bfloat16, 4) == fits
    assert known_gradients.fitting(2**30, 800.0, torch.float32, 2) == 80, "less than a parameter"


def test_targets_are_judged_for_each_dtype():
    shares = {"float32": {FOLDED: 0.85, OURS: 0.79}, "bfloat16": {OURS: 0.8}}
    lines = targets([{"dtype": dtype, "shares": of} for dtype, of in shares.items()]).splitlines()
    assert lines[2:] == [
        "| norm, float32: ≥ 85% of the copy's bandwidth | 85% | met |",
        "| norm and scale, float32: ≥ 80% of the copy's bandwidth | 79% | **not met** |",
        "| norm, bfloat16: ≥ 85% of the copy's bandwidth | not measured |  |",
        "| norm and scale, bfloat16: ≥ 80% of the copy's bandwidth | 80% | met |",
    ]


def test_without_time_left_no_further_ranks_are_started():
    part = memory.measure(CPU, SIZES.layers, 3, until=0.0)
    said = "not measured: no time left"
    assert part.rows[1:] == [(wrapper, policy, said, "", "") for wrapper in memory.WRAPPERS for policy in POLICIES]
