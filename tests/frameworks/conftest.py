"""Shared by the tests of frameworks: tiny models and data."""

import pytest

from tests.harness.framework_materials import write_materials


@pytest.fixture(scope="session")
def materials(tmp_path_factory):
    """The folder of models and data."""
    folder = tmp_path_factory.mktemp("materials")
    write_materials(folder)
    return folder
