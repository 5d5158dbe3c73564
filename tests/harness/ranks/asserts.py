"""Lets a failing `assert` of the test modules imported later show its values, as in pytest's own process.

It takes 50 ms, most of them for pytest's configuration: imported by the forkserver, not again in every rank.
"""

from _pytest.assertion import install_importhook
from _pytest.config import get_config

install_importhook(get_config())
