"""Parameters, activations, gradients and state in types of their own."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import oplora_jax
from oplora_jax import LowRank, OuterProduct, lora_dot, oplora, scaled_oplora, to_dense
from oplora_jax.nnx import LoRALinear
from tests.optimizers.cases import CASES, OURS_AND_KINDS, gradient_of, make, problem, run, signature

pytestmark = pytest.mark.usefixtures("quick_compilation")

BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32
WITH_STATE = [
    name
    for name in CASES
    if name.startswith(("oplora", "scaled_oplora", "toy")) and name != "oplora_no_momentum"
]


def in_dtype(tree, dtype):
    return jax.tree.map(lambda z: z.astype(dtype), tree)


# What a step computes in.

N, M, R, TOKENS = 11, 10, 3, 13
ROWS = {R, 2 * R, R + 4}  # of one factor, and of it with its momentum's
DECOMPOSITIONS = {"eigh", "qr", "svd", "householder_product", "geqrf"}


def equations(jaxpr):
    """All equations of a traced program, those of its inner programs included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda z: hasattr(z, "eqns")):
            if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                yield from equations(getattr(inner, "jaxpr", inner))


def gradient_in(kind, dtype):
    ones = lambda *shape: jnp.ones(shape, dtype)
    return {
        "outer": OuterProduct(ones(TOKENS, N), ones(TOKENS, M)),
        "dense": ones(N, M),
        "factors": LowRank(ones(N, R), ones(R, M), 2.0),
        "diagonal moments": oplora_jax.DenseGradient(ones(N, M), jnp.ones(N), jnp.ones(M), jnp.asarray(13.0)),
        "dense moments": oplora_jax.DenseGradient(ones(N, M), jnp.eye(N), jnp.eye(M), jnp.asarray(13.0)),
    }[kind]


@pytest.mark.parametrize("name, kind", [pair for pair in OURS_AND_KINDS if CASES[pair[0]].solves])
def test_solves_are_in_float32(name, kind):
    """Of bfloat16 parameters and gradients: each product with an axis of the rank, each decomposition.

    And each loop over square matrices of one size alone: the elimination that inverts them.
    """
    params = LowRank(jnp.ones((N, R), BF16), jnp.ones((R, M), BF16), 2.0)
    tx = make(name)
    traced = jax.make_jaxpr(tx.update)(gradient_in(kind, BF16), tx.init(params), params)
    found = set()
    for eqn in equations(traced.jaxpr):
        operands, out = [v.aval for v in eqn.invars], eqn.outvars[0].aval
        floating = [z for z in operands if z.ndim and jnp.issubdtype(z.dtype, jnp.floating)]
        shapes = {z.shape[-2:] for z in floating if z.ndim > 1}
        eliminates = len({size for _, size in shapes}) == 1 and any(n == m for n, m in shapes)
        if eqn.primitive.name in DECOMPOSITIONS or (eqn.primitive.name == "scan" and eliminates):
            found.add("svd" if eqn.primitive.name == "svd" else "solve")
            assert {z.dtype for z in floating} == {jnp.dtype(F32)}, eqn
        if eqn.primitive.name == "dot_general" and ROWS & {n for z in (*operands, out) for n in z.shape}:
            found.add("dot_general")
            assert out.dtype == F32, eqn
            if max(out.shape[-2:]) in ROWS:  # what decides how well conditioned a solve is
                assert jnp.dtype(F32) in {z.dtype for z in operands}, eqn
    assert found >= ({"svd"} if name == "svdlora" else {"dot_general"})
    assert found & {"svd", "solve"}


# The types of state and updates.


@pytest.mark.parametrize("dtype", [BF16, F32])
@pytest.mark.parametrize("state_dtype", [BF16, F16, F32])
@pytest.mark.parametrize("name", WITH_STATE)
def test_state_dtype(name, state_dtype, dtype):
    """The momenta have it from the start, at every step; second moments are in float32; updates fit."""
    params, loss_fn = problem(dtype)
    tx = make(name, state_dtype=state_dtype)
    state = tx.init(params)
    kinds = CASES[name].kinds[0]
    step = lambda state, params: tx.update(gradient_of(loss_fn, kinds)(params), state, params)
    updates, after = jax.eval_shape(step, state, params)
    assert signature(after) == signature(state)
    assert signature(updates) == signature(jax.eval_shape(lambda: params))
    momenta = [getattr(state.lora, field, None) for field in ("momentum", "previous")]
    assert {z.dtype for z in jax.tree.leaves(momenta)} == {jnp.dtype(state_dtype)}
    for z in jax.tree.leaves(
        [getattr(state.lora, field, None) for field in ("moments", "metric", "squares")]
    ):
        assert z.dtype == F32
    # The default transformation of the other leaves follows: the heavy ball, the first moment of Adam.
    [others] = optax.tree.get_all_with_path(state.others, "mu" if "scaled" in name else "trace")
    assert others[1]["bias"].dtype == state_dtype


def test_state_dtype_names():
    params, _ = problem()
    for given in ("bfloat16", np.dtype("float16"), BF16):
        momentum = oplora(0.1, state_dtype=given).init(params).lora.momentum
        assert momentum["first"].dtype == jnp.dtype(given)
    injected = optax.inject_hyperparams(oplora, static_args=("state_dtype", "momentum"))(
        0.1, state_dtype=BF16
    )
    assert optax.tree.get(injected.init(params), "momentum")["first"].dtype == BF16
    for factory in (oplora, scaled_oplora):
        for wrong in (jnp.int32, "tf32"):
            with pytest.raises(ValueError, match=r"state_dtype is .*; expected a floating-point type"):
                factory(0.1, state_dtype=wrong)


def test_a_momentum_starts_from_the_same_numbers_in_every_type():
    starts = [oplora(0.1).init(problem(dtype)[0]).lora.momentum["first"] for dtype in (F32, BF16, F16)]
    for start in starts[1:]:
        chex.assert_trees_all_equal(start, in_dtype(starts[0], start.dtype))


@pytest.mark.parametrize("name", ["oplora", "scaled_oplora"])
def test_a_state_too_large_for_its_type_is_skipped(name):
    """In float16 infinity begins at 65520."""
    params = {"first": problem()[0]["first"]}
    gradient = {"first": OuterProduct(jnp.full((1, 8), 1e6), jnp.full((1, 6), 1e6))}
    tx = make(name, state_dtype=F16)
    state = tx.init(params)
    updates, after = jax.jit(tx.update)(gradient, state, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    chex.assert_trees_all_equal(after.lora.momentum, state.lora.momentum)
    assert int(after.skipped) == 1


# What low precision costs.

STEPS = 40
JUDGE = problem()[1]  # the loss in float32


@functools.cache
def path(name, params_dtype=F32, model_dtype=F32, state_dtype=None):
    """The losses of a training run relative to the first, and its last parameters and state."""
    params, (_, loss_fn) = problem()[0], problem(model_dtype)
    params = in_dtype(params, params_dtype)
    tx = make(name) if state_dtype is None else make(name, state_dtype=state_dtype)
    gradient = gradient_of(loss_fn, "outer")

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), JUDGE(in_dtype(params, F32))

    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, length=STEPS))
    last, losses = scan((params, tx.init(params)))
    return np.asarray(losses / JUDGE(problem()[0])), *last


def distance(name, **types):
    """The largest distance of the loss curve from that of float32, in units of the first loss."""
    losses, params, state = path(name, **types)
    chex.assert_tree_all_finite((params, state))
    assert int(state.skipped) == 0
    return np.abs(losses - path(name)[0]).max()


@pytest.mark.parametrize("name", ["oplora", "oplora_projected", "oplora_extrapolated", "scaled_oplora"])
def test_bfloat16_loss_curves(name):
    # bfloat16 rounds to 2^-9. The loss falls by half in a step or two, and moves by twice the relative error
    # of the residual: the gradient, the factors and their product, three to five roundings of 2^-9 = 0.002.
    for types in (
        {"params_dtype": BF16, "model_dtype": BF16},
        {"params_dtype": BF16, "model_dtype": BF16, "state_dtype": F32},
        {"model_dtype": BF16},
    ):
        assert distance(name, **types) < 5 * 2**-9, types
    # The state alone is a share of the step: one rounding of it, of which the next steps repair the most.
    assert distance(name, state_dtype=BF16) < 2**-10


@pytest.mark.parametrize("name", ["oplora", "scaled_oplora"])
def test_float16_loss_curves(name):
    """Inside its range float16 rounds to 2^-12, eight times less than bfloat16."""
    assert distance(name, params_dtype=F16, model_dtype=F16) < 5 * 2**-12
    assert distance(name, state_dtype=F16) < 2**-13


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_low_precision_and_a_zero_b(dtype):
    """LoRA's usual start, where the first solve has nothing to go by: no NaN, and the loss falls."""
    params, loss_fn = problem(dtype, b_zero=True)
    for name in ("oplora", "scaled_oplora"):
        now, state = run(make(name), params, gradient_of(loss_fn, "outer"), 60)
        chex.assert_tree_all_finite((now, state))
        assert int(state.skipped) == 0
        # After 60 steps float32 is at 5e-14 (oplora) and 6e-5 (scaled_oplora) of the first loss.
        assert loss_fn(now) < 1e-3 * loss_fn(params)


@pytest.mark.parametrize("name", ["oplora", "oplora_projected", "oplora_extrapolated"])
def test_a_float32_state_is_the_closer_momentum(name):
    """Of bfloat16 parameters: 20 steps along one gradient with small steps, against all in float32."""
    params = in_dtype(problem()[0]["first"], BF16)
    rng = np.random.default_rng(3)
    gradient = OuterProduct(*(jnp.asarray(rng.standard_normal((4, size)), F32) for size in params.shape))

    def momentum(params, **settings):
        tx = oplora(1e-3, **CASES[name].settings | {"momentum": 0.95}, **settings)

        def step(state, _):  # the parameters stay, so that the momentum alone is judged
            return tx.update(gradient, state, params)[1], None

        state, _ = jax.jit(lambda state: jax.lax.scan(step, state, length=20))(tx.init(params))
        return to_dense(in_dtype(state.lora.momentum, F32))

    exact = momentum(in_dtype(params, F32))
    error = lambda moment: np.linalg.norm(moment - exact)
    assert error(momentum(params, state_dtype=F32)) < 0.1 * error(momentum(params))


def test_bfloat16_parameters_lose_small_steps():
    """Factors in float32 over a model in bfloat16 do not: they are the master weights."""
    params, loss_fn = problem(BF16)
    gradient = gradient_of(loss_fn, "outer")
    tx = oplora(1e-6)  # steps below 5e-5; the smallest entry, 0.028, is rounded to 6e-5

    train = lambda params: run(tx, params, gradient, 50)[0]
    stuck, wide = train(params), in_dtype(params, F32)
    moved = train(wide)
    chex.assert_trees_all_equal(stuck["first"], params["first"])
    assert np.all(moved["first"].b != wide["first"].b)
    assert JUDGE(moved) < JUDGE(wide)


def test_float32_factors_over_a_bfloat16_model():
    """In every way to have them: beside a model, and in a layer."""
    model = {"dense": {"kernel": jnp.ones((N, M), BF16)}}
    lora = oplora_jax.init_lora(jax.random.key(0), model, R, "dense/kernel", dtype=F32)
    assert oplora_jax.init_lora(jax.random.key(0), model, R, "dense/kernel")["dense/kernel"].dtype == BF16
    assert lora["dense/kernel"].dtype == F32
    x = jnp.ones((TOKENS, N), BF16)
    kernel = model["dense"]["kernel"]
    uses = {
        "lora_dot": lambda lora: lora_dot(x, kernel, lora["dense/kernel"]),
        "merge": lambda lora: x @ oplora_jax.merge(model, lora)["dense"]["kernel"],
    }
    tx = oplora(0.1)
    for name, use in uses.items():
        assert use(lora).dtype == BF16
        for kind in ("outer", "dense") if name == "lora_dot" else ("dense",):
            gradient = oplora_jax.grad(lambda p, use=use: jnp.sum(use(p).astype(F32) ** 2), kind)(lora)
            updates, _ = jax.eval_shape(tx.update, gradient, tx.init(lora), lora)
            chex.assert_trees_all_equal_shapes_and_dtypes(updates, lora)
    layer = LoRALinear(N, M, R, dtype=BF16, rngs=nnx.Rngs(0))
    assert layer(x).dtype == BF16 and layer.lora.get_value().dtype == F32
