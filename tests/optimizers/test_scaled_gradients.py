"""Every optimizer, and outer products that were scaled or added up leaf by leaf."""

import chex
import jax
import jax.numpy as jnp
import pytest

import oplora_jax
from tests.optimizers.cases import CASES, OURS, make, problem

OF_OUTER = [name for name in OURS if "outer" in CASES[name].kinds]


def gradients(name, scale=1.0):
    params, loss_fn = problem(trains_a=CASES[name].trains_a)
    return params, oplora_jax.grad(lambda p: scale * loss_fn(p), "outer")(params)


@pytest.mark.parametrize("name", OF_OUTER)
def test_scaled_leaf_by_leaf(name):
    """The step is that of the scaled loss."""
    params, plain = gradients(name)
    _, expected = gradients(name, 0.25)
    tx = make(name)
    step = jax.jit(lambda gradients: tx.update(gradients, tx.init(params), params))
    got, want = step(jax.tree.map(lambda z: z / 4, plain)), step(expected)
    # A power of two: what is scaled is not rounded, but the sums of products are in another order.
    chex.assert_trees_all_close(got, want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", OF_OUTER)
def test_a_sum_is_an_error_or_skipped(name):
    params, one = gradients(name)
    other = oplora_jax.OuterProduct(jnp.flip(one["first"].x, -2), jnp.flip(one["first"].dy, -1))
    both = {"bias": one["bias"], "first": jax.tree.map(jnp.add, one["first"], other)}
    tx = make(name)
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"\['first'\].*added to others"):
        tx.update(both, state, params)
    updates, after = jax.jit(tx.update)(both, state, params)
    chex.assert_trees_all_equal(updates["first"], jax.tree.map(jnp.zeros_like, params["first"]))
    kept = lambda state: [z for z in jax.tree.leaves(state.lora) if jnp.issubdtype(z.dtype, jnp.floating)]
    chex.assert_trees_all_equal(kept(after), kept(state))
    assert int(after.skipped) == 1
    assert jnp.isfinite(updates["bias"]).all()
