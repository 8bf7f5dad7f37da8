import pytest


@pytest.fixture(autouse=True)
def _quick(quick_compilation):
    """For every test of the optimizers."""
