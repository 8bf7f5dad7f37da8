"""A function of many parameters' arrays, called once for all of a shape."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oplora_jax.matrix import LowRank
from oplora_jax.together import together
from tests.arrays import normals

SHAPES = [(), (3,), (5, 2), (2, 5), (2, 3, 4), (3, 1, 6, 2)]


@given(shapes=st.lists(st.sampled_from(SHAPES), max_size=8), seed=st.integers(0, 9))
def test_results_are_those_of_each_alone(shapes, seed):
    normal = normals(seed)
    arguments = [(normal(*shape), {"x": normal(*shape)}) for shape in shapes]
    kinds = [len(shape) % 2 for shape in shapes]
    calls = []

    def function(kind, argument):
        calls.append(kind)
        return kind + 2 * argument[0], {"y": argument[1]["x"], "nothing": None}

    results = together(function, kinds, arguments)
    for kind, (first, second), found in zip(kinds, arguments, results, strict=True):
        chex.assert_trees_all_equal(found, (kind + 2 * first, {"y": second["x"], "nothing": None}))
    assert len(calls) == len(set(shapes))


def test_what_differs_is_not_stacked():
    """Types, structures and what they hold that is no array: the scale of a LowRank."""
    node = lambda scale, dtype: LowRank(jnp.ones((3, 2), dtype), jnp.ones((2, 4), dtype), scale)
    arguments = [node(1.0, "float32"), node(2.0, "float32"), node(1.0, "bfloat16"), node(1.0, "float32")]
    seen = []
    results = together(lambda _, z: seen.append(z.a.shape) or z, [None] * 4, arguments)
    assert seen == [(2, 3, 2), (3, 2), (3, 2)]
    chex.assert_trees_all_equal(results, arguments)


@pytest.mark.parametrize("shape", [(300, 4), (4, 300), (300, 4, 8)])
def test_no_copy_of_a_stack_is_taken_for_each(shape):
    """What is gathered for one entry is as large as it, not as the stack."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32)] * 6
    program = jax.make_jaxpr(lambda arrays: together(lambda _, z: z, [None] * 6, arrays))(arrays)
    sizes = [np.prod(v.aval.shape) for eqn in program.eqns for v in eqn.outvars]
    assert sum(size >= 6 * np.prod(shape) for size in sizes) == 1
