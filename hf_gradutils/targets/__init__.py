"""Targets: what a loss is a mean over, and how many of them a batch has."""
