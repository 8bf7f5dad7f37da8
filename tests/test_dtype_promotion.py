"""Programs that turn off implicit promotion of types, or turn on float64, with parameters in float32."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import oplora_jax
from oplora_jax import LowRank, OuterProduct, lora_dot, lorsum, oplora
from oplora_jax.linen import LoRADense, loraize
from oplora_jax.linen import merge as merge_linen
from oplora_jax.nnx import LoRALinear
from oplora_jax.nnx import merge as merge_nnx
from oplora_jax.nnx import value_and_grad as nnx_value_and_grad
from tests.arrays import normal

F32, KEY = jnp.float32, jax.random.key(0)
X, W = normal(0, 8, 6, dtype=F32), normal(1, 6, 5, dtype=F32)
P = LowRank(normal(2, 6, 2, dtype=F32), normal(3, 2, 5, dtype=F32), 2.0)
G = {"kernel": OuterProduct(X, normal(4, 8, 5, dtype=F32))}
MODES = {"strict": lambda: jax.numpy_dtype_promotion("strict"), "x64": lambda: jax.enable_x64(True)}


def loss(p, x):
    return jnp.mean(lora_dot(x, W, p) ** 2)


def linen_layers():
    model = loraize(nn.Sequential([LoRADense(6, rank=2), nn.Conv(4, (1,))]), 2, "layers_1")
    variables = model.init(KEY, X)
    return oplora_jax.grad(lambda v: jnp.mean(model.apply(v, X) ** 2))(variables), merge_linen(variables)


def nnx_layer():
    layer = LoRALinear(6, 5, rank=2, rngs=nnx.Rngs(0))
    gradient = nnx_value_and_grad(lambda model, x: jnp.mean(model(x) ** 2))(layer, X)
    return gradient, nnx.state(merge_nnx(layer))


USES = {
    "lora_dot": lambda: lora_dot(X, W, P),
    "factor gradients": lambda: jax.grad(loss)(P, X),
    **{kind: lambda kind=kind: oplora_jax.value_and_grad(loss, kind)(P, X) for kind in ("outer", "dense")},
    "moments": lambda: oplora_jax.value_and_grad(loss, "dense", moments="dense")(P, X),
    "microbatches": lambda: oplora_jax.grad(loss, microbatches=4)(P, X),
    "value_and_update": lambda: oplora_jax.value_and_update(loss, oplora(0.1))(P, oplora(0.1).init(P), X),
    "merge": lambda: oplora_jax.merge({"kernel": W}, {"kernel": P}),
    "narrower merge": lambda: oplora_jax.merge({"kernel": W.astype(jnp.bfloat16)}, {"kernel": P}),
    "merge in a loss": lambda: oplora_jax.grad(lambda p: jnp.sum(oplora_jax.merge({"k": W}, {"k": p})["k"]))(
        P
    ),
    "restart": lambda: oplora_jax.merge_and_restart(KEY, {"kernel": W}, {"kernel": P}),
    "init_lora": lambda: oplora_jax.init_lora(KEY, {"kernel": W}, 2, "kernel", alpha=3),
    "clip": lambda: oplora_jax.clip_by_global_norm(0.1).update(G, None, {"kernel": P})[0],
    "lorsum": lambda: lorsum([(1.0, P), (-0.1, G["kernel"])], num_iters=2, regularization=0.1),
    "svd": lambda: oplora_jax.svd([(1.0, P), (-0.1, G["kernel"])], 2),
    "linen": linen_layers,
    "nnx": nnx_layer,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("use", USES)
def test_results_are_those_of_float32(use, mode):
    expected = jax.jit(USES[use])()
    with MODES[mode]():
        found = jax.jit(USES[use])()
    kinds = lambda tree: [(z.shape, z.dtype) for z in jax.tree.leaves(tree)]
    assert kinds(found) == kinds(expected)
    if mode == "strict":  # the same program
        chex.assert_trees_all_equal(found, expected)


@pytest.mark.parametrize("mode", MODES)
def test_gradients_in_eager_programs(mode):
    with MODES[mode]():
        found = oplora_jax.grad(loss, "dense")(P, X)
        expected = jax.grad(lambda w: jnp.mean((X @ w) ** 2))(W + P.to_dense())
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)  # float32 sums of 8
