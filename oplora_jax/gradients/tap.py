"""How the full gradient of a LoRA weight leaves the backward pass: taps.

Taps are zeros which no forward pass reads, and whose cotangents are x and dy, or x^T dy, or anything else
that is made of them. `with_taps` evaluates a traced program with taps at the marks in it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from oplora_jax.gradients.views import View
from oplora_jax.matrix import DenseGradient, OuterProduct
from oplora_jax.metrics import second_moment
from oplora_jax.products import matmul, transpose
from oplora_jax.sharding import shard_like, specs_of, under_auto_sharding, vary_like


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Tap:
    """What goes through a program beside a factor of a LoRA parameter, with the same batch axes.

    It tells which factor that is. Beside one that stands first where the parameter is used, zeros is (x, dy)
    to capture an outer product, (gradient,) for a dense one, and (gradient, x_moment, dy_moment, tokens) for
    a dense one with the moments of its tokens. With a rule, a function (a, b, held, x, dy) that returns the
    cotangents, they are anything else that is made of the factors, of the arrays in held and of the rows of x
    and dy.
    """

    zeros: tuple[Any, ...]
    held: tuple[Any, ...] = ()
    view: View = dataclasses.field(metadata={"static": True}, kw_only=True)
    scale: float | int = dataclasses.field(metadata={"static": True}, kw_only=True)
    rule: Any = dataclasses.field(default=None, metadata={"static": True})


def from_tap(cotangents: tuple[Array, ...]) -> OuterProduct | DenseGradient | Array:
    """The gradient, from the cotangents of its taps."""
    kinds = {1: lambda gradient: gradient, 2: OuterProduct, 4: DenseGradient}
    return kinds[len(cotangents)](*cotangents)


def tapped(tap: Tap, mark: dict[str, Any], x: Any, y: Any, a: Any, b: Any) -> Any:
    """The marked value y, tied to the zeros of a tap."""
    kind, precision, batch = mark["kind"], mark["precision"], mark["batch"]
    x, y = jnp.asarray(x), jnp.asarray(y)
    back, ratio = tap.view.side == 1, mark["scale"] / tap.scale
    if kind == "dense":
        [gradient] = tap.zeros
        gradient = (transpose(gradient) if back else gradient).astype(y.dtype)
        return y + shard_like(gradient if ratio == 1 else ratio * gradient, y)
    rule = (
        functools.partial(_gradient, precision) if tap.rule is None else functools.partial(_by_rule, tap.rule)
    )
    held = () if tap.rule is None else (*((transpose(b), transpose(a)) if back else (a, b)), *tap.held)
    types = [jax.typeof(zero) for zero in tap.zeros]

    def capture(x, held, dy):
        dy = dy if ratio == 1 else ratio * dy
        rows = [z.reshape(*z.shape[:batch], -1, z.shape[-1]) for z in (x, dy)]
        made = zip(rule(types, held, *(rows[::-1] if back else rows)), types, strict=True)
        made = [cotangent.reshape(zero.shape).astype(zero.dtype) for cotangent, zero in made]
        # The sums over the devices of a `jax.shard_map` that see the same taps; elsewhere this does nothing.
        add_zeros = lambda at: [z + jnp.zeros_like(c) for z, c in zip(at, made, strict=True)]
        zeros = [vary_like(jnp.zeros(zero.shape, zero.dtype), zero) for zero in types]
        return jax.vjp(add_zeros, zeros)[1](made)[0]

    def backward(kept, dy):
        x, held = kept
        taps = under_auto_sharding(capture, lambda: specs_of(types), x, held, dy)
        return None, dy, tuple(taps), None

    identity = jax.custom_vjp(lambda x, y, zeros, held: y)
    identity.defvjp(lambda x, y, zeros, held: (y, (x, held)), backward)
    return identity(x, y, tap.zeros, held)


def _by_rule(rule: Any, taps: list[Any], held: Any, x: Array, dy: Array) -> tuple[Array, ...]:
    return rule(*held[:2], held[2:], x, dy)


def _gradient(precision: Any, taps: list[Any], held: Any, x: Array, dy: Array) -> tuple[Array, ...]:
    """The cotangents of the taps of a gradient, from the rows of x and dy."""
    if len(taps) == 2:
        return x, dy
    product = matmul(transpose(x), dy, precision)
    if len(taps) < 4:
        return (product,)
    gradient, x_moment, _, tokens = taps
    structure = "dense" if len(x_moment.shape) == len(gradient.shape) else "diagonal"
    moments = (second_moment(rows, structure) for rows in (x, dy))
    return product, *moments, jnp.full(tokens.shape, x.shape[-2], tokens.dtype)
