"""What tells an outer product that was scaled from one that is a sum of others.

The factors of an outer product are leaves of a tree, so `optax.scale(c)` makes it c^2 times as large, and the
average of two is not the average of the two products. Its seal is a third leaf, (t, p, q), at first 1 and the
squared norms of x and dy. Once all leaves are c times what they were the matrix x^T dy / t is c times what it
was, and p and q are the squared norms over t. In a sum they are larger, as far as the x, or the dy, differ:
that is Cauchy's and Schwarz's inequality. A sum that rounding does not tell from a scaling is right up to it.
"""

import weakref
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from oplora_jax._jax import Tracer
from oplora_jax.products import compute_dtype
from oplora_jax.sharding import entries, partition, under_auto_sharding

# Of each seal that there is: itself, and the x and the dy that it was made of.
_made: dict[int, tuple[weakref.ref, ...]] = {}


def seal_of(x: Any, dy: Any) -> Any:
    """The seal of an outer product as it is; of types of arrays its type; None if these are neither."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.eval_shape(seal_of, x, dy)
    if not isinstance(x, jax.Array | np.ndarray):
        return None

    def form(x, dy):
        p, q = _squared_norm(x, 1.0), _squared_norm(dy, 1.0)
        return jnp.stack([jnp.ones_like(p), p, q], axis=-1)

    seal = under_auto_sharding(form, lambda: partition(*entries(x)[:-2]), jnp.asarray(x), jnp.asarray(dy))
    _made[id(seal)] = tuple(map(weakref.ref, (seal, x, dy)))
    weakref.finalize(seal, _made.pop, id(seal), None)
    return seal


def opened(seal: Any, x: Array, dy: Array) -> Any:
    """What x^T dy is to be multiplied with, 1 / t: (*batch, 1), or () where it never was leaves.

    It is NaN where x^T dy is a sum, and 0 where all was scaled by 0. An opened seal is returned as it is.

    Raises:
      ValueError: a sum, outside of traced programs.
    """
    if seal is None:
        return ()
    if isinstance(seal, tuple) or seal.shape[-1] == 1:
        return seal
    made = _made.get(id(seal))
    if made is not None and all(z is of() for z, of in zip((seal, x, dy), made, strict=True)):
        return ()  # leaves for a moment, as NNX makes them: compiled programs have nothing of the seal then

    def form(seal, x, dy):
        t, *norms = (seal[..., k] for k in range(3))
        undo = jnp.where(t == 0, 1, t)
        differs = [_differs(z, undo, norm) for z, norm in zip((x, dy), norms, strict=True)]
        is_sum = differs[0] | differs[1]
        return jnp.where(t == 0, 0, 1 / undo)[..., None], is_sum[..., None]

    batch = lambda: partition(*entries(x)[:-2])
    factor, is_sum = under_auto_sharding(form, lambda: (batch(), batch()), seal, x, dy)
    if not isinstance(is_sum, Tracer) and bool(jnp.any(is_sum)):
        raise ValueError(
            "this OuterProduct was added to others, averaged, or changed leaf by leaf in another way than "
            "multiplying by a number, which its factors x and dy cannot be. Take gradient='dense' to average "
            "gradients over devices or steps, or microbatches= to accumulate them"
        )
    return jnp.where(is_sum, jnp.nan, factor)


def swapped(seal: Any) -> Any:
    """The seal of the transposed matrix."""
    if seal is None or isinstance(seal, tuple) or seal.shape[-1] == 1:
        return seal
    return jnp.stack([seal[..., k] for k in (0, 2, 1)], axis=-1)


def times(seal: Any, factor: Any) -> Any:
    """The seal of x^T (factor dy)."""
    if seal is None:
        return None
    t, p, q = (seal[..., k] for k in range(3))
    return jnp.stack([t, p, q * factor**2], axis=-1)


def _differs(z: Array, undo: Array, norm: Array) -> Array:
    found, expected = _squared_norm(z, undo[..., None, None]), norm / undo
    # In less than float32 the number that all is multiplied with may be rounded, and each product is; in more
    # the sums of millions are, in another order. Next to nothing is rounded to nothing.
    tolerance = float(jnp.finfo(z.dtype).eps) * (2 if z.dtype.itemsize < 4 else 4000)
    return jnp.abs(found - expected) > tolerance * jnp.abs(expected) + 1e-30


def _squared_norm(z: Array, undo: Any) -> Array:
    """In float32 at least, with the scaling undone first: rounded to zero alike."""
    return jnp.sum((z.astype(compute_dtype(z)) / undo) ** 2, axis=(-2, -1))
