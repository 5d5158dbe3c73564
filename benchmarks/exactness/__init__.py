"""Every head in every layout, beside the stock Trainer: docs/exactness.md."""
