import jax
import pytest


@pytest.fixture(autouse=True)
def quick_compilation():
    """Each test compiles a program of its own and runs it a few times on a few numbers."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
