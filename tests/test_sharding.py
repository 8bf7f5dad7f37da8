"""Training on a mesh of eight devices gives the numbers of one device, and keeps every array where it is."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import oplora_jax
from oplora_jax import LowRank, OuterProduct, is_low_rank, lora_dot
from tests.meshes import BOTH, LAYOUTS, assert_lie_alike, make_mesh, spec

N, HIDDEN, M, R = 16, 24, 8, 2


def explicit_part(spec, mesh):
    """What a program says of a sharding: the axes that are explicit. None where there is none."""
    named = P(*(name if name in mesh.abstract_mesh.explicit_axes else None for name in spec))
    return named if mesh.abstract_mesh.explicit_axes else None


def problem():
    """(params, x, y, kernels) of two layers with LoRA, and a bias that is trained as it is."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: np.float32(0.5 * rng.standard_normal(shape))
    params = {
        "first": LowRank(normal(N, R), normal(R, HIDDEN), 2.0),
        "second": LowRank(normal(HIDDEN, R), normal(R, M), 2.0),
        "bias": normal(M),
    }
    kernels = {"first": normal(N, HIDDEN), "second": normal(HIDDEN, M)}
    return params, normal(16, 2, N), normal(16, 2, M), kernels


def loss_fn(params, x, y, kernels, hidden=None, outputs=None):
    """On a mesh with explicit axes hidden and outputs say how the two products are sharded."""
    h = jnp.tanh(lora_dot(x, kernels["first"], params["first"], out_sharding=hidden))
    prediction = lora_dot(h, kernels["second"], params["second"], out_sharding=outputs)
    return jnp.mean((prediction + params["bias"][None, None] - y) ** 2)


def spread(layout, mesh):
    """The problem on a mesh: a is sharded as the rows of its kernel, b as the columns."""
    params, x, y, kernels = problem()
    put = lambda array, *spec: jax.device_put(array, NamedSharding(mesh, P(*spec)))
    for name, kernel_spec in (("first", layout.first), ("second", layout.second)):
        rows, columns = (*kernel_spec, None, None)[:2]
        param = params[name]
        params[name] = LowRank(put(param.a, rows), put(param.b, None, columns), param.scale)
        kernels[name] = put(kernels[name], *kernel_spec)
    params["bias"] = put(params["bias"])
    return params, put(x, *layout.inputs), put(y, *layout.outputs), kernels


def gradient_fn(kind):
    if kind == "factors":
        return jax.value_and_grad
    kind, _, parts = kind.partition(" in ")
    settings = {"gradient": "dense", "moments": "diagonal"} if kind == "moments" else {"gradient": kind}
    microbatches = int(parts) if parts else None
    return functools.partial(oplora_jax.value_and_grad, **settings, microbatches=microbatches)


def loss_on(layout, mesh):
    hidden, outputs = (explicit_part(spec, mesh) for spec in (layout.hidden, layout.outputs))
    return functools.partial(loss_fn, hidden=hidden, outputs=outputs)


def make_step(tx, kind, loss_fn=loss_fn):
    value_and_grad = gradient_fn(kind)(loss_fn)

    @jax.jit
    def step(params, state, x, y, kernels):
        loss, gradients = value_and_grad(params, x, y, kernels=kernels)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, loss

    return step


def train(step, params, state, *data):
    """Three steps; arrays that have moved since they were compiled for would be an error."""
    # Not optimized: most of the time here is the compiler's.
    compiled = step.lower(params, state, *data).compile({"xla_backend_optimization_level": 0})
    for _ in range(3):
        params, state, loss = compiled(params, state, *data)
    return params, state, loss


OPTIMIZERS = {
    "oplora_1": oplora_jax.oplora(0.2),
    "oplora_2": oplora_jax.oplora(0.2, num_iters=2),
    "scaled_oplora": oplora_jax.scaled_oplora(0.02),
    "svdlora": oplora_jax.svdlora(optax.sgd(0.2, momentum=0.9)),
    "clipped": optax.chain(oplora_jax.clip_by_global_norm(0.1), oplora_jax.oplora(0.2)),
}
MESHES = [*((t, layout) for t in ("explicit", "auto") for layout in LAYOUTS), ("mixed", BOTH)]
CASES = [
    ("explicit", "data", "oplora_1", "outer"),
    ("explicit", "model", "oplora_1", "dense"),
    ("explicit", "fully sharded", "oplora_1", "dense"),
    ("explicit", BOTH, "oplora_1", "factors"),
    ("explicit", BOTH, "oplora_2", "outer"),
    ("explicit", BOTH, "scaled_oplora", "moments in 2"),
    ("explicit", BOTH, "svdlora", "dense"),
    ("explicit", BOTH, "clipped", "outer in 2"),
    ("auto", "fully sharded", "oplora_1", "outer"),
    ("auto", BOTH, "oplora_1", "outer"),
    ("auto", BOTH, "oplora_2", "dense"),
    ("mixed", BOTH, "oplora_1", "dense"),
]


def all_gradients(loss_fn):
    """Of every kind, in one program."""
    functions = {
        kind: gradient_fn(kind)(loss_fn) for kind in ("outer", "dense", "moments", "factors", "dense in 2")
    }
    return jax.jit(
        lambda params, x, y, kernels: {
            kind: function(params, x, y, kernels=kernels) for kind, function in functions.items()
        }
    )


@functools.cache
def gradients_on_one_device():
    return formed(all_gradients(loss_fn)(*jax.tree.map(jnp.asarray, problem())))


def formed(gradients):
    """On the host, with outer products formed."""
    is_outer = lambda g: isinstance(g, OuterProduct)
    form = lambda g: np.asarray(g.x).T @ np.asarray(g.dy) if is_outer(g) else jax.tree.map(np.asarray, g)
    return jax.tree.map(form, gradients, is_leaf=is_outer)


@pytest.mark.parametrize("axis_types, layout", MESHES)
def test_gradients_are_those_of_one_device(axis_types, layout):
    mesh = make_mesh(LAYOUTS[layout], axis_types)
    with jax.set_mesh(mesh):
        got = all_gradients(loss_on(LAYOUTS[layout], mesh))(*spread(LAYOUTS[layout], mesh))
    # float32 rounding of sums over tokens and columns, in another order
    chex.assert_trees_all_close(formed(got), gradients_on_one_device(), rtol=1e-5, atol=1e-5)


@functools.cache
def on_one_device(name, kind):
    tx, (params, *data) = OPTIMIZERS[name], jax.tree.map(jnp.asarray, problem())
    return numbers(*train(make_step(tx, kind), params, tx.init(params), *data))


@functools.cache
def on_mesh(name, layout, axis_types):
    """The start of a training run: params, state and data. Shared by the kinds of gradients."""
    mesh = make_mesh(LAYOUTS[layout], axis_types)
    with jax.set_mesh(mesh):
        params, *data = spread(LAYOUTS[layout], mesh)
        # Explicit axes are part of an array's type: a compiled init knows them.
        init = jax.jit(OPTIMIZERS[name].init) if axis_types == "explicit" else OPTIMIZERS[name].init
        return mesh, (params, init(params), *data)


def numbers(params, state, loss):
    form = lambda p: p.scale * np.asarray(p.a) @ np.asarray(p.b) if is_low_rank(p) else np.asarray(p)
    return jax.tree.map(form, params, is_leaf=is_low_rank), np.asarray(loss)


@pytest.mark.parametrize("axis_types, layout, name, kind", CASES)
def test_steps_are_those_of_one_device(axis_types, layout, name, kind):
    mesh, (params, state, *data) = on_mesh(name, layout, axis_types)
    step = make_step(OPTIMIZERS[name], kind, loss_on(LAYOUTS[layout], mesh))
    with jax.set_mesh(mesh):
        after, state_after, loss = train(step, params, state, *data)
    # Sums over devices are in another order: float32 rounding of three steps, through solves.
    chex.assert_trees_all_close(
        numbers(after, state_after, loss), on_one_device(name, kind), rtol=1e-4, atol=1e-4
    )
    assert_lie_alike((after, state_after), (params, state))
    if name.startswith("oplora"):  # each factor of the momentum lies as that of its parameter
        lora = {key: param for key, param in params.items() if is_low_rank(param)}
        assert_lie_alike(optax.tree.get(state.lora, "momentum"), lora)


def test_where_gradients_lie():
    """An outer product lies as the layer's x and dy, a formed gradient and its moments as a and b."""
    mesh, (params, _, *batch, kernels) = on_mesh("oplora_1", BOTH, "explicit")
    loss_fn = loss_on(LAYOUTS[BOTH], mesh)
    with jax.set_mesh(mesh):
        of = lambda kind: jax.eval_shape(gradient_fn(kind)(loss_fn), params, *batch, kernels=kernels)[1]
        outer, dense, moments = (of(kind) for kind in ("outer in 2", "dense", "moments"))
    assert spec(outer["first"].x) == P("data", None) and spec(outer["first"].dy) == P("data", "model")
    assert spec(outer["second"].x) == P("data", "model") and spec(outer["second"].dy) == P("data", None)
    assert spec(dense["first"]) == P(None, "model") and spec(dense["second"]) == P("model", None)
    assert spec(moments["first"].gradient) == P(None, "model")
    assert spec(moments["first"].x_moment) == P(None) and spec(moments["first"].dy_moment) == P("model")
    assert spec(moments["second"].x_moment) == P("model")


EXPLICIT = make_mesh(LAYOUTS[BOTH], "explicit")


def put(seed, shape, *spec, mesh=EXPLICIT):
    array = np.float32(np.random.default_rng(seed).standard_normal(shape))
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))


def stack(spec, kernel_spec, x_spec):
    """Four layers or experts: a LoRA parameter, its kernel and inputs."""
    lora = LowRank(0.3 * put(0, (4, N, R), *spec), 0.3 * put(1, (4, R, N), *spec), 2.0)
    return lora, 0.3 * put(2, (4, N, N), *kernel_spec), put(3, (4, 8, N), *x_spec)


def scanned(lora, kernels, x):
    body = jax.checkpoint(lambda h, layer: (jnp.tanh(lora_dot(h, *layer)), None))
    return jnp.sum(jax.lax.scan(body, x, (kernels, lora))[0] ** 2)


PROGRAMS = {
    "tokens of two axes": (
        lambda lora, kernels, x: jnp.sum(jnp.sin(lora_dot(x, kernels, lora))),
        lambda: (
            LowRank(put(0, (N, R)), put(1, (R, N))),
            put(2, (N, N)),
            put(3, (4, 8, N), "data", "model"),
        ),
        P(("data", "model"), None),
    ),
    "vmap over tokens": (
        lambda lora, kernels, x: jnp.sum(jnp.sin(jax.vmap(lambda x: lora_dot(x, kernels, lora))(x))),
        lambda: (LowRank(put(0, (N, R)), put(1, (R, N))), put(2, (N, N)), put(3, (4, 8, N), "data")),
        P("data", None),
    ),
    "experts": (
        lambda lora, kernels, x: jnp.sum(jnp.sin(lora_dot(x, kernels, lora))),
        lambda: stack(("model",), ("model",), ("model", "data")),
        P("model", "data", None),
    ),
    "experts under vmap": (
        lambda lora, kernels, x: jnp.sum(jnp.sin(jax.vmap(lora_dot)(x, kernels, lora))),
        lambda: stack(("model",), ("model",), ("model", "data")),
        P("model", "data", None),
    ),
    "scan of remat": (
        scanned,
        lambda: stack((), (), ("data",)),
        P(None, "data", None),
    ),
    "scan of remat, sharded inputs": (
        lambda lora, kernels, x: scanned(lora, kernels, x[0]),
        lambda: stack((), (), (None, "data")),
        P(None, "data", None),
    ),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_on_explicit_axes(program):
    loss_fn, build, expected_spec = PROGRAMS[program]
    lora, kernels, x = build()
    zero = LowRank(*(jnp.zeros(z.shape) for z in (lora.a, lora.b)))
    dense_loss = lambda dense: loss_fn(zero, kernels + dense, x)
    with jax.set_mesh(EXPLICIT):
        outer, dense, factors = jax.jit(
            lambda lora, kernels, x: (
                oplora_jax.grad(loss_fn, "outer")(lora, kernels, x),
                oplora_jax.grad(loss_fn, "dense")(lora, kernels, x),
                jax.grad(loss_fn)(lora, kernels, x),
            )
        )(lora, kernels, x)
    assert spec(outer.x) == expected_spec
    lora, kernels, x = jax.tree.map(lambda z: jnp.asarray(np.asarray(z)), (lora, kernels, x))
    expected = np.asarray(jax.jit(jax.grad(dense_loss))(oplora_jax.to_dense(lora)))
    # float32 rounding of sums over a few tens of tokens
    outer_x, outer_dy = np.asarray(outer.x), np.asarray(outer.dy)
    for got in (np.swapaxes(outer_x, -1, -2) @ outer_dy, dense):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        np.asarray(factors.a), lora.scale * expected @ np.swapaxes(lora.b, -1, -2), rtol=1e-4, atol=1e-3
    )


def matrix_functions(lora, outer, dense):
    sum_of_three = [(1.0, lora), (-0.1, outer), (0.1, dense)]
    return {
        "norms": [oplora_jax.frobenius_norm(z) for z in (lora, outer, dense)],
        "inner products": [oplora_jax.inner_product(lora, z) for z in (outer, dense)],
        "global norm": oplora_jax.global_norm([outer, dense]),
        "formed": [oplora_jax.to_dense(z) for z in (lora, outer)],
        "lorsum": oplora_jax.lorsum(sum_of_three, regularization=0.0),
        "svd": oplora_jax.to_dense(oplora_jax.svd(sum_of_three, rank=R)),
        "tangent": oplora_jax.tangent_gradient(lora, lora),
    }


def test_matrices_on_explicit_axes():
    """Rows and columns of one matrix over the same devices, and sums over devices."""
    lora = LowRank(put(0, (N, R), "model"), put(1, (R, HIDDEN), None, "model"))
    outer = OuterProduct(put(2, (8, N), "data", "model"), put(3, (8, HIDDEN), "data", "model"))
    arguments = lora, outer, put(4, (N, HIDDEN), "data", "model")
    with jax.set_mesh(EXPLICIT):
        got = jax.jit(matrix_functions)(*arguments)
    assert spec(got["lorsum"].b) == P(None, "model") and spec(got["formed"][1]) == P("model", None)
    expected = jax.jit(matrix_functions)(*jax.tree.map(lambda z: jnp.asarray(np.asarray(z)), arguments))
    # float32 rounding, through solves
    chex.assert_trees_all_close(*(jax.tree.map(np.asarray, z) for z in (got, expected)), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("axis_types", ["explicit", "auto"])
def test_new_parameters_lie_as_the_roles_of_their_kernels_axes(axis_types):
    """Queries (heads, inputs, size of a head): a lies as the inputs, b as heads and their sizes together."""
    mesh = make_mesh(LAYOUTS[BOTH], axis_types)
    kernels = {"q": put(0, (4, 8, 6), "model", "data", None, mesh=mesh)}
    lora = oplora_jax.init_lora(jax.random.key(0), kernels, R, {"q": "oio"})
    assert spec(lora["q"].a) == P("data", None) and spec(lora["q"].b) == P(None, "model")
    with jax.set_mesh(mesh):
        lora = {"q": lora["q"].with_factors(lora["q"].a, lora["q"].b + 1)}
        merged = jax.jit(oplora_jax.merge)(kernels, lora)
    if axis_types == "explicit":
        assert_lie_alike(merged, kernels)
    a, b = (np.asarray(z) for z in (lora["q"].a, lora["q"].b))
    expected = np.asarray(kernels["q"]) + (a @ b).reshape(8, 4, 6).transpose(1, 0, 2)
    np.testing.assert_allclose(np.asarray(merged["q"]), expected, rtol=1e-5, atol=1e-6)  # float32, R products


@pytest.mark.parametrize("axis_types", ["explicit", "auto"])
def test_new_parameters_lie_beside_their_kernels(axis_types):
    mesh = make_mesh(LAYOUTS[BOTH], axis_types)
    kernels = {
        "columns": put(0, (N, 8), None, "model", mesh=mesh),
        "rows": put(0, (2, 8, 6), "data", "model", mesh=mesh),
        "host": np.ones((4, 4), np.float32),
    }
    lora = oplora_jax.init_lora(jax.random.key(0), kernels, R, "*")
    assert spec(lora["columns"].a) == P(None, None) and spec(lora["columns"].b) == P(None, "model")
    assert spec(lora["rows"].a) == P(("data", "model"), None) and spec(lora["rows"].b) == P(None, None)
    one_device = oplora_jax.init_lora(jax.random.key(0), jax.tree.map(np.asarray, kernels), R, "*")
    chex.assert_trees_all_equal(*(jax.tree.map(np.asarray, z) for z in (lora, one_device)))
    with jax.set_mesh(mesh):
        sharded = {key: kernels[key] for key in ("columns", "rows")}
        lora = {key: LowRank(lora[key].a, lora[key].b + 1, lora[key].scale) for key in sharded}
        loss_fn = lambda lora, kernels: sum(jnp.sum(z**2) for z in oplora_jax.merge(kernels, lora).values())
        gradients = jax.jit(oplora_jax.grad(loss_fn))(lora, sharded)
        merged = jax.jit(oplora_jax.merge)(sharded, lora)
    if axis_types == "explicit":
        assert_lie_alike(merged, sharded)
    for key, kernel in sharded.items():
        expected = 2 * np.asarray(merged[key]).reshape(-1, kernel.shape[-1])
        np.testing.assert_allclose(np.asarray(gradients[key]), expected, rtol=1e-6)  # one multiplication
