"""The part of docs/performance.md that needs a GPU."""
