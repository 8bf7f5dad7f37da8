"""The mark that a product with a LoRA parameter leaves in a traced program.

`lora_dot` and `to_dense` leave it in every program: the identity of their result, with the operands beside.
`value_and_grad` finds there which parameter was multiplied with what. A compiled program has nothing of it.
"""

from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from oplora_jax import _jax


def mark(
    kind: str,
    x: Float[Array, "*tokens k"],
    y: Float[Array, "*tokens m"],
    a: Float[Array, "*batch n r"],
    b: Float[Array, "*batch r m"],
    *kernel: Float[Array, "*batch n m"],
    scale: float | int,
    precision: Any = None,
) -> Array:
    """y, marked: "dot", x (kernel + scale a b) or x (scale a b); or "dense", scale a b, with x = y.

    x and y begin with the batch axes.
    """
    return marker_p.bind(x, y, a, b, *kernel, kind=kind, scale=scale, precision=precision, batch=a.ndim - 2)


# (x, y, a, b, *kernel) -> y, where all operands begin with `batch` batch axes.
marker_p = _jax.Primitive("lora")
marker_p.def_impl(lambda x, y, *rest, **static: y)
marker_p.def_abstract_eval(lambda x, y, *rest, **static: y)
_jax.register_lowering(marker_p, lambda context, x, y, *rest, **static: [y])


def _jvp(primals, tangents, **static):
    return marker_p.bind(*primals, **static), tangents[1]


def _transpose(cotangent, x, y, *rest, **static):
    return [None, cotangent, *[None] * len(rest)]


def _batch(operands, axes, *, batch, **static):
    [size] = {z.shape[axis] for z, axis in zip(operands, axes, strict=True) if axis is not None}

    def put(at, z, axis):
        z = jnp.broadcast_to(z, (size, *z.shape)) if axis is None else jnp.moveaxis(z, axis, 0)
        return jnp.moveaxis(z, 0, at)

    if any(axis is not None for axis in axes[2:]):
        return marker_p.bind(*map(partial(put, 0), operands, axes), batch=batch + 1, **static), 0
    # One more axis of tokens, behind the batch axes.
    x, y = map(partial(put, batch), operands[:2], axes[:2])
    return marker_p.bind(x, y, *operands[2:], batch=batch, **static), batch


_jax.primitive_jvps[marker_p] = _jvp
_jax.primitive_transposes[marker_p] = _transpose
_jax.primitive_batchers[marker_p] = _batch
