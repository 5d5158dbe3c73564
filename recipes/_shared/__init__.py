"""Data, models, checkpoints and reports of the recipes: everything in them that is not about gradients."""
