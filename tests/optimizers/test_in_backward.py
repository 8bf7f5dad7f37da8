"""The step inside the backward pass is the step after it."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import oplora_jax
from oplora_jax import LowRank, lora_dot
from tests.optimizers.cases import OURS, make

LAYERS, WIDTH, RANK, TOKENS = 4, 6, 2, 9


def stack(programme="scan", dtype=jnp.float64, scale=0.5):
    """(loss_fn, params, batch) of a few layers with LoRA, a bias, and a parameter that is not used."""
    keys = jax.random.split(jax.random.key(0), 5)
    normal = lambda key, *shape: jax.random.normal(key, shape, dtype)
    kernels = normal(keys[0], LAYERS, WIDTH, WIDTH) / 2
    lora = LowRank(normal(keys[1], LAYERS, WIDTH, RANK), normal(keys[2], LAYERS, RANK, WIDTH) / 4, scale)
    batch = tuple(normal(key, TOKENS, WIDTH) for key in keys[3:])
    if programme == "unrolled":
        lora = [LowRank(a, b, scale) for a, b in zip(lora.a, lora.b, strict=True)]
    unused = LowRank(jnp.ones((3, 1), dtype), jnp.ones((1, 2), dtype))
    params = {"lora": lora, "bias": jnp.ones((1, WIDTH), dtype), "unused": unused}

    def layer(x, at):
        return x + jnp.tanh(lora_dot(x, *at)), None

    def loss_fn(params, x, y):
        if programme == "unrolled":
            for at in zip(kernels, params["lora"], strict=True):
                x, _ = layer(x, at)
        elif programme == "experts":  # their batch axis is in the product
            experts = jnp.broadcast_to(x, (LAYERS, *x.shape))
            x = x + jnp.tanh(lora_dot(experts, kernels, params["lora"])).mean(0)
        elif programme == "vmap":
            x = jax.vmap(lambda row: jax.lax.scan(layer, row, (kernels, params["lora"]))[0])(x)
        else:
            body = jax.checkpoint(layer) if programme == "checkpoint" else layer
            x, _ = jax.lax.scan(body, x, (kernels, params["lora"]))
        return jnp.mean((x + params["bias"] - y) ** 2)

    return loss_fn, params, batch


def both(tx, loss_fn, params, batch, steps=3):
    """(params, state, loss) after a few steps, taken behind the backward pass and inside it."""

    @jax.jit
    def behind(params, state):
        loss, gradients = oplora_jax.value_and_grad(loss_fn, "outer")(params, *batch)
        return loss, *tx.update(gradients, state, params)

    @jax.jit
    def inside(params, state):
        return oplora_jax.value_and_update(loss_fn, tx)(params, state, *batch)

    results = []
    for step in (behind, inside):
        at, state = params, tx.init(params)
        for _ in range(steps):
            loss, updates, state = step(at, state)
            at = optax.apply_updates(at, updates)
        results.append((at, state, loss))
    return results


PROGRAMMES = ("unrolled", "scan", "checkpoint", "experts", "vmap")
# One programme for every optimizer, and every programme for one.
NAMES_AND_PROGRAMMES = [(name, "checkpoint") for name in OURS[1:]] + [("oplora", z) for z in PROGRAMMES]


@pytest.mark.parametrize("name, programme", NAMES_AND_PROGRAMMES)
def test_the_same_step(name, programme):
    with jax.enable_x64(True):
        behind, inside = both(make(name), *stack(programme))
        # The same operations, in another order where the compiler likes it: rounding of three steps.
        chex.assert_trees_all_close(inside, behind, rtol=1e-9, atol=1e-9)


PARTS = {
    "transposed": lambda x, w, p: lora_dot(x, w.T, p.T),
    "made anew": lambda x, w, p: lora_dot(x, w, LowRank(p.a, p.b, p.scale)),
    "of another scale": lambda x, w, p: lora_dot(x, w, LowRank(p.a, p.b, 3.0)),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_of_a_parameter(case, x64):
    _, params, (x, y) = stack()
    kernels = jnp.ones((LAYERS, WIDTH, WIDTH)) / WIDTH + jnp.eye(WIDTH)[None]
    layer = lambda x, at: (jnp.tanh(PARTS[case](x, *at)), None)
    loss_fn = lambda p, x, y: jnp.mean((jax.lax.scan(layer, x, (kernels, p))[0] - y) ** 2)
    results = both(oplora_jax.oplora(0.1), loss_fn, params["lora"], (x, y))
    chex.assert_trees_all_close(*results, rtol=1e-10, atol=1e-12)  # float64


def test_bfloat16_parameters_keep_their_type():
    loss_fn, params, batch = stack(dtype=jnp.bfloat16)
    behind, inside = both(oplora_jax.oplora(0.1, state_dtype=jnp.float32), loss_fn, params, batch, steps=1)
    chex.assert_trees_all_equal_shapes_and_dtypes(inside, behind)
    # bfloat16 has eight bits; the layer's x and dy are rounded to it in both.
    chex.assert_trees_all_close(inside[0], behind[0], rtol=2e-2, atol=2e-2)


def test_schedules_advance_once():
    loss_fn, params, batch = stack(dtype=jnp.float32)
    tx = oplora_jax.oplora(optax.linear_schedule(0.1, 0.0, 3))
    behind, inside = both(tx, loss_fn, params, batch, steps=4)
    assert inside[1].count == 4
    chex.assert_trees_all_close(inside, behind, rtol=1e-4, atol=1e-4)  # float32, four steps


def test_a_layer_that_is_not_finite_is_left_out():
    loss_fn, params, (x, y) = stack("scan", jnp.float32)
    params["lora"] = LowRank(params["lora"].a.at[1].set(jnp.inf), params["lora"].b, 0.5)
    tx = oplora_jax.oplora(0.1)
    state = tx.init(params)
    _, updates, new = oplora_jax.value_and_update(loss_fn, tx)(params, state, x, y)
    assert int(new.skipped) == LAYERS  # a NaN goes on to all layers
    assert not any(np.any(z) for z in jax.tree.leaves(updates["lora"]))
    chex.assert_trees_all_equal(new.lora.momentum["lora"], state.lora.momentum["lora"])


def test_a_branch_that_is_not_taken_leaves_its_parameter_alone():
    loss_fn, params, (x, y) = stack("scan", jnp.float32)
    maybe = lambda params, x, y: jax.lax.cond(False, lambda: loss_fn(params, x, y), lambda: 0.0)
    tx = oplora_jax.oplora(0.1)
    state = tx.init(params)
    _, updates, new = oplora_jax.value_and_update(maybe, tx)(params, state, x, y)
    assert not any(np.any(z) for z in jax.tree.leaves(updates["lora"]))
    chex.assert_trees_all_equal(new.lora.momentum["lora"], state.lora.momentum["lora"])


def test_auxiliary_data():
    loss_fn, params, (x, y) = stack(dtype=jnp.float32)
    tx = oplora_jax.oplora(0.1)
    with_aux = lambda *arguments: (loss_fn(*arguments), {"tokens": TOKENS})
    step = oplora_jax.value_and_update(with_aux, tx, has_aux=True)
    (loss, aux), *_ = step(params, tx.init(params), x, y)
    assert aux == {"tokens": TOKENS}
    assert np.isclose(loss, loss_fn(params, x, y))


def test_one_trace():
    loss_fn, params, (x, y) = stack(dtype=jnp.float32)
    tx, traces = oplora_jax.oplora(0.1), []

    @jax.jit
    def step(params, state):
        traces.append(None)
        _, updates, state = oplora_jax.value_and_update(loss_fn, tx)(params, state, x, y)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert len(traces) == 1


def merged(params, x, y):
    return jnp.sum((x @ oplora_jax.to_dense(params["lora"])[0] - y) ** 2)


def twice(params, x, y):
    loss_fn, *_ = stack(dtype=jnp.float32)
    return loss_fn(params, x, y) + loss_fn(params, y, x)


def cast(params, x, y):
    loss_fn, *_ = stack(dtype=jnp.float32)
    return loss_fn(jax.tree.map(lambda z: z.astype(jnp.bfloat16), params), x, y)


CHAIN = optax.chain(oplora_jax.clip_by_global_norm(1.0), oplora_jax.oplora(0.1))


@pytest.mark.parametrize(
    "loss_fn, tx, words",
    [
        (merged, oplora_jax.oplora(0.1), ["['lora']", "merged", "value_and_grad"]),
        (twice, oplora_jax.oplora(0.1), ["['lora']", "used 2 times", "value_and_grad"]),
        (cast, oplora_jax.oplora(0.1), ["['lora']", "casts", "bfloat16", "expected float32"]),
        (None, CHAIN, ["tuple", "by itself", "value_and_grad"]),
        (None, oplora_jax.lora_rite(0.1), ["max_norm is 1.0", "None"]),
    ],
)
def test_what_cannot_be(loss_fn, tx, words):
    usual, params, (x, y) = stack(dtype=jnp.float32)
    with pytest.raises(ValueError) as error:
        oplora_jax.value_and_update(loss_fn or usual, tx)(params, tx.init(params), x, y)
    for word in words:
        assert word in str(error.value)


def test_a_state_of_other_parameters():
    loss_fn, params, (x, y) = stack(dtype=jnp.float32)
    tx = oplora_jax.oplora(0.1)
    other = tx.init(
        {
            "first": next(
                filter(oplora_jax.is_low_rank, jax.tree.leaves(params, is_leaf=oplora_jax.is_low_rank))
            )
        }
    )
    with pytest.raises(ValueError, match=r"tx\.init\(params\)"):
        oplora_jax.value_and_update(loss_fn, tx)(params, other, x, y)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_memory_stays_that_of_one_layer(checkpoint):
    """Temporary memory of 16 scanned layers, by XLA's count, in the arrays (tokens, width) of one layer."""
    layers, width, tokens = 16, 64, 512
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    params = LowRank(array(layers, width, 4), array(layers, 4, width))
    batch = array(layers, width, width), array(tokens, width), array(tokens, width)

    def loss_fn(params, kernels, x, y):
        layer = lambda x, at: (x + jnp.tanh(lora_dot(x, *at)), None)
        x, _ = jax.lax.scan(jax.checkpoint(layer) if checkpoint else layer, x, (kernels, params))
        return jnp.mean((x - y) ** 2)

    def memory(tx, step):
        state = jax.eval_shape(tx.init, params)
        compiled = jax.jit(step).lower(params, state, *batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (4 * tokens * width)

    def behind(tx, value_and_grad):
        def step(params, state, *batch):
            _, gradients = value_and_grad(params, *batch)
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        return memory(tx, step)

    tx, adamw = oplora_jax.oplora(0.1), optax.adamw(0.1)
    inside = memory(tx, oplora_jax.value_and_update(loss_fn, tx))
    captured = behind(tx, oplora_jax.value_and_grad(loss_fn, "outer"))
    plain = behind(adamw, jax.value_and_grad(loss_fn))
    # Of each layer the capture keeps dy, and x where that is not kept anyway. The state and its copies, of
    # 2 x 4 x 64 numbers a layer each, are small beside 512 x 64.
    assert captured - inside > 0.9 * layers
    assert inside < plain + 3
