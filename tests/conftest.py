"""Strict settings for every test, made before oplora_jax is imported."""

import gc
import os
from importlib.metadata import version

# The tests compile some thousand small programs and run each a few times: a quarter of the compiler's time,
# by leaving out what makes machine code fast. What is computed, and XLA's counts, stay as they are.
flags = "--xla_backend_optimization_level=0"
if int(version("jaxlib").split(".")[1]) < 11:  # later ones do not know it
    flags += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", flags)

# Tracing makes and drops many small objects: with Python's usual 700 its collector takes a tenth of the time.
gc.set_threshold(50_000)

import hypothesis
import jax
import jaxtyping
import pytest

# Eight devices for the tests on a mesh; everything else runs on the first of them.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jaxtyping.install_import_hook("oplora_jax", "beartype.beartype")
# Before pytest imports one of its modules for the examples in it, which would make a second one of that.
import oplora_jax  # noqa: F401

# Every new shape is compiled: few examples, no deadline, and the same ones each time.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=15)
hypothesis.settings.load_profile("ci")


@pytest.fixture
def x64():
    """Double precision, where the mathematics is judged."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked():
    """Argument types are not checked, as for users: the library's own errors are tested."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def quick_compilation():
    """For tests that compile a program of their own and run it a few times on a few numbers."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
