"""The GPU part of ``make bench``, on the CPU: tiny, and without what only a GPU can say."""

from dataclasses import replace

import pytest
import torch

from benchmarks import (
    cuda_bandwidth,
    cuda_folding,
    cuda_launches,
    cuda_memory,
    cuda_report,
    cuda_streaming,
    device_clock,
    known_gradients,
    performance,
    sections,
)
from benchmarks.known_gradients import KnownGradients
from benchmarks.window_cost import FOLDED, OURS, TORCH

CPU = torch.device("cpu")
SIZES = cuda_report.Sizes(
    num_elements=10_000,
    num_parameters=(5,),
    accumulation=3,
    layers=cuda_memory.Layers(depth=2, width=16),
    images=cuda_streaming.Images(num_rows=2, side=16),
)

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to measure")

PAGE = """\
# Title

Text.

## First

### Inside

One.

## On a GPU

Measured: 3 TB/s.

### Inside

Two.

## Last

Three.
"""


# ---- What is measured elsewhere stays ----


def test_a_section_goes_up_to_the_next_heading_of_its_level():
    assert sections.section(PAGE, "## First") == ["### Inside", "", "One."]
    assert sections.section(PAGE, "## Last") == ["Three."]
    assert sections.section(PAGE, "## None") == []


def test_a_section_is_replaced_and_all_else_stays():
    page = sections.with_section(PAGE, "## On a GPU", ["Anew."])
    assert page == PAGE.replace("Measured: 3 TB/s.\n\n### Inside\n\nTwo.", "Anew.")
    assert sections.with_section(page, "## On a GPU", sections.section(PAGE, "## On a GPU")) == PAGE


def test_a_section_that_is_not_there_comes_last():
    assert sections.with_section("# Title\n", "## New", ["One."]) == "# Title\n\n## New\n\nOne.\n"
    assert sections.with_section("", "## New", ["One."]) == "## New\n\nOne.\n"


@needs_no_gpu
def test_without_a_gpu_the_page_keeps_what_was_measured_on_one(tmp_path, capsys):
    page = tmp_path / "page.md"
    assert cuda_report.measured_or_kept(page) == ([cuda_report.NO_GPU], []), "nothing has been measured yet"
    page.write_text(PAGE)
    assert cuda_report.measured_or_kept(page) == (["Measured: 3 TB/s.", "", "### Inside", "", "Two."], [])
    assert capsys.readouterr().out == f"{cuda_report.NO_GPU}\n" * 2


@needs_no_gpu
def test_without_a_gpu_there_is_no_gpu_part_to_replace(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert performance.main(["--only-cuda", "--out", str(page)]) == 1
    assert page.read_text() == PAGE
    assert capsys.readouterr().out == f"{cuda_report.NO_GPU}\n"


def test_the_gpu_part_alone_leaves_the_rest_of_the_page(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    monkeypatch.setattr(cuda_report.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda_report, "report", lambda: (["Anew."], ["ours: too slow"]))
    assert performance.main(["--only-cuda", "--out", str(page)]) == 1, "a fault"
    assert page.read_text() == PAGE.replace("Measured: 3 TB/s.\n\n### Inside\n\nTwo.", "Anew.")
    assert "1 faults\nours: too slow" in capsys.readouterr().out


# ---- All of it, tiny ----


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch):
    monkeypatch.setattr(device_clock, "NUM_REPEATS", 1)


def rows_below(lines, title):
    """Cells of the table below a title, without its header."""
    start = next(i for i, line in enumerate(lines) if line.startswith(f"### {title}")) + 2
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start : lines.index("", start)]]
    return rows[2:]


@pytest.mark.slow
def test_everything_runs_and_ours_keeps_its_promises(monkeypatch, capsys):
    monkeypatch.setattr(known_gradients, "LARGEST", 4096)
    lines, faults = cuda_report.report(CPU, SIZES)
    assert faults == []
    assert "CPU, torch" in lines[0]
    assert all(row[2] in ("met", "**not met**") for row in rows_below(lines, "Targets"))
    methods = ["torch's norm alone", FOLDED, OURS, TORCH, "three passes"]
    for dtype in ("float32", "bfloat16"):
        rows = rows_below(lines, f"Norm and scale: 0.00B elements in {dtype}")
        assert [row[0] for row in rows if row[0] != "Automodel"] == ["copy", *methods]
        rows = rows_below(lines, f"The optimizer step, folded or not: 0.00B elements in {dtype}")
        assert [row[1] for row in rows] == ["7", "10", "9", "12"]
    rows = rows_below(lines, "Launches")
    assert [row[1] for row in rows if row[1] != "Automodel"] == methods
    assert all(row[2].endswith("µs") and int(row[5]) > 0 for row in rows)
    assert [row[2] for row in rows_below(lines, "CUDA graphs")] == ["as it is", "graph"] * 2
    assert [row[0] for row in rows_below(lines, "Batches in memory")] == ["ours", "stock"]
    rows = rows_below(lines, "Sync policies in memory")
    assert [row[1].partition(":")[0] for row in rows] == ["every", "defer", "reduce_scatter", "auto"] * 2
    assert not any("raises" in line for line in lines)
    printed = capsys.readouterr().out
    assert "FSDP2 2  defer" in printed, "rows are printed as they come"


def test_a_part_that_fails_leaves_a_line_and_the_others(monkeypatch):
    def no_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 8.00 GiB.\nMore.")

    for module in (cuda_folding, cuda_memory, cuda_streaming):
        monkeypatch.setattr(module, "measure", no_memory)
    monkeypatch.setattr(cuda_bandwidth, "DTYPES", (torch.float32,))
    lines, faults = cuda_report.report(CPU, SIZES)
    said = "raises OutOfMemoryError: CUDA out of memory. Tried to allocate 8.00 GiB."
    assert lines.count(said) == 3
    assert len(faults) == 3
    assert faults[0] == f"The optimizer step, folded or not: 0.00B elements in float32: {said}"
    assert rows_below(lines, "Norm and scale")
    assert rows_below(lines, "CUDA graphs")


def test_a_peer_that_fails_leaves_a_row_and_the_others(monkeypatch):
    def raises(model):
        raise ValueError("no")

    methods = known_gradients.methods()
    methods[TORCH] = replace(methods[TORCH], prepare=raises)
    monkeypatch.setattr(known_gradients, "methods", lambda: methods)
    part = cuda_bandwidth.measure(CPU, torch.float32, 100)
    assert part.faults == [], "what others do is none"
    assert f"| {TORCH} | 2 reads, 1 write | raises ValueError: no |  |" in part.lines
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
    monkeypatch.setattr(cuda_folding, "_orders", lambda report, *, folds: {})
    faults = cuda_folding.measure(CPU, torch.float32, 100).faults
    assert len(faults) == 1, "who scales before the step needs no order"
    assert faults[0].startswith("the same, folded, float32: the step took gradients that are off by")


def test_a_graph_that_does_nothing_is_a_fault(monkeypatch):
    monkeypatch.setattr(device_clock, "captured", lambda call, device: call() and (lambda: None))
    faults = cuda_launches.measure_graphs(CPU, (5,)).faults
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
    shares = {torch.float32: {FOLDED: 0.85, OURS: 0.79}, torch.bfloat16: {OURS: 0.8}}
    assert cuda_report.target_lines(shares)[2:] == [
        "| norm, float32: ≥ 85% of the copy's bandwidth | 85% | met |",
        "| norm and scale, float32: ≥ 80% of the copy's bandwidth | 79% | **not met** |",
        "| norm, bfloat16: ≥ 85% of the copy's bandwidth | not measured |  |",
        "| norm and scale, bfloat16: ≥ 80% of the copy's bandwidth | 80% | met |",
    ]


def test_without_time_left_no_further_ranks_are_started():
    part = cuda_memory.measure(CPU, SIZES.layers, 3, until=0.0)
    assert part.lines[2:] == [
        f"| {wrapper} | {policy} | not measured: no time left |  |  |"
        for wrapper in cuda_memory.WRAPPERS
        for policy in ("every", "defer", "reduce_scatter", "auto")
    ]
