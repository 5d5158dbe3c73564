"""One table of the page's GPU section."""

from typing import Any


class Part:
    """Rows that are printed as they come, the numbers in them, and what is not as promised."""

    def __init__(self, *header: str):
        self.rows: list[tuple[str, ...]] = [header]
        self.values: dict[Any, Any] = {}
        """The measured numbers, by their names in the table."""
        self.faults: list[str] = []

    def add(self, *cells: str) -> None:
        """Add a row; cells that are missing at its end are empty."""
        print("  ".join(cell for cell in cells if cell), flush=True)
        self.rows.append(cells + ("",) * (len(self.rows[0]) - len(cells)))
