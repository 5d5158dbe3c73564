"""Faults in a first rank, and the load of waiting ranks: two parts of docs/first_rank.md."""
