"""Second moments captured beside dense gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import oplora_jax
from oplora_jax import DenseGradient, LowRank, OuterProduct, clip_by_global_norm, global_norm, lora_dot, merge
from oplora_jax import nnx as lora_nnx
from oplora_jax.matrix import is_matrix, left_product, right_product
from oplora_jax.norms import frobenius_norm, inner_product
from oplora_jax.svd import svd
from tests.arrays import normal

STRUCTURES = ("diagonal", "dense")
each_structure = pytest.mark.parametrize("structure", STRUCTURES)


def of_outer(outer, structure):
    """What a dense gradient with moments holds, from x and dy."""
    moments = [z.mT @ z for z in (outer.x, outer.dy)]
    if structure == "diagonal":
        moments = [jnp.diagonal(z, axis1=-2, axis2=-1) for z in moments]
    tokens = jnp.full(outer.x.shape[:-2], float(outer.x.shape[-2]))
    return DenseGradient(outer.x.mT @ outer.dy, *moments, tokens)


def lora(*batch):
    return LowRank(normal(0, *batch, 6, 2), normal(1, *batch, 2, 5), 2.0)


@each_structure
@pytest.mark.parametrize("transform", ["plain", "jit", "remat", "vmap"])
def test_moments_beside_the_gradient(structure, transform, x64):
    x, kernel = normal(2, 3, 4, 6), normal(3, 6, 5)
    loss = lambda p, x: jnp.mean(jnp.tanh(lora_dot(x, kernel, p)) ** 2)
    if transform == "remat":
        loss = jax.checkpoint(loss)
    if transform == "vmap":  # over x alone: one more axis of tokens
        one = lambda p, x: jnp.mean(jnp.tanh(lora_dot(x, kernel, p)) ** 2)
        loss = lambda p, x: jnp.mean(jax.vmap(one, (None, 0))(p, x))
    gradient = lambda *kind, **more: oplora_jax.grad(loss, *kind, **more)(lora(), x)
    if transform == "jit":
        gradient = jax.jit(gradient, static_argnums=0, static_argnames="moments")
    actual = gradient("dense", moments=structure)
    chex.assert_trees_all_close(actual, of_outer(gradient("outer"), structure), rtol=1e-12)  # float64
    assert actual.tokens == 12


@each_structure
def test_uses_add_up(structure, x64):
    """A parameter of a recurrent layer: three rounds of a scan, and one more use."""
    square = LowRank(normal(0, 6, 2), normal(1, 2, 6))
    kernel, x = normal(3, 6, 6), normal(2, 4, 6)
    layer = lambda x, p: jnp.tanh(lora_dot(x, kernel, p))

    def loss(params, x):
        x, _ = jax.lax.scan(lambda x, _: (layer(x, params[0]), None), x, length=3)
        return jnp.sum(layer(x, params[0]) ** 2)

    def untied(params, x):
        for p in params:
            x = layer(x, p)
        return jnp.sum(x**2)

    [actual] = oplora_jax.grad(loss, moments=structure)([square], x)
    parts = [of_outer(g, structure) for g in oplora_jax.grad(untied, "outer")([square] * 4, x)]
    chex.assert_trees_all_close(actual, jax.tree.map(lambda *z: sum(z), *parts), rtol=1e-11)  # float64


@each_structure
def test_scanned_layers(structure, x64):
    """Stacked parameters, one layer's slice in each round."""
    stack = LowRank(normal(0, 3, 6, 2), normal(1, 3, 2, 6))
    kernels, x = normal(3, 3, 6, 6), normal(2, 4, 6)

    def loss(p, x):
        step = lambda x, z: (jnp.tanh(lora_dot(x, *z)), None)
        return jnp.sum(jax.lax.scan(step, x, (kernels, p))[0] ** 2)

    actual = oplora_jax.grad(loss, "dense", moments=structure)(stack, x)
    expected = of_outer(oplora_jax.grad(loss, "outer")(stack, x), structure)
    chex.assert_trees_all_close(actual, expected, rtol=1e-11)  # float64 rounding
    assert actual.tokens.shape == (3,)


def test_an_unused_parameter_has_zeros():
    gradient = oplora_jax.grad(lambda p: jnp.zeros(()), "dense", moments="diagonal")(lora())
    assert not any(np.any(z) for z in jax.tree.leaves(gradient))


def test_outer_products_and_bfloat16():
    """An outer product needs no moments beside it; those of bfloat16 tokens are float32."""
    p = jax.tree.map(lambda z: z.astype(jnp.bfloat16), lora())
    x, kernel = normal(0, 4, 6).astype(jnp.bfloat16), jnp.zeros((6, 5), jnp.bfloat16)
    loss = lambda p: jnp.sum(lora_dot(x, kernel, p).astype(jnp.float32) ** 2)
    assert isinstance(oplora_jax.grad(loss, "outer", moments="dense")(p), OuterProduct)
    gradient = oplora_jax.grad(loss, "dense", moments="diagonal")(p)
    assert gradient.dtype == jnp.bfloat16 and gradient.x_moment.dtype == jnp.float32
    expected = np.sum(np.asarray(x, np.float64) ** 2, axis=0)
    np.testing.assert_allclose(gradient.x_moment, expected, rtol=1e-6)  # float32 sums of 4 exact squares


def test_merged_weights_have_no_moments(unchecked):
    params, loras = {"w": normal(0, 6, 5)}, {"w": lora()}
    loss = lambda loras: jnp.sum((normal(0, 4, 6) @ merge(params, loras)["w"]) ** 2)
    with pytest.raises(ValueError, match=r"\['w'\]: moments='diagonal' needs .* merged into a weight"):
        oplora_jax.grad(loss, moments="diagonal")(loras)
    # The annotation would refuse this one first: the function below its check.
    with pytest.raises(ValueError, match="moments is 'full'; expected None, 'diagonal' or 'dense'"):
        oplora_jax.value_and_grad(loss, moments="full")


def test_it_is_a_matrix(x64):
    gradient = of_outer(OuterProduct(normal(0, 4, 6), normal(1, 4, 5)), "diagonal")
    dense, other = gradient.gradient, normal(2, 6, 5)
    assert is_matrix(gradient) and gradient.shape == (6, 5) and gradient.dtype == dense.dtype
    right, left = normal(0, 5, 2), normal(0, 2, 6)
    chex.assert_trees_all_equal(oplora_jax.to_dense(gradient), dense)
    chex.assert_trees_all_equal(right_product(gradient, right), right_product(dense, right))
    chex.assert_trees_all_equal(left_product(left, gradient), left_product(left, dense))
    chex.assert_trees_all_equal(frobenius_norm(gradient), frobenius_norm(dense))
    for second in (other, gradient, lora(), OuterProduct(normal(0, 3, 6), normal(0, 3, 5))):
        chex.assert_trees_all_close(inner_product(gradient, second), inner_product(dense, second), rtol=1e-12)
        chex.assert_trees_all_close(inner_product(second, gradient), inner_product(dense, second), rtol=1e-12)
    best = svd([(1.0, gradient), (2.0, lora())], 2)
    chex.assert_trees_all_equal(best, svd([(1.0, dense), (2.0, lora())], 2))


@each_structure
def test_clipping_scales_the_moments(structure, x64):
    outer = OuterProduct(normal(0, 4, 6), normal(1, 4, 5))
    updates = {"lora": of_outer(outer, structure), "bias": jnp.ones(3)}
    plain = {"lora": oplora_jax.to_dense(outer), "bias": jnp.ones(3)}
    norm = global_norm(updates)
    np.testing.assert_allclose(norm, global_norm(plain), rtol=1e-12)  # float64
    clipped, _ = clip_by_global_norm(norm / 4).update(updates, None)
    quarter = of_outer(OuterProduct(outer.x, outer.dy / 4), structure)
    chex.assert_trees_all_close(clipped, {"lora": quarter, "bias": jnp.ones(3) / 4}, rtol=1e-12)  # float64


def test_of_a_module():
    model = lora_nnx.LoRALinear(6, 5, rank=2, rngs=nnx.Rngs(0))
    x = normal(0, 4, 6).astype(jnp.float32)
    loss_fn = lambda model, x: jnp.mean(model(x) ** 2)
    optimizer = nnx.Optimizer(model, oplora_jax.scaled_oplora(0.01), wrt=nnx.LoRAParam)
    losses = []
    for _ in range(3):
        loss, gradients = lora_nnx.value_and_grad(loss_fn, "dense", moments="diagonal")(model, x)
        optimizer.update(model, gradients)
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
