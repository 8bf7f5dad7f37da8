import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from oplora_jax import LowRank, OuterProduct, svdlora, tangent_gradient, to_dense
from tests.arrays import f64
from tests.optimizers.cases import dense_tree
from tests.reference import truncated_svd


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("rank", [None, 1])
def test_steps_are_truncated_full_steps(rank, scale, x64):
    rng = np.random.default_rng(0)
    params = LowRank(
        jnp.asarray(rng.standard_normal((7, 2))), jnp.asarray(rng.standard_normal((2, 5))), scale
    )
    tx = svdlora(optax.sgd(0.1, momentum=0.5), rank)
    state, update = tx.init(params), jax.jit(tx.update)
    increment, velocity = f64(to_dense(params)), np.zeros((7, 5))
    for _ in range(3):
        x, dy = rng.standard_normal((4, 7)), rng.standard_normal((4, 5))
        updates, state = update(OuterProduct(jnp.asarray(x), jnp.asarray(dy)), state, params)
        params = optax.apply_updates(params, updates)
        velocity = 0.5 * velocity + x.T @ dy
        increment = truncated_svd(increment - 0.1 * velocity, rank or 2)
        # float64, singular values well apart.
        np.testing.assert_allclose(to_dense(params), increment, rtol=0, atol=1e-11)
        np.testing.assert_allclose(params.a.T @ params.a, params.b @ params.b.T, rtol=0, atol=1e-11)
    assert params.a.shape == (7, 2) and params.scale == scale


MATRICES = {True: optax.adam(0.1), False: optax.sgd(0.1, momentum=0.9)}
BASES = {
    "muon": optax.contrib.muon(0.1),
    "muon by settings": optax.inject_hyperparams(optax.contrib.muon)(
        learning_rate=optax.linear_schedule(0.1, 0, 9)
    ),
    "partition": optax.partition(MATRICES, lambda tree: jax.tree.map(lambda z: z.ndim == 2, tree)),
    "masked": optax.masked(optax.adam(0.1), lambda tree: jax.tree.map(lambda z: z.ndim == 2, tree)),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=2),
    "settings": optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
    "steps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "finite": optax.apply_if_finite(optax.sgd(0.1, momentum=0.9), 2),
    "chain": optax.chain(optax.ema(0.9), optax.clip_by_global_norm(1.0), optax.lion(0.1)),
}


@pytest.mark.parametrize("name", BASES)
def test_bases_of_any_state(name, x64):
    """At full rank nothing is truncated: the increments go as dense matrices do with the base alone."""
    rng = np.random.default_rng(2)
    new = lambda *shape: jnp.asarray(rng.standard_normal(shape))
    lora = {"one": LowRank(new(6, 5), new(5, 5), 2.0), "stack": LowRank(new(2, 6, 5), new(2, 5, 5))}
    params = lora | {"bias": new(5), "kernel": new(4, 4)}
    tx, base = svdlora(BASES[name]), BASES[name]
    dense = [
        {key: dense_tree(params)[key] for key in keys} for keys in (("one", "stack"), ("bias", "kernel"))
    ]
    state, states = tx.init(params), [base.init(part) for part in dense]
    gradient = lambda tree: jax.tree.map(lambda z: jnp.sin(3 * z) + 1, tree)
    step, step_of_base = jax.jit(tx.update), jax.jit(base.update)
    for _ in range(5):
        updates, state = step(gradient(dense_tree(params)), state, params)
        params = optax.apply_updates(params, updates)
        for i, part in enumerate(dense):
            updates, states[i] = step_of_base(gradient(part), states[i], part)
            dense[i] = optax.apply_updates(part, updates)
    # float64; the sine and the signs of lion's steps are far from where rounding decides
    chex.assert_trees_all_close(dense_tree(params), dense[0] | dense[1], rtol=1e-9, atol=1e-10)
    assert int(state.skipped) == 0


@pytest.mark.parametrize("name", ["muon", "partition", "settings"])
def test_a_step_that_is_not_finite_with_a_base_of_any_state(name, x64):
    """Only that parameter's entries stay, wherever the base keeps them."""
    params = {key: LowRank(jnp.ones((6, 2)), jnp.ones((2, 5))) for key in ("one", "two")}
    tx = svdlora(BASES[name])
    gradient = {key: jnp.sin(jnp.arange(30.0).reshape(6, 5)) for key in params}
    update = jax.jit(tx.update)
    _, state = update(gradient, tx.init(params), params)
    updates, after = update(gradient | {"two": jnp.full((6, 5), jnp.nan)}, state, params)
    expected, whole = update(gradient, state, params)
    assert int(after.skipped) == 1 and not any(map(jnp.any, jax.tree.leaves(updates["two"])))
    chex.assert_trees_all_equal(updates["one"], expected["one"])
    leaves = zip(*map(jax.tree.leaves_with_path, (state.lora, after.lora, whole.lora)), strict=True)
    for (path, old), (_, z), (_, new) in leaves:
        chex.assert_trees_all_equal(z, old if "two" in jax.tree_util.keystr(path) else new)


def test_a_base_that_mixes_parameters():
    with pytest.raises(ValueError, match=r"which of its arrays belongs to which parameter.*optax\.flatten"):
        svdlora(optax.flatten(optax.adam(0.1))).init({"one": LowRank(jnp.ones((6, 2)), jnp.ones((2, 5)))})


def test_the_base_sees_dense_gradients_and_increments(x64):
    rng = np.random.default_rng(1)
    params = LowRank(jnp.asarray(rng.standard_normal((7, 2))), jnp.asarray(rng.standard_normal((2, 5))))
    factors = jax.tree.map(jnp.ones_like, params)
    base = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.5))
    tx = svdlora(base)
    updates, _ = jax.jit(tx.update)(factors, tx.init(params), params)
    g = to_dense(tangent_gradient(params, factors))
    expected = truncated_svd(to_dense(params) - 0.5 * (g + 0.1 * to_dense(params)), 2)
    chex.assert_trees_all_close(f64(to_dense(optax.apply_updates(params, updates))), expected, atol=1e-11)
