"""Every head of the installed transformers, beside the stock Trainer: docs/heads.md."""
