"""Which part of which factor an array of a traced program is, once it has been moved or sliced."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

# Operations whose outputs are their inputs, one by one, in another type or place.
SAME = frozenset(
    [
        *("convert_element_type", "reduce_precision", "copy", "copy_p", "device_put", "name"),
        *("optimization_barrier", "sharding_constraint", "reshard", "mesh_cast", "pvary"),
    ]
)


class View(NamedTuple):
    """Entries of a factor of a LoRA parameter."""

    parameter: int
    side: int  # 0, of the factor a; 1, of b
    axes: tuple[Any, ...]  # of the array: "wide", n or m; "rank"; or the name of a batch axis
    moves: tuple[Any, ...] = ()  # what has been picked along the batch axes; equal where the entries are
    times: int = 1  # how often the same entries are used where the array is used once

    @property
    def batch(self) -> tuple[Any, ...]:
        """The names of the batch axes."""
        return tuple(axis for axis in self.axes if axis not in ("wide", "rank"))


def whole(parameter: int, side: int, ndim: int) -> View:
    """A factor as it is."""
    return View(parameter, side, (*range(ndim - 2), *(("rank", "wide") if side else ("wide", "rank"))))


def slice_of(view: View, loop: int) -> View | None:
    """What one round of a loop sees of a factor that it takes layer by layer."""
    if view.axes[0] in ("wide", "rank"):
        return None
    return view._replace(axes=view.axes[1:], moves=(*view.moves, ("loop", loop)))


def moved(eqn: Any, view: View, tokens: Sequence[Any]) -> View | None:
    """What an equation makes of a view, its first operand; None if it computes with it.

    The tokens of the other operands are equal only where their values are.
    """
    name = eqn.primitive.name
    if name in SAME:
        return view
    if name not in _MOVES:
        return None
    shape, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    fixed = [view.axes.index(axis) for axis in ("wide", "rank")]
    free = [k for k in range(len(shape)) if k not in fixed]
    return _MOVES[name](view, eqn.params, shape, out, fixed, free, tokens)


def _transpose(view, params, shape, out, fixed, free, tokens):
    return view._replace(axes=tuple(view.axes[k] for k in params["permutation"]))


def _squeeze(view, params, shape, out, fixed, free, tokens):
    gone = [k % len(shape) for k in params["dimensions"]]
    kept = [k for k in range(len(shape)) if k not in gone]
    return view._replace(axes=tuple(view.axes[k] for k in kept)) if set(fixed) <= set(kept) else None


def _slice(view, params, shape, out, fixed, free, tokens):
    if any(out[k] != shape[k] for k in fixed):
        return None
    if out == shape:
        return view
    starts, strides = params.get("start_indices", tokens), params.get("strides")
    pick = lambda some: some and tuple(some[k] for k in free)
    return view._replace(moves=(*view.moves, (view.batch, pick(starts), pick(strides), pick(out))))


def _reshape(view, params, shape, out, fixed, free, tokens):
    if set(fixed) != {len(shape) - 2, len(shape) - 1} or out[-2:] != shape[-2:]:
        return None
    names = ((view.batch, out[:-2], k) for k in range(len(out) - 2))
    return view._replace(axes=(*names, *view.axes[-2:]))


def _broadcast(view, params, shape, out, fixed, free, tokens):
    to = params["broadcast_dimensions"]
    if any(out[to[k]] != shape[k] for k in fixed):
        return None
    axes = [view.axes[to.index(k)] if k in to else ("new", k) for k in range(len(out))]
    grows = math.prod(out) > math.prod(shape)
    return view._replace(axes=tuple(axes), times=2 if grows else view.times)


def _gather(view, params, shape, out, fixed, free, tokens):
    numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
    gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    kept = dict(zip(numbers.offset_dims, (k for k in range(len(shape)) if k not in gone), strict=True))
    if any(sizes[k] != shape[k] for k in fixed) or {*gone, *numbers.start_index_map} & set(fixed):
        return None
    pick = (view.batch, numbers, tuple(sizes[k] for k in free), *tokens)
    axes = tuple(view.axes[kept[k]] if k in kept else ("picked", k) for k in range(len(out)))
    several = math.prod(n for k, n in enumerate(out) if k not in kept) > 1
    return view._replace(axes=axes, moves=(*view.moves, pick), times=2 if several else view.times)


_MOVES = {
    "transpose": _transpose,
    "squeeze": _squeeze,
    "slice": _slice,
    "dynamic_slice": _slice,
    "reshape": _reshape,
    "broadcast_in_dim": _broadcast,
    "gather": _gather,
}
