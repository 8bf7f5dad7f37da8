"""The numbers of the authors' code, 20 steps of each method.

What remains of a difference: their solves add 1e-6 to the diagonal of every Gram matrix, which pulls towards
zero and is left out here (but for the momentum), and both sides round to float32.
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
    KroneckerMetric,
    LowRank,
    OuterProduct,
    lora_dot,
    lorsum,
    oplora,
    scaled_adamw,
    scaled_gd,
    scaled_oplora,
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


@pytest.mark.parametrize("case", range(len(LORSUM["scaled_cases"])))
def test_lorsum_with_a_metric(case):
    num_iters, regularization, dense = LORSUM["scaled_cases"][case]
    a, b, x, dy, ma, mb = (jnp.asarray(LORSUM[name]) for name in ("a", "b", "x", "dy", "ma", "mb"))
    matrices = LowRank(a, b), OuterProduct(x, dy), LowRank(ma, mb)
    terms = list(zip(LORSUM["coefficients"].tolist(), matrices, strict=True))
    kind = "dense" if dense else "diag"
    metric = KroneckerMetric(*(jnp.asarray(LORSUM[f"metric_{side}_{kind}"]) for side in ("in", "out")))
    settings = {"num_iters": int(num_iters), "regularization": float(regularization)}
    result = lorsum(terms, metric=metric, **settings)
    assert_close(result.a, LORSUM[f"scaled{case}_a"])
    assert_close(result.b, LORSUM[f"scaled{case}_b"])


# How each file's settings are said here.
def of_oplora(config, **more):
    names = {"lr": "learning_rate", "lmbd": "regularization", "lookahead_iters": "num_iters"}
    return oplora(**{names.get(k, k): v for k, v in config.items() if k != "rank_multiplier"}, **more)


def of_scaled(config):
    b1, b2 = config["betas"]
    return scaled_oplora(
        config["lr"],
        b1=b1,
        b2=b2,
        num_iters=config["lookahead_iters"],
        regularization=config["lmbd"],
        damping=config["damping"],
        power=config["metric_power"],
        metric="kfac" if config["kfac_metric"] else "shampoo",
        structure=config["metric_type"],
        units="absolute",
    )


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
    "scaled_diag_kfac_p05": of_scaled,
    "scaled_diag_kfac_p05_k0": of_scaled,
    "scaled_diag_kfac_p1": of_scaled,
    "scaled_dense_kfac_p1": of_scaled,
    "scaled_diag_shampoo_p025": of_scaled,
    "scaled_dense_shampoo_p025": of_scaled,
}


@pytest.mark.parametrize("kind", ["outer", "dense"])
@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectory(name, kind):
    data = dict(np.load(DATA / f"{name}.npz"))
    config = ast.literal_eval(str(data["config"]))
    tx = TRAJECTORIES[name](config)
    # The file of SVDLoRA starts without an increment, at the rank of the others.
    a, b = data.get("a", np.zeros((12, 3), np.float32)), data.get("b", np.zeros((3, 18), np.float32))
    params = LowRank(jnp.asarray(a), jnp.asarray(b))
    state = tx.init(params)
    if "ma" in data:
        state = optax.tree.set(state, momentum=LowRank(jnp.asarray(data["ma"]), jnp.asarray(data["mb"])))

    w0 = jnp.asarray(data["w0"])
    more = {"moments": config["metric_type"]} if "metric_type" in config else {}
    # Their Jacobi step leaves the momentum as it is, at zero.
    forgets = more and config["lookahead_iters"] == 0

    metrics = lambda state: optax.tree.get(state, "moments", ())

    def step(carry, batch):
        params, state = carry
        loss_fn = lambda p: jnp.mean((lora_dot(batch[0], w0, p) - batch[1]) ** 2)
        loss, gradient = oplora_jax.value_and_grad(loss_fn, kind, **more)(params)
        updates, state = tx.update(gradient, state, params)
        if forgets:
            state = optax.tree.set(state, momentum=jax.tree.map(jnp.zeros_like, params))
        params = optax.apply_updates(params, updates)
        return (params, state), (
            loss,
            params,
            optax.tree.get(state, "momentum") if "ma" in data else (),
            metrics(state),
        )

    batches = jnp.asarray(data["x"]), jnp.asarray(data["y"])
    _, (losses, path, moments, sides) = jax.jit(lambda carry: jax.lax.scan(step, carry, batches))(
        (params, state)
    )
    np.testing.assert_allclose(losses, data["losses"], rtol=RTOL)
    assert len(data["record"]) == 5 and bool(sides) == ("metric_type" in config)
    for t in data["record"]:
        expected = data[f"step{t}_delta"] if "a" not in data else data[f"step{t}_a"] @ data[f"step{t}_b"]
        assert_close(to_dense(path)[t - 1], expected)
        if "ma" in data:
            assert_close(to_dense(moments)[t - 1], data[f"step{t}_ma"] @ data[f"step{t}_mb"])
        if sides:
            assert_close(sides.input[t - 1], data[f"step{t}_metric_in"])
            assert_close(sides.output[t - 1], data[f"step{t}_metric_out"])
