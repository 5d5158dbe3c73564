"""Unmodified programs: their Trainers checked, or made exact."""
