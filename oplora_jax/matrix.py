"""Matrices that are never formed: low-rank, outer product, or dense.

A *matrix* is a `LowRank`, an `OuterProduct`, a `DenseGradient` or a plain array. The rest of the library asks
two things of it, its products with a thin matrix from the right and from the left, and looks inside no kind.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from oplora_jax import seal as seals
from oplora_jax.marker import mark
from oplora_jax.products import HIGHEST, as_wide, compute_dtype, matmul, times, transpose
from oplora_jax.sharding import entries, partition, under_auto_sharding


class _Explained(type):
    """A class that JAX's and Optax's errors about trees that do not fit name with what to do."""

    def __str__(cls) -> str:
        return (
            f"{cls!r} (a LoRA parameter, whose exact gradient is one node: label and mask whole ones, by a "
            "tree that is made of the parameters with is_leaf=oplora_jax.is_low_rank. optax.MultiSteps, "
            "optax.apply_if_finite and what else adds gradients up or makes updates of them take the factor "
            "gradients of jax.grad)"
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class LowRank(metaclass=_Explained):
    """A LoRA parameter: the matrix s a b, kept as its two factors and the scale s.

    It is one node of a tree of parameters, with the leaves a and b. In a tree of gradients or updates a
    `LowRank` node is the pair of the factors' gradients or increments, as `jax.grad` and
    `optax.apply_updates` make it. Leading axes are batch axes: the layers of a scanned model, or the experts
    of a mixture.

    Args:
      a: the left factor, `Float[Array, "*batch n r"]`.
      b: the right factor, `Float[Array, "*batch r m"]`.
      scale: a positive number, LoRA's alpha / r. It is static: no leaf, and the same in all trees.
      roles: for a kernel whose axes are not in the order batch, inputs, outputs: a letter for each axis, "b",
        "i" or "o". The kernel may have more batch axes in front, of stacked layers. It is static too.

    Examples:
      >>> import jax.numpy as jnp
      >>> from oplora_jax import LowRank, to_dense
      >>> matrix = LowRank(jnp.ones((3, 1)), jnp.ones((1, 2)), scale=2.0)
      >>> matrix.shape
      (3, 2)
      >>> to_dense(matrix).tolist()
      [[2.0, 2.0], [2.0, 2.0], [2.0, 2.0]]
    """

    # Any, because a pytree node also holds whatever jax.tree.map puts there: specs, masks, labels.
    a: Any  # Float[Array, "*batch n r"]
    b: Any  # Float[Array, "*batch r m"]
    scale: float | int = dataclasses.field(default=1.0, metadata={"static": True})
    roles: str | None = dataclasses.field(default=None, metadata={"static": True})

    def with_factors(self, a: Any, b: Any) -> "LowRank":
        """The same node with other factors: its scale and its roles are kept."""
        return dataclasses.replace(self, a=a, b=b)

    def __getitem__(self, index: Any) -> "LowRank":
        """The matrices at an index of the batch axes: of stacked layers, layer i is `p[i]`.

        Raises:
          TypeError: a matrix without batch axes.
          IndexError: an index out of bounds, where it is known when traced.
        """
        *batch, n, m = self.shape
        if not batch:
            raise TypeError(f"a LowRank of shape ({n}, {m}) has no batch axes to index")
        places = np.arange(math.prod(batch)).reshape(batch)
        traced = any(isinstance(z, jax.Array) for z in jax.tree.leaves(index))
        # NumPy says where an index is out of bounds; JAX would clip it.
        places = jnp.asarray(places)[index] if traced else places[index]
        stack = lambda z: z.reshape(-1, *z.shape[-2:])
        pick = lambda z: jnp.take(stack(z), places, axis=0, mode="clip")
        if places.ndim == 0 and not traced:
            pick = lambda z: stack(z)[int(places)]
        return self.with_factors(pick(self.a), pick(self.b))

    @property
    def T(self) -> "LowRank":
        """The transposed matrix, s b^T a^T; batch axes stay where they are."""
        roles = self.roles and self.roles.translate(str.maketrans("io", "oi"))
        return dataclasses.replace(self, a=transpose(self.b), b=transpose(self.a), roles=roles)

    def astype(self, dtype: Any) -> "LowRank":
        """The same matrix with its factors in another type."""
        return self.with_factors(self.a.astype(dtype), self.b.astype(dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix, `(*batch, n, m)`."""
        return (*self.a.shape[:-1], self.b.shape[-1])

    dtype = property(lambda self: jnp.result_type(self.a, self.b))

    def to_dense(self) -> Float[Array, "*batch n m"]:
        """The matrix as an array, as `oplora_jax.to_dense` forms it."""
        dense = formed(self)
        return mark("dense", dense, dense, self.a, self.b, scale=self.scale)


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, eq=False)
class OuterProduct:
    """The exact gradient of a dense layer's weight, the matrix x^T dy, kept as x and dy.

    `value_and_grad` returns it where that takes less arithmetic than forming the matrix, and the optimizers
    multiply with it. All leaves may be multiplied by one number, as `optax.scale` and the undoing of a loss
    scale do. Anything else leaf by leaf, such as a sum or an average over devices or steps, is an error once
    it is used, and in a compiled program a step that is skipped and counted: take `gradient="dense"` there.
    Clip with `clip_by_global_norm`.

    Args:
      x: the layer's inputs, `Float[Array, "*batch N n"]`, one row for each of N tokens.
      dy: the gradient at its outputs, `Float[Array, "*batch N m"]`.
      seal: leave it out. A third leaf by which the library tells whether all leaves were multiplied alike.
    """

    x: Any  # Float[Array, "*batch N n"]
    dy: Any  # Float[Array, "*batch N m"]
    seal: Any = None  # see seal.py; opened, (*batch, 1), what x^T dy is to be multiplied with, or ()

    def tree_flatten_with_keys(self) -> Any:
        seal = seals.seal_of(self.x, self.dy) if self.seal is None else self.seal
        leaves = {"x": self.x, "dy": self.dy, "seal": seal}
        return tuple((jax.tree_util.GetAttrKey(name), leaf) for name, leaf in leaves.items()), None

    @classmethod
    def tree_unflatten(cls, _: None, leaves: Any) -> "OuterProduct":
        return cls(*leaves)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix, `(*batch, n, m)`."""
        return (*self.x.shape[:-2], self.x.shape[-1], self.dy.shape[-1])

    dtype = property(lambda self: jnp.result_type(self.x, self.dy))

    def opened(self) -> "OuterProduct":
        """The same matrix, its seal read once and for all; ValueError if that is broken."""
        seal = seals.opened(self.seal, self.x, self.dy)
        return self if seal is self.seal else OuterProduct(self.x, self.dy, seal)

    def times(self, factor: Float[Array, ""]) -> "OuterProduct":
        """The matrix times a number: that of the same x."""
        return OuterProduct(self.x, (self.dy * factor).astype(self.dy.dtype), seals.times(self.seal, factor))

    def scaled(self, product: Float[Array, "*batch k l"]) -> Float[Array, "*batch k l"]:
        """What is computed of x and dy, as far as it is linear in the matrix, with the scaling done to it."""
        seal = self.opened().seal
        return product if isinstance(seal, tuple) else product * seal[..., None].astype(product.dtype)

    def to_dense(self) -> Float[Array, "*batch n m"]:
        """The matrix as an array."""
        form = lambda x, dy, seal: OuterProduct(x, dy, seal).scaled(matmul(transpose(x), dy))
        spec = lambda: partition(*matrix_entries(self))
        return under_auto_sharding(form, spec, self.x, self.dy, self.opened().seal).astype(self.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class DenseGradient:
    """An exact gradient as an array, with the second moments that `scaled_oplora` takes.

    `value_and_grad` returns it where `moments` are asked for. The gradient is a sum over N tokens, x^T dy. A
    moment is the sum of the squares over tokens, or the whole matrix, x^T x and dy^T dy.

    Args:
      gradient: the gradient of the weight, `Float[Array, "*batch n m"]`.
      x_moment: of the layer's inputs, `Float[Array, "*batch n"]` or `Float[Array, "*batch n n"]`.
      dy_moment: of the gradient at its outputs, `Float[Array, "*batch m"]` or `Float[Array, "*batch m m"]`.
      tokens: N, `Float[Array, "*batch"]`.
    """

    gradient: Any
    x_moment: Any
    dy_moment: Any
    tokens: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix, `(*batch, n, m)`."""
        return self.gradient.shape

    dtype = property(lambda self: self.gradient.dtype)

    def to_dense(self) -> Float[Array, "*batch n m"]:
        """The gradient alone."""
        return self.gradient


Matrix: TypeAlias = LowRank | OuterProduct | DenseGradient | Array
Terms: TypeAlias = Sequence[tuple[Any, Matrix]]


def is_low_rank(node: Any) -> bool:
    """Whether a node of a tree is a LoRA parameter: the `is_leaf` to walk a tree of parameters with.

    Use it for the labels and masks of `optax.partition` and `optax.masked`. Give these as trees, not as
    functions: Optax calls a function on the gradients too, where other nodes stand. It is false for a node
    that one of them has emptied.

    Args:
      node: anything.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from oplora_jax import LowRank, is_low_rank
      >>> params = {"lora": LowRank(jnp.ones((3, 1)), jnp.ones((1, 2))), "bias": jnp.zeros(2)}
      >>> jax.tree.map(lambda p: "lora" if is_low_rank(p) else "rest", params, is_leaf=is_low_rank)
      {'bias': 'rest', 'lora': 'lora'}
    """
    return isinstance(node, LowRank) and bool(jax.tree.leaves(node.a))


def is_matrix(node: Any) -> bool:
    """Whether a node of a tree of gradients stands at a LoRA parameter without being a plain array."""
    return isinstance(node, OuterProduct | DenseGradient) or is_low_rank(node)


def is_zero(value: Any) -> bool:
    """Whether a number is None or known to be zero, and what it multiplies need not exist."""
    return value is None or bool(isinstance(value, int | float) and value == 0)


def opened(matrix: Matrix) -> Matrix:
    """The same matrix, the seal of an outer product read once and for all."""
    return matrix.opened() if isinstance(matrix, OuterProduct) else matrix


def right_product(matrix: Matrix, right: Float[Array, "*#batch m k"]) -> Float[Array, "*batch n k"]:
    """matrix @ right, in float32 at least."""
    return transpose(as_wide(left_product(transpose(right), transposed(matrix))))


def left_product(left: Float[Array, "*#batch k n"], matrix: Matrix) -> Float[Array, "*batch k m"]:
    """left @ matrix, in float32 at least."""
    if isinstance(matrix, LowRank):
        return matrix.scale * times(left, matrix.a, matrix.b)
    if isinstance(matrix, OuterProduct):
        # A gradient is multiplied in its own precision: casting it up would copy all of it.
        inner = matmul(matrix.x, transpose(left).astype(matrix.x.dtype))
        return matrix.scaled(matmul(transpose(inner.astype(matrix.dy.dtype)), matrix.dy))
    dense = to_dense(matrix)
    return matmul(left.astype(dense.dtype), dense)


def transposed(matrix: Matrix) -> Matrix:
    """The transposed matrix, of the same kind."""
    if isinstance(matrix, LowRank):
        return matrix.T
    if isinstance(matrix, OuterProduct):
        return OuterProduct(matrix.dy, matrix.x, seals.swapped(matrix.seal))
    return transpose(to_dense(matrix))


def to_dense(matrix: Matrix) -> Float[Array, "*batch n m"]:
    """The array that a low-rank matrix or an exact gradient stands for.

    In a loss it is a use of a LoRA parameter that `value_and_grad` takes the exact gradient of, as an array.

    Args:
      matrix: a `LowRank`, an `OuterProduct`, a `DenseGradient` or an array, of shape `(*batch, n, m)`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from oplora_jax import OuterProduct, to_dense
      >>> to_dense(OuterProduct(x=jnp.array([[1.0, 2.0]]), dy=jnp.array([[3.0, 4.0]]))).tolist()
      [[3.0, 4.0], [6.0, 8.0]]
    """
    return matrix.to_dense() if isinstance(matrix, LowRank | OuterProduct | DenseGradient) else matrix


def formed(lora: LowRank) -> Float[Array, "*batch n m"]:
    """s a b, without the mark of a use."""
    form = lambda a, b: (lora.scale * matmul(a, b, HIGHEST)).astype(lora.dtype)
    return under_auto_sharding(form, lambda: partition(*matrix_entries(lora)), lora.a, lora.b)


def matrix_entries(matrix: Matrix) -> tuple[Any, ...]:
    """How a matrix is sharded, or would be if it were formed: rows as a or x, columns as b or dy."""
    if isinstance(matrix, LowRank):
        return *entries(matrix.a)[:-1], entries(matrix.b)[-1]
    if isinstance(matrix, OuterProduct):
        return *entries(matrix.x)[:-2], entries(matrix.x)[-1], entries(matrix.dy)[-1]
    return entries(to_dense(matrix))


def thin_factors(matrix: LowRank | OuterProduct) -> tuple[Array, Array]:
    """(left, right), of shapes (*batch, k, n) and (*batch, k, m), with matrix = left^T right."""
    if isinstance(matrix, OuterProduct):
        return matrix.scaled(matrix.x), matrix.dy
    return matrix.scale * transpose(matrix.a), matrix.b


def common_shape(terms: Terms) -> tuple[int, ...]:
    """The shape that all terms of a sum have, checked."""
    if not terms:
        raise ValueError("a sum needs at least one term, a pair of a coefficient and a matrix")
    for index, (_, term) in enumerate(terms):
        if isinstance(term, LowRank):
            check_factors(term, f"term {index}")
        if term.shape != terms[0][1].shape:
            of_all = f"term {index} is {term.shape}, term 0 is {terms[0][1].shape}"
            raise ValueError(f"the terms of a sum must have one shape; {of_all}")
    return terms[0][1].shape


def check_factors(matrix: LowRank, name: str) -> None:
    """Raises ValueError unless a (*batch, n, r) and b (*batch, r, m) fit together."""
    a, b = jnp.shape(matrix.a), jnp.shape(matrix.b)
    if len(a) < 2 or len(b) != len(a) or a[:-2] != b[:-2] or a[-1] != b[-2] or a[-1] == 0:
        raise ValueError(
            f"{name}: factors a {a} and b {b} do not fit; expected a (*batch, n, r) and b (*batch, r, m) "
            "with the same batch axes and the same rank r >= 1. oplora_jax.linen.add_lora makes "
            "them so for layers that nn.scan stacks along another axis than the first"
        )
    if not 0 < matrix.scale < math.inf:
        raise ValueError(f"{name}: scale is {matrix.scale}; expected a positive number, alpha / r")


def to_unit_scale(matrix: LowRank) -> LowRank:
    """The same matrix with scale 1, shared between the factors, and in the type of the solves."""
    dtype, root = compute_dtype(matrix.a, matrix.b), math.sqrt(matrix.scale)
    a, b = matrix.a.astype(dtype), matrix.b.astype(dtype)
    return LowRank(a, b) if root == 1 else LowRank(root * a, root * b)


def from_unit_scale(matrix: LowRank, like: LowRank) -> LowRank:
    """Undoes `to_unit_scale`: a matrix of scale 1, with the scale and the types of `like`."""
    root = math.sqrt(like.scale)
    a, b = (matrix.a, matrix.b) if root == 1 else (matrix.a / root, matrix.b / root)
    return like.with_factors(a.astype(like.a.dtype), b.astype(like.b.dtype))
