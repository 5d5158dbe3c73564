"""Private names of trl's trainers (1.16)."""

TRL_METRICS = ("_metrics", "_total_train_tokens")
"""Private attributes in which ``compute_loss`` of trl's trainers collects metrics."""

TRL_AUXILIARY = ("aux_loss_enabled",)
"""Attributes, of some trainers, by which ``compute_loss`` adds a mixture's auxiliary loss."""
