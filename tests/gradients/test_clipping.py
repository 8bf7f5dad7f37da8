"""Norms and clipping of trees with every kind of gradient."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oplora_jax import LowRank, OuterProduct, clip_by_global_norm, global_norm, to_dense
from tests.arrays import normals


def tree(tokens=3, batch=(), dtype=jnp.float32):
    normal = normals(tokens, dtype)
    return {
        "outer": OuterProduct(normal(*batch, tokens, 6), normal(*batch, tokens, 5)),
        "dense": normal(*batch, 6, 5),
        "factors": LowRank(normal(*batch, 6, 2), normal(*batch, 2, 5), 2.0),
        "bias": normal(5),
    }


def dense_tree(updates):
    """The same tree with the outer product formed."""
    return {**updates, "outer": to_dense(updates["outer"])}


@given(tokens=st.sampled_from([1, 2, 40]), batch=st.sampled_from([(), (3,)]))
def test_global_norm(tokens, batch):
    updates = tree(tokens, batch)
    expected = np.sqrt(
        sum(np.sum(np.asarray(z, np.float64) ** 2) for z in jax.tree.leaves(dense_tree(updates)))
    )
    np.testing.assert_allclose(
        jax.jit(global_norm)(updates), expected, rtol=1e-5
    )  # float32 sums of 1000 terms


@pytest.mark.parametrize("max_norm", [0.5, 1e3])
@pytest.mark.parametrize("tokens", [2, 40])
def test_clipping_is_that_of_optax_on_the_dense_tree(max_norm, tokens):
    updates = tree(tokens)
    clipped, _ = clip_by_global_norm(max_norm).update(updates, optax.EmptyState())
    expected, _ = optax.clip_by_global_norm(max_norm).update(dense_tree(updates), optax.EmptyState())
    assert isinstance(clipped["outer"], OuterProduct)
    chex.assert_trees_all_close(dense_tree(clipped), expected, rtol=1e-5, atol=1e-6)  # float32


def test_clipping_keeps_types_and_works_in_a_chain():
    updates = tree(dtype=jnp.bfloat16)
    tx = optax.chain(clip_by_global_norm(1.0), optax.identity())
    clipped, _ = jax.jit(tx.update)(updates, tx.init(updates), None, unknown=1)
    chex.assert_trees_all_equal_dtypes(clipped, updates)
    assert float(global_norm(clipped)) == pytest.approx(1.0, rel=2e-2)  # bfloat16 keeps 8 bits


def test_zero_gradients_stay_zero():
    zeros = jax.tree.map(jnp.zeros_like, tree())
    clipped, _ = clip_by_global_norm(1.0).update(zeros, optax.EmptyState())
    chex.assert_trees_all_equal(clipped, zeros)


def test_norm_of_bfloat16_gradients_is_summed_in_float32():
    """300 ones would sum to 256 in bfloat16."""
    assert float(global_norm(jnp.ones(300, jnp.bfloat16))) == pytest.approx(300**0.5, rel=1e-6)
