"""Unmodified programs of other frameworks: stock, exact and checked."""
