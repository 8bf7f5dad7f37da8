"""Random arrays, and arrays as NumPy's, for all tests. A seed may be a generator that goes on."""

import jax
import jax.numpy as jnp
import numpy as np

from oplora_jax import LowRank, OuterProduct, to_dense
from oplora_jax.adapters.kernel_axes import add_increment

KINDS = ("low_rank", "outer", "dense")


def f64(x):
    return np.asarray(x, np.float64)


def normals(seed, dtype=None):
    """A function that draws one array of standard normal entries after the other; JAX's float by default."""
    rng = np.random.default_rng(seed)
    return lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)


def normal(seed, *shape, dtype=None):
    """One array of standard normal entries."""
    return normals(seed, dtype)(*shape)


def normal_like(seed, tree, size=1.0, dtype=None):
    """A tree of normal entries of this size, of the tree's types by default."""
    rng = np.random.default_rng(seed)
    draw = lambda z: jnp.asarray(size * rng.standard_normal(z.shape), dtype or z.dtype)
    return jax.tree.map(draw, tree)


def draw_matrix(kind, rng, shape, batch=(), dtype=jnp.float32, scale=1.0):
    """A matrix of one kind and of shape (n, m, inner size), and the float64 array of what it stands for."""
    n, m, k = shape
    new = normals(rng, dtype)
    if kind == "low_rank":
        a, b = new(*batch, n, k), new(*batch, k, m)
        return LowRank(a, b, scale), scale * f64(a) @ f64(b)
    if kind == "outer":
        x, dy = new(*batch, k, n), new(*batch, k, m)
        return OuterProduct(x, dy), np.swapaxes(f64(x), -1, -2) @ f64(dy)
    dense = new(*batch, n, m)
    return dense, f64(dense)


def as_kernel(matrix, roles, shape):
    """A matrix (*batch, n, m) as an array of the shape and the roles of a kernel's axes."""
    dense = to_dense(matrix)
    identity = jnp.broadcast_to(jnp.eye(dense.shape[-1]), (*dense.shape[:-2], *[dense.shape[-1]] * 2))
    return add_increment(jnp.zeros(shape, dense.dtype), LowRank(dense, identity, roles=roles))
