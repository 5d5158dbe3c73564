"""The cost of the exact gradient, beside what others do: docs/performance.md."""
