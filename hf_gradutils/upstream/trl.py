"""Private names of trl's trainers (1.16)."""

TRL_METRICS = ("_metrics", "_total_train_tokens")
"""Private attributes in which ``compute_loss`` of trl's trainers (1.16) keeps what they log."""


TRL_AUXILIARY = ("aux_loss_enabled",)
"""Attributes by which ``compute_loss`` of trl's trainers (1.16), if they have them, adds a mixture's auxiliary loss."""
