"""How the axes of two factors that are arrays of their own make a matrix: said, or told by their shapes."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from oplora_jax.matrix import LowRank
from oplora_jax.products import transpose

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """What the axes of both factors are."""

    batch: int  # how many axes are batch axes: the first ones, once the axis `stack` stands in front
    stack: int = 0  # the axis that stacks layers
    transposed: bool = False  # a (*batch, r, n) and b (*batch, m, r)

    def join(self, a: Any, b: Any, scale: float | int) -> LowRank:
        """The matrix of two arrays."""
        a, b = (jnp.moveaxis(z, self.stack, 0) if self.stack else z for z in (a, b))
        if self.transposed:
            return LowRank(transpose(a), transpose(b), scale)
        a = jnp.reshape(a, (*a.shape[: self.batch], math.prod(a.shape[self.batch : -1]), a.shape[-1]))
        b = jnp.reshape(b, (*b.shape[: self.batch + 1], math.prod(b.shape[self.batch + 1 :])))
        return LowRank(a, b, scale)

    def split(self, matrix: LowRank, shapes: list[Shape]) -> list[Array]:
        """The arrays of a matrix, of these shapes: the inverse of `join`."""
        factors = [transpose(z) for z in (matrix.a, matrix.b)] if self.transposed else [matrix.a, matrix.b]
        reshaped = (
            jnp.reshape(z, _moved(shape, self.stack)) for z, shape in zip(factors, shapes, strict=True)
        )
        return [jnp.moveaxis(z, 0, self.stack) if self.stack else z for z in reshaped]

    def matrix(self, shapes: list[Shape]) -> tuple[int, int, int] | None:
        """(n, r, m) of factors of these shapes; None where they do not fit together."""
        if not all(-len(shape) <= self.stack < len(shape) for shape in shapes):
            return None
        (a, b), k = (_moved(shape, self.stack) for shape in shapes), self.batch
        if min(len(a), len(b) + (k == 0)) < k + 2 or a[:k] != b[:k]:  # b may be (r,), for one output
            return None
        if self.transposed:
            fit = len(a) == len(b) == k + 2 and a[-2] == b[-1] > 0
            return (a[-1], a[-2], b[-2]) if fit else None
        return (math.prod(a[k:-1]), a[-1], math.prod(b[k + 1 :])) if a[-1] == b[k] > 0 else None


def layout_of(
    paths: list[str],
    shapes: list[Shape],
    transposed: bool | None,
    batch_axes: int | None,
    stack_axis: int | None,
) -> Layout:
    """The layout of two factors: the only one that their shapes allow, of those with what is said.

    A stack along another axis than the first, or transposed factors, are said, never found. Where the shapes
    allow them besides what is usual, nobody knows which is meant.
    """
    said = {"transposed": transposed, "batch_axes": batch_axes, "stack_axis": stack_axis}
    fitting = _fitting(shapes, **said)
    is_usual = lambda z: z.transposed == bool(transposed) and (not z.stack or stack_axis is not None)
    if len(fitting) == 1 and is_usual(fitting[0]):
        return fitting[0]
    named = f"{paths[0]} {shapes[0]} and {paths[1]} {shapes[1]}"
    if any(map(is_usual, fitting)):
        options = " or ".join(_described(z, shapes, fitting) for z in fitting)
        raise ValueError(f"{named}: the shapes allow several layouts; say which with {options}")
    given = " and ".join(f"{key}={z}" for key, z in said.items() if z is not None and key != "transposed")
    found = f"the factors do not fit {given}".rstrip()
    for layout in _candidates(shapes, **said):
        if is_usual(layout) and (sizes := layout.matrix(shapes)):
            n, r, m = sizes
            above = f"they are of rank {r}, above a side of a matrix ({n}, {m})"
            found += f": with transposed={bool(transposed)} {above}"
            break
    expected = (
        "(*batch, r, n) and (*batch, m, r)"
        if transposed
        else "(*batch, *inputs, r) and (*batch, r, *outputs)"
    )
    others = _fitting(shapes, None, None, None)
    hint = " or ".join(
        _described(z, shapes, [*others, Layout(0, transposed=bool(transposed))]) for z in others
    )
    raise ValueError(f"{named}: {found}; expected {expected}" + (f"; they would with {hint}" if hint else ""))


def _fitting(shapes: list[Shape], transposed: Any, batch_axes: Any, stack_axis: Any) -> list[Layout]:
    """The layouts in which two factors are a matrix of a rank that it can have; of equal ones the first."""
    found: dict[Any, Layout] = {}
    for layout in _candidates(shapes, transposed, batch_axes, stack_axis):
        sizes = layout.matrix(shapes)
        if sizes and sizes[1] <= min(sizes[0], sizes[2]):
            moved = [_moved(range(len(shape)), layout.stack)[: layout.batch] for shape in shapes]
            # An axis of size 1 stacks nothing.
            axes = (tuple(sorted(i for i in z if s[i] > 1)) for z, s in zip(moved, shapes, strict=True))
            found.setdefault((layout.transposed, sizes, *axes), layout)
    return [*found.values()]


def _candidates(shapes: list[Shape], transposed: Any, batch_axes: Any, stack_axis: Any) -> Iterator[Layout]:
    least = min(map(len, shapes))
    stacks = [0, *range(1, least), -1] if stack_axis is None else [stack_axis]
    for swapped in (False, True) if transposed is None else (transposed,):
        for stack in stacks:
            for batch in range(least) if batch_axes is None else (batch_axes,):
                if batch > 0 or (batch == 0 and not stack and stack_axis is None):
                    yield Layout(batch, stack, swapped)


def _described(layout: Layout, shapes: list[Shape], among: list[Layout]) -> str:
    """What to say for a layout, and what it means."""
    said = [f"transposed={layout.transposed}"] if len({z.transposed for z in among}) > 1 else []
    said += [f"stack_axis={layout.stack}"] if layout.batch and any(z.stack for z in among) else []
    n, r, m = layout.matrix(shapes)
    batch = _moved(shapes[0], layout.stack)[: layout.batch]
    return f"{', '.join([*said, f'batch_axes={layout.batch}'])} (matrices {(*batch, n, m)} of rank {r})"


def _moved(shape: Any, axis: int) -> tuple[Any, ...]:
    """A shape with an axis in front."""
    rest = list(shape)
    return (rest.pop(axis), *rest) if rest else ()
