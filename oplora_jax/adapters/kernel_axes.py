"""Kernels of any number of axes, as the matrices that LoRA parameters are increments of.

Each axis of a kernel has a *role*, one letter: "b", a batch axis; "i", contracted with the inputs; "o", kept
in the outputs. A dense layer's kernel is "io", a convolution's "iiio". Its matrix is (*batch, n, m), n the
product of the "i" axes and m of the "o" axes. A LoRA parameter keeps roles that are in another order.
"""

import math
import re
import string
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from oplora_jax.gradients.lora_dot import lora_increment
from oplora_jax.matrix import LowRank, to_dense
from oplora_jax.sharding import entries, merged, partition, specs_of, under_auto_sharding


def matrix_shape(shape: Sequence[int], roles: str) -> tuple[int, ...]:
    """The shape (*batch, n, m) of a kernel's matrix."""
    sizes = {role: [s for s, r in zip(shape, roles, strict=True) if r == role] for role in "bio"}
    return (*sizes["b"], math.prod(sizes["i"]), math.prod(sizes["o"]))


def axes_of(shape: Sequence[int], lora: LowRank) -> str:
    """The roles of a kernel's axes, from its LoRA parameter; ValueError if that does not fit."""
    batch, ndim = len(lora.shape) - 2, len(shape)
    counts = [(batch, inputs, ndim - batch - inputs) for inputs in range(1, ndim - batch)]
    in_order = ["b" * b + "i" * i + "o" * o for b, i, o in counts]
    for roles in in_order if lora.roles is None else [stacked(lora.roles, ndim)]:
        if len(roles) == ndim and set(roles) <= set("bio") and matrix_shape(shape, roles) == lora.shape:
            return roles
    spaces = batch - 1  # in front of the axis that stacks layers: see `with_space`
    if spaces > 0 and set(lora.shape[:spaces]) == {1}:
        in_order = ["i" * k + "o" * (ndim - 1 - k) for k in range(1, ndim - 1)]
        for known in in_order if lora.roles is None else [lora.roles]:
            roles = known[:spaces] + "b" + known[spaces:]
            if len(roles) == ndim and matrix_shape(shape, roles) == lora.shape[spaces:]:
                return roles
    found = f"the kernel is {tuple(shape)}, its LoRA parameter {lora.shape} with roles={lora.roles!r}"
    raise ValueError(f"{found}; expected n the product of the axes of inputs and m that of the outputs")


def add_increment(kernel: Any, lora: LowRank) -> Array:
    """The kernel with its LoRA increment added, in the kernel's type and with its sharding."""
    check_takes_increments(kernel)
    roles = axes_of(kernel.shape, lora)
    order = sorted(range(len(roles)), key=lambda axis: "bio".index(roles[axis]))

    def total(kernel: Any, increment: Any) -> Array:
        with jax.numpy_dtype_promotion("standard"):
            increment = increment.reshape([kernel.shape[axis] for axis in order])
            increment = increment.transpose([order.index(axis) for axis in range(len(order))])
            return (kernel + increment).astype(kernel.dtype)

    return under_auto_sharding(total, lambda: specs_of(kernel), kernel, to_dense(lora))


def check_takes_increments(kernel: Any) -> None:
    """Raises ValueError for a kernel to which no increment can be added without losing it."""
    if not isinstance(kernel, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
        what = f"a {type(kernel).__name__}, as Qwix's quantised ones are, and no array to add an increment to"
    elif not jnp.issubdtype(kernel.dtype, jnp.inexact) or kernel.dtype.itemsize < 2:
        what = f"{kernel.dtype}, which would lose the LoRA increment"
    else:
        return
    raise ValueError(
        f"the kernel is {what}. Cast it to a floating-point type of 16 bits or more first (dequantise it, if "
        "it holds codes); or keep the adapter apart, as Qwix's own LoraProvider does, with pair_factors"
    )


def with_space(lora: LowRank) -> LowRank:
    """A LoRA parameter whose factors are stacked along axis 1 or 2, as those of `nn.scan` may be.

    That axis comes in front of the factors' own, as everywhere, and axes of size 1 in front of it, so that it
    is axis 1 or 2 still: (n, layers, r) and (r, layers, m) become (1, layers, n, r) and (1, layers, r, m).
    """
    fit = lambda a, b: a[0] == b[0] and a[2] == b[1]
    if lora.a.ndim != 3 or lora.b.ndim != 3 or fit(lora.a.shape, lora.b.shape):
        return lora
    for axis in (1, 2):
        a, b = (jnp.moveaxis(z, axis, 0) for z in (lora.a, lora.b))
        if fit(a.shape, b.shape):
            return lora.with_factors(*(z.reshape(*[1] * axis, *z.shape) for z in (a, b)))
    return lora


def without_space(lora: LowRank, roles: str) -> LowRank:
    """One layer of the stack, of a kernel with these roles: its factors without the axes of size 1."""
    spaces = lora.a.ndim - 2 - roles.count("b")
    return lora[(0,) * spaces] if spaces > 0 and set(lora.shape[:spaces]) == {1} else lora


def stacked(roles: str, ndim: int) -> str:
    """The roles of a kernel of ndim axes: what a layer does not know of, in front, stacks layers."""
    return "b" * (ndim - len(roles)) + roles


def kept_roles(roles: str) -> str | None:
    """What a LoRA parameter keeps of its kernel's roles: None of "bioo", which is in order, but "oio"."""
    return None if "".join(sorted(roles, key="bio".index)) == roles else roles


def said_roles(said: Any, ndim: int) -> str:
    """The roles of a kernel's last axes as users say them, by letters or by an einsum of inputs and kernel.

    Raises:
      ValueError: what is neither, or does not fit a kernel of ndim axes.
    """
    text = said.replace(" ", "") if isinstance(said, str) else ""
    if re.fullmatch(r"[\w.]+,[\w.]+->[\w.]+", text):
        axes = text.split(",")[1].split("->")[0]
        roles = kernel_roles(text, ndim if "..." in axes else min(ndim, len(axes)))
    else:
        roles = text
    if not ({"i", "o"} <= set(roles) <= set("bio")):
        raise ValueError(
            f"the roles of its axes are {said!r}; expected a letter for each of the last axes, 'b' of a "
            "batch, 'i' of inputs, 'o' of outputs, such as 'oio', or an einsum whose second operand is the "
            "kernel, such as 'BTD,NDH->BTNH'"
        )
    if len(roles) > ndim:
        raise ValueError(f"the kernel has {ndim} axes, its roles {said!r} are of {len(roles)}")
    return roles


def dense_equation(ndim: int, axes: Sequence[int], num_batch: int, num_features: int) -> str:
    """The einsum of a dense layer that contracts some axes of its inputs, of which the first are batch axes.

    Of 4 axes, the last two contracted, with one batch axis and two of features, it is "abcd,acdef->abef".
    """
    letters = string.ascii_letters[: ndim + num_features]
    inputs, features = letters[:ndim], letters[ndim:]
    contracted = "".join(inputs[axis] for axis in sorted(axis % ndim for axis in axes))
    kept = "".join(c for c in inputs if c not in contracted)
    return f"{inputs},{inputs[:num_batch]}{contracted}{features}->{kept}{features}"


def kernel_roles(equation: str, ndim: int) -> str:
    """The roles of the axes of a kernel with ndim axes, the second operand of an einsum.

    They are "oio" for "btd,ndh->btnh"; what an ellipsis stands for are batch axes. An einsum that is not the
    product of its inputs with a matrix raises ValueError.
    """
    inputs, kernel, outputs = _operands(equation, None, ndim)
    for operand in (inputs, kernel, outputs):
        if len(set(operand)) < len(operand):
            raise ValueError(f"the einsum {equation!r} repeats an axis in {operand!r}; LoRA needs a product")
    if len(kernel) != ndim:
        raise ValueError(f"the kernel of the einsum {equation!r} has {ndim} axes")
    names = {(True, True): "b", (True, False): "i", (False, True): "o", (False, False): "?"}
    roles = "".join(names[c in inputs, c in outputs] for c in kernel)
    if "?" in roles or "i" not in roles:
        raise ValueError(
            f"the einsum {equation!r} is no matrix product of its inputs and its kernel: LoRA needs a kernel "
            "whose axes are in the inputs or in the outputs, and at least one that is in the inputs alone"
        )
    return roles


def _operands(equation: str, inputs_ndim: int | None, kernel_ndim: int) -> list[str]:
    """The inputs, the kernel and the outputs of an einsum, with letters for what an ellipsis stands for."""
    operands = re.split(",|->", equation.replace(" ", ""))
    hidden = [c for c in string.ascii_letters if c not in equation]
    named = [len(operand.replace("...", "")) for operand in operands]
    in_kernel = kernel_ndim - named[1] if "..." in operands[1] else 0
    in_inputs = in_kernel if inputs_ndim is None else inputs_ndim - named[0]
    in_inputs = in_inputs if "..." in operands[0] else 0
    width = max(in_inputs, in_kernel)
    counts = (in_inputs, in_kernel, width)  # aligned at their right ends
    ellipses = ["".join(hidden[width - count : width]) for count in counts]
    return [operand.replace("...", hid) for operand, hid in zip(operands, ellipses, strict=True)]


def add_einsum_increment(
    y: Array, equation: str, x: Array, kernel_shape: Sequence[int], lora: LowRank, precision: Any = None
) -> Array:
    """y + einsum(equation, x, the increment of the kernel), in the type of y and with its sharding.

    The einsum is explicit and of two operands. The increment is multiplied in the type of x.
    """
    roles = kernel_roles(equation, len(kernel_shape))
    matrix = matrix_shape(kernel_shape, roles)
    if lora.shape != matrix:
        taken = f"the einsum {equation!r} takes the kernel {tuple(kernel_shape)} for a matrix {matrix}"
        raise ValueError(f"{taken}, but its LoRA parameter is {lora.shape}")
    if lora.roles not in (roles, kept_roles(roles)):
        taken = f"the einsum {equation!r} takes the kernel's axes as {roles!r}"
        raise ValueError(f"{taken}, but its LoRA parameter has roles={lora.roles!r}")
    inputs, kernel, outputs = _operands(equation, jnp.ndim(x), len(kernel_shape))
    with_role = lambda role: "".join(c for c, r in zip(kernel, roles, strict=True) if r == role)
    batch, contracted, features = map(with_role, "bio")
    tokens = "".join(c for c in inputs if c in outputs and c not in kernel)
    sizes = {**dict(zip(inputs, x.shape, strict=True)), **dict(zip(kernel, kernel_shape, strict=True))}
    shape = lambda letters: tuple(sizes[c] for c in letters)

    def rows(x: Any) -> Array:
        # An ellipsis may leave batch axes of the kernel out of x.
        missing = "".join(c for c in batch if c not in inputs)
        x = jnp.expand_dims(x, tuple(range(len(missing))))
        x = _rearranged(x, missing + inputs, batch + tokens + contracted)
        return jnp.broadcast_to(x, shape(batch + tokens + contracted)).reshape(*shape(batch + tokens), -1)

    def rows_spec() -> Any:
        along = dict(zip(inputs, entries(x), strict=True))
        of = lambda letters: [along.get(c) for c in letters]
        return partition(*of(batch + tokens), merged(of(contracted)))

    def add(y: Any, increment: Any) -> Array:
        increment = increment.reshape(shape(batch + tokens + features))
        return y + _rearranged(increment, batch + tokens + features, outputs).astype(y.dtype)

    increment = lora_increment(under_auto_sharding(rows, rows_spec, x), lora, precision=precision)
    return under_auto_sharding(add, lambda: specs_of(y), y, increment)


def _rearranged(x: Array, axes: str, wanted: str) -> Array:
    """x with its axes in another order, and summed over the others: an einsum of one operand.

    Qwix, which puts quantised products into the place of einsums, refuses those.
    """
    kept = [c for c in axes if c in wanted]
    summed = [axis for axis, c in enumerate(axes) if c not in wanted]
    return jnp.transpose(x.sum(summed) if summed else x, [kept.index(c) for c in wanted])
