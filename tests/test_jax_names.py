"""What the library needs of JAX and is not public: that it is there, and does what is needed.

A version of JAX that moves a name fails here, by the name.
"""

import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

import oplora_jax
from oplora_jax import LowRank, _jax, lora_dot
from tests.sources import uses

PACKAGE = pathlib.Path(oplora_jax.__file__).parent
NOT_PUBLIC = ("jax.core", "jax.extend", "jax.interpreters", "jax._src")


def is_private(module, name):
    full = f"{module}.{name}"
    return any(full == private or full.startswith(f"{private}.") for private in NOT_PUBLIC)


NAMES = sorted({z for z in uses(PACKAGE / "_jax.py") if is_private(*z)})


@pytest.mark.parametrize("module, name", NAMES)
def test_the_name_is_there(module, name):
    found = hasattr(importlib.import_module(module), name)
    assert found, f"JAX {jax.__version__} has no {module}.{name}, which oplora_jax/_jax.py imports"
    assert name in TESTED, f"{name}: no test says what it is needed for"


def test_they_are_imported_in_one_place():
    assert NAMES
    paths = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "_jax.py"]
    found = {(path.name, *z) for path in paths for z in uses(path)}
    assert ("marker.py", "_jax", "Primitive") in found  # attributes are seen
    assert {z for z in found if is_private(*z[1:])} == set()


def check_abstract_value():
    """The type of an array, which has its sharding."""
    aval = jax.typeof(jnp.ones((2, 3)))
    assert isinstance(aval, _jax.AbstractValue)
    assert not isinstance(jnp.ones(2), _jax.AbstractValue)
    assert (aval.shape, aval.ndim, aval.sharding.spec) == ((2, 3), 2, PartitionSpec(None, None))


def check_tracer():
    """An array while a program is traced."""
    seen = []
    jax.jit(lambda x: seen.append(isinstance(x, _jax.Tracer)) or x)(1.0)
    assert seen == [True]
    assert not isinstance(jnp.ones(2), _jax.Tracer)


def check_programs():
    """A traced program and its constants."""
    program = jax.make_jaxpr(lambda x: jax.jit(jnp.sin)(x) + 1.0)(jnp.ones(()))
    assert isinstance(program, _jax.ClosedJaxpr)
    assert isinstance(program.jaxpr, _jax.Jaxpr)
    [x] = program.jaxpr.invars
    inner, add = program.jaxpr.eqns
    assert isinstance(inner.params["jaxpr"], _jax.ClosedJaxpr | _jax.Jaxpr)
    assert inner.invars[0] is x
    assert [isinstance(z, _jax.Literal) for z in add.invars] == [False, True]
    assert program.jaxpr.outvars == add.outvars


def check_primitive():
    """A primitive with rules of its own: derivatives, their transposes, vmap, and how it is compiled."""
    second = _jax.Primitive("second")
    second.def_impl(lambda x, y: y)
    second.def_abstract_eval(lambda x, y: y)
    _jax.register_lowering(second, lambda context, x, y: [y])
    _jax.primitive_jvps[second] = lambda primals, tangents: (second.bind(*primals), tangents[1])
    _jax.primitive_transposes[second] = lambda cotangent, x, y: [None, cotangent]
    _jax.primitive_batchers[second] = lambda operands, axes: (second.bind(*operands), axes[1])
    x, y = jnp.arange(3.0), jnp.ones(3)
    for wrap in (lambda f: f, jax.jit):
        np.testing.assert_array_equal(wrap(second.bind)(x, y), y)
        np.testing.assert_array_equal(wrap(jax.vmap(second.bind))(x, y), y)
        gradient = jax.grad(lambda *at, wrap=wrap: jnp.sum(wrap(second.bind)(*at) ** 2), (0, 1))
        np.testing.assert_array_equal(gradient(x, y), [0 * y, 2 * y])
        transposed = jax.linear_transpose(lambda y, wrap=wrap: wrap(second.bind)(3 * y, y), y)
        np.testing.assert_array_equal(transposed(y), [y])


def check_evaluation():
    """An equation is evaluated where it was written: its place in the source, its name, its mesh."""

    def named(x):
        with jax.named_scope("inner"):
            return jnp.sin(x)

    [eqn] = jax.make_jaxpr(named)(1.0).eqns

    def again(x):
        with jax.named_scope("outer"):
            stack = _jax.current_name_stack() + eqn.source_info.name_stack
            with _jax.user_context(eqn.source_info.traceback, name_stack=stack), eqn.ctx.manager:
                params = eqn.primitive.get_bind_params(eqn.params)
                params = params[1] if isinstance(params, tuple) else params  # JAX 0.9.0 and 0.9.1
                return eqn.primitive.bind(x, **params)

    assert "outer/inner" in jax.jit(again).lower(1.0).as_text(debug_info=True)


TESTED = {
    "AbstractValue": check_abstract_value,
    "Tracer": check_tracer,
    **dict.fromkeys(("ClosedJaxpr", "Jaxpr", "Literal"), check_programs),
    **dict.fromkeys(("Primitive", "register_lowering", "primitive_batchers"), check_primitive),
    **dict.fromkeys(("primitive_jvps", "primitive_transposes"), check_primitive),
    **dict.fromkeys(("current_name_stack", "user_context"), check_evaluation),
}


@pytest.mark.parametrize("check", sorted(set(TESTED.values()), key=lambda f: f.__name__))
def test_the_name_does_what_is_needed(check):
    check()


LOOPS = {
    "jit": (lambda x: jax.jit(jnp.sin)(x), ("jaxpr", "name", "inline")),
    "scan": (
        lambda x: jax.lax.scan(lambda c, z: (c + z, c), x, jnp.ones(3))[0],
        ("jaxpr", "length", "reverse", "unroll"),
    ),
    "cond": (lambda x: jax.lax.cond(x > 0, jnp.sin, jnp.cos, x), ("branches",)),
}


@pytest.mark.parametrize("name", LOOPS)
def test_control_flow_is_called_what_it_is_read_as(name):
    function, params = LOOPS[name]
    eqns = [z for z in jax.make_jaxpr(function)(1.0).eqns if z.primitive.name == name]
    assert len(eqns) == 1
    assert set(params) <= set(eqns[0].params)


MOVES = {
    "reshape": lambda z: z.reshape(1, 1, *z.shape).reshape(1, *z.shape)[0],
    "transpose": lambda z: z.T.T,
    "a new axis, and a static index": lambda z: z[None][0],
    "an index that is traced": lambda z: z[None][jnp.zeros((), int)],
    "a dynamic slice": lambda z: jax.lax.dynamic_slice_in_dim(z, jnp.zeros((), int), len(z)),
    "another type": lambda z: z.astype(jnp.bfloat16).astype(jnp.float32),
    "rounding": lambda z: jax.lax.reduce_precision(z, 8, 7),
    "a copy": jnp.copy,
    "device_put": lambda z: jax.device_put(z, jax.devices()[0]),
    "a name": lambda z: checkpoint_name(z, "factor"),
    "a barrier": jax.lax.optimization_barrier,
}


@pytest.mark.parametrize("move", MOVES)
def test_a_factor_that_is_only_moved_is_still_known(move):
    """An operation is known by its name, too: under another one it would be refused."""
    lora, x = LowRank(jnp.ones((3, 2)), jnp.ones((2, 4))), jnp.ones((5, 3))
    loss = lambda p: jnp.sum(lora_dot(x, jnp.ones((3, 4)), jax.tree.map(MOVES[move], p)))
    gradient = oplora_jax.grad(loss, "dense")(lora)
    np.testing.assert_array_equal(gradient, np.full((3, 4), 5.0))
