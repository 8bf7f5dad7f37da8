"""The numbers of the authors' code, 20 steps of each method.

What remains of a difference: their solves add 1e-6 to the diagonal of every Gram matrix, which pulls towards
zero and is left out here (but for the momentum of `oplora`), and both sides round to float32.
"""

import ast
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oplora_jax
from oplora_jax import (
    LowRank,
    OuterProduct,
    lora_dot,
    lorsum,
    oplora,
    scaled_adamw,
    scaled_gd,
    svdlora,
    to_dense,
)

DATA = pathlib.Path(__file__).parent / "data"
RTOL = 2e-3  # of the largest entry: the 1e-6 above against Gram matrices of about 1e-3 to 1


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=RTOL * np.abs(expected).max())


LORSUM = dict(np.load(DATA / "lorsum.npz"))


@pytest.mark.parametrize("case", range(len(LORSUM["cases"])))
def test_lorsum(case):
    num_iters, regularization, first = LORSUM["cases"][case]
    a, b, x, dy, ma, mb = (jnp.asarray(LORSUM[name]) for name in ("a", "b", "x", "dy", "ma", "mb"))
    terms = zip(
        LORSUM["coefficients"].tolist(), (LowRank(a, b), OuterProduct(x, dy), LowRank(ma, mb)), strict=True
    )
    settings = {"num_iters": int(num_iters), "first": "ab"[int(first)]}
    result = lorsum(list(terms), regularization=float(regularization), **settings)
    assert_close(result.a, LORSUM[f"out{case}_a"])
    assert_close(result.b, LORSUM[f"out{case}_b"])


# How each file's settings are said here.
def of_oplora(config, **more):
    names = {"lr": "learning_rate", "lmbd": "regularization", "lookahead_iters": "num_iters"}
    return oplora(**{names.get(k, k): v for k, v in config.items() if k != "rank_multiplier"}, **more)


TRAJECTORIES = {
    "oplora_k1": of_oplora,
    "oplora_k2_dampening": of_oplora,
    "oplora_k1_momentum_rank2x": lambda config: of_oplora(config, momentum_rank=6),
    "oplora_proj_k1": lambda config: of_oplora(config, momentum_kind="projected"),
    "oplora_fista_k1": lambda config: of_oplora(config, momentum_kind="extrapolated"),
    "precond_sgd": lambda c: scaled_gd(c["lr"], momentum=c["momentum"], regularization=c["lmbd"]),
    "precond_adamw": lambda c: scaled_adamw(
        c["lr"], regularization=c["lmbd"], weight_decay=c["weight_decay"]
    ),
    "svdlora_sgd": lambda c: svdlora(optax.sgd(c["lr"], momentum=c["momentum"])),
}


@pytest.mark.parametrize("kind", ["outer", "dense"])
@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectory(name, kind):
    data = dict(np.load(DATA / f"{name}.npz"))
    tx = TRAJECTORIES[name](ast.literal_eval(str(data["config"])))
    # The file of SVDLoRA starts without an increment, at the rank of the others.
    a, b = data.get("a", np.zeros((12, 3), np.float32)), data.get("b", np.zeros((3, 18), np.float32))
    params = LowRank(jnp.asarray(a), jnp.asarray(b))
    state = tx.init(params)
    if "ma" in data:
        state = optax.tree.set(state, momentum=LowRank(jnp.asarray(data["ma"]), jnp.asarray(data["mb"])))

    w0 = jnp.asarray(data["w0"])

    def step(carry, batch):
        params, state = carry
        loss_fn = lambda p: jnp.mean((lora_dot(batch[0], w0, p) - batch[1]) ** 2)
        loss, gradient = oplora_jax.value_and_grad(loss_fn, kind)(params)
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (loss, params, optax.tree.get(state, "momentum") if "ma" in data else ())

    batches = jnp.asarray(data["x"]), jnp.asarray(data["y"])
    _, (losses, path, moments) = jax.jit(lambda carry: jax.lax.scan(step, carry, batches))((params, state))
    np.testing.assert_allclose(losses, data["losses"], rtol=RTOL)
    assert len(data["record"]) == 5
    for t in data["record"]:
        expected = data[f"step{t}_delta"] if "a" not in data else data[f"step{t}_a"] @ data[f"step{t}_b"]
        assert_close(to_dense(path)[t - 1], expected)
        if "ma" in data:
            assert_close(to_dense(moments)[t - 1], data[f"step{t}_ma"] @ data[f"step{t}_mb"])
