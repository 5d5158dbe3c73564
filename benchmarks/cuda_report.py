"""The section ``## On a GPU`` of the page: measured where there is one, else kept from the page as it is."""

from pathlib import Path

import cuda_bandwidth
import sections
import torch

HEADING = "## On a GPU"
NO_GPU = "No GPU here: nothing was measured on one."


def report() -> tuple[list[str], list[str]]:
    """(lines of Markdown, what is not as promised)."""
    return cuda_bandwidth.report(), []


def measured_or_kept(page: Path | None) -> tuple[list[str], list[str]]:
    """:func:`report`; without a GPU what the page says of an earlier one, and :data:`NO_GPU` if it says nothing."""
    if torch.cuda.is_available():
        return report()
    print(NO_GPU, flush=True)
    return sections.section(_text(page), HEADING) or [NO_GPU], []


def replace_section(page: Path | None) -> int:
    """Measure, and write nothing but this section; returns the number of faults."""
    if not torch.cuda.is_available():
        print(NO_GPU, flush=True)
        return 1
    lines, faults = report()
    if page is not None:
        page.parent.mkdir(exist_ok=True)
        page.write_text(sections.with_section(_text(page), HEADING, lines))
        print(f"wrote {HEADING!r} of {page}")
    print("\n".join([f"{len(faults)} faults", *faults]), flush=True)
    return len(faults)


def _text(page: Path | None) -> str:
    return page.read_text() if page is not None and page.exists() else ""
