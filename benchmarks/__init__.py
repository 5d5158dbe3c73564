"""Exactness, cost, heads and faults, measured: one folder for each page of the documentation.

Every benchmark measures into a JSON file beside its page (``docs/data``), judges what it has measured, and renders the
page from that file and a template: run ``python -m benchmarks.exactness``, ``.performance``, ``.heads``,
``.first_rank.faults`` or ``.first_rank.store_load``. ``--render`` writes a page anew without measuring.
"""
