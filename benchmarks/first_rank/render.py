"""The measured parts of docs/first_rank.md; all else on that page is written by hand."""

from typing import Any

from benchmarks import page

TOOLS = ("hf_gradutils", "accelerate", "transformers")


def render(data: dict[str, Any], text: str) -> str:
    """The page ``text`` with the tables between their marks."""
    if found := data.get("faults"):
        rows = [("", *TOOLS), *((row, *by_tool.values()) for row, by_tool in found["rows"].items())]
        text = _with_table(text, "fault table", rows, found, "gloo on CPU")
    if found := data.get("store_load"):
        rows = [("a look every", "looks per second", "wanted", "median ms", "99 % ms", "server's core")]
        rows += [_load_row(row, found["clients"]) for row in found["rows"]]
        how = f"{found['clients']:,} connections from {found['processes']} processes, on loopback"
        text = _with_table(text, "store table", rows, found, how)
    return text


def _with_table(text: str, name: str, rows: list[Any], found: dict[str, Any], how: str) -> str:
    note = f"Measured: {page.provenance_text(found['measured'])}; {how}."
    return page.replace_between(text, name, f"{page.table(rows)}\n\n{page.wrapped(note)}")


def _load_row(row: dict[str, float], num_clients: int) -> tuple[str, ...]:
    pause_s = row["pause_s"]
    wanted = f"{num_clients / pause_s:.0f}" if pause_s else "as many as it can"
    times = (f"{row['median_ms']:.2f}", f"{row['p99_ms']:.2f}")
    return (f"{pause_s:g} s", f"{row['looks_per_s']:.0f}", wanted, *times, f"{100 * row['server_share']:.0f} %")
