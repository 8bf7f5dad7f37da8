"""How the full gradient of a LoRA weight leaves the backward pass: taps.

While it differentiates, `value_and_grad` puts a `Tapped` node in the place of each `LowRank`. Its taps are
zeros which no forward pass reads, and whose cotangents are x and dy, or x^T dy. A layer ties them to its
outputs by a marker, the identity. It is a primitive, so that `count_uses` finds it in a traced program and a
`jax.vmap` over x alone makes one more token axis, where `jax.custom_vjp` would add the captures up.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from oplora_jax import _jax
from oplora_jax.matrix import DenseGradient, LowRank, OuterProduct, matmul, transpose
from oplora_jax.metrics import second_moment
from oplora_jax.sharding import shard_like, specs_of, under_auto_sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Tapped(LowRank):
    """A `LowRank` whose tap's cotangent is the gradient of the matrix it stands for.

    tap is () while uses are counted, (x, dy) to capture an outer product, (gradient,) for a dense one, and
    (gradient, x_moment, dy_moment, tokens) for a dense one with the moments of its tokens. With a rule, a
    function (a, b, held, x, dy) that returns the taps' cotangents, they are anything else that is made of
    the factors, of the arrays in held and of the rows of x and dy.
    """

    tap: tuple[Any, ...] = ()
    held: tuple[Any, ...] = ()
    rule: Any = dataclasses.field(default=None, metadata={"static": True})

    def to_dense(self) -> Float[Array, "*batch n m"]:
        dense = super().to_dense()
        if not self.tap:
            return _marker(dense, dense, (self.a, self.b), (), "dense", self.a.ndim - 2)
        return dense + shard_like(self.tap[0].astype(dense.dtype), dense)


def from_tap(cotangents: tuple[Array, ...]) -> OuterProduct | DenseGradient | Array:
    """The gradient, from the cotangents of its taps."""
    kinds = {1: lambda gradient: gradient, 2: OuterProduct, 4: DenseGradient}
    return kinds[len(cotangents)](*cotangents)


def mark(
    x: Float[Array, "*tokens n"],
    y: Float[Array, "*tokens m"],
    lora: LowRank,
    *kernel: Float[Array, "*batch n m"],
    precision: Any = None,
) -> Float[Array, "*tokens m"]:
    """y = x (W + s a b), or x times the increment alone, tied to the taps of `lora` if it has any."""
    if not isinstance(lora, Tapped):
        return y
    batch = lora.a.ndim - 2
    if not lora.tap:  # for `count_uses`, which asks where x, the kernel and the factors come from
        return _marker(x, y, (lora.a, lora.b), kernel, "dot", batch)
    if lora.rule is None:
        return _marker(x, y, lora.tap, (), partial(_gradient, precision), batch)
    rule = lambda taps, held, x, dy: lora.rule(*held[:2], held[2:], x, dy)
    return _marker(x, y, lora.tap, (lora.a, lora.b, *lora.held), rule, batch)


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


# (x, y, *taps, *held) -> y, where x, y and all taps begin with `batch` batch axes. `rule` is a function of
# (types of the taps, held, rows of x, rows of dy) that returns the taps' cotangents. In a program that is
# only read it is the kind of use, "dot" or "dense", and the taps are the factors.
tap_p = _jax.Primitive("lora_tap")
tap_p.def_impl(lambda x, y, *rest, **static: y)
tap_p.def_abstract_eval(lambda x, y, *rest, **static: y)
_jax.register_lowering(tap_p, lambda context, x, y, *rest, **static: [y])


def _marker(x: Array, y: Array, taps: Sequence[Array], held: Sequence[Array], rule: Any, batch: int) -> Array:
    return tap_p.bind(x, y, *taps, *held, taps=len(taps), rule=rule, batch=batch)


def _jvp(primals, tangents, *, taps, rule, batch):
    out = tap_p.bind(*primals, taps=taps, rule=rule, batch=batch)
    (x, _, *rest), (_, dy, *along) = primals, tangents
    tap, along = rest[:taps], along[:taps]
    if isinstance(rule, str) or all(isinstance(t, _jax.Zero) for t in along):
        return out, dy
    captured = _captured(x, out, tap, rest[taps:], rule, batch)
    return out, _jax.add_tangents(dy, jax.jvp(captured, tap, [*map(_jax.instantiate_zeros, along)])[1])


def _captured(x: Array, y: Array, taps: list[Array], held: list[Array], rule: Any, batch: int) -> Any:
    """A function of the taps, zeros like y. Their cotangents are what the rule makes of x and dy."""
    types = [jax.typeof(tap) for tap in taps]

    def capture(x, held, dy):
        rows = (z.reshape(*z.shape[:batch], -1, z.shape[-1]) for z in (x, dy))
        made = zip(rule(types, held, *rows), types, strict=True)
        made = [cotangent.reshape(tap.shape).astype(tap.dtype) for cotangent, tap in made]
        # The sums over the devices of a `jax.shard_map` that see the same taps; elsewhere this does nothing.
        add_zeros = lambda at: [z + jnp.zeros_like(c) for z, c in zip(at, made, strict=True)]
        return jax.vjp(add_zeros, [jnp.zeros(tap.shape, tap.dtype) for tap in types])[1](made)[0]

    def backward(kept, dy):
        return tuple(under_auto_sharding(capture, lambda: specs_of(types), *kept, dy))

    zeros = jax.custom_vjp(lambda *taps: jnp.zeros_like(y))
    zeros.defvjp(lambda *taps: (jnp.zeros_like(y), (x, held)), backward)
    return zeros


def _batch(operands, axes, *, taps, rule, batch):
    [size] = {z.shape[axis] for z, axis in zip(operands, axes, strict=True) if axis is not None}

    def put(at, z, axis):
        z = jnp.broadcast_to(z, (size, *z.shape)) if axis is None else jnp.moveaxis(z, axis, 0)
        return jnp.moveaxis(z, 0, at)

    if any(axis is not None for axis in axes[2:]):
        operands = map(partial(put, 0), operands, axes)
        return tap_p.bind(*operands, taps=taps, rule=rule, batch=batch + 1), 0
    # One more axis of tokens, behind the batch axes.
    x, y = map(partial(put, batch), operands[:2], axes[:2])
    return tap_p.bind(x, y, *operands[2:], taps=taps, rule=rule, batch=batch), batch


_jax.primitive_jvps[tap_p] = _jvp
_jax.primitive_batchers[tap_p] = _batch
