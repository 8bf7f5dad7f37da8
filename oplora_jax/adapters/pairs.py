"""Trees of other LoRA libraries, whose factors are leaves of their own: paired by path, and taken apart."""

import collections
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from oplora_jax.adapters.init import positive_number
from oplora_jax.adapters.paths import leaf_name
from oplora_jax.matrix import LowRank, is_matrix
from oplora_jax.products import transpose

# How the paths of a and b end: flax.nnx.LoRA and Qwix (kernel_lora_a), and PyTorch's habit; as arrays, or
# as dense layers of their own.
_TAILS = ("", "/kernel", "/weight", ".weight")
_ENDINGS = tuple((f"lora_{a}{tail}", f"lora_{b}{tail}") for a, b in ("ab", "AB") for tail in _TAILS)


class _Pair(NamedTuple):
    """Two leaves, a and b, that are the factors of one matrix."""

    paths: list[str]
    indices: list[int]  # among the tree's leaves
    shapes: list[tuple[int, ...]]
    batch: int  # the number of leading axes that count the layers of a stack
    scale: float | int
    transposed: bool


class _Tree(NamedTuple):
    """A tree taken apart."""

    names: list[str]  # the leaves' paths
    leaves: list[Any]
    treedef: Any
    pairs: dict[str, _Pair]  # by name


def pair_factors(
    tx: optax.GradientTransformation,
    *,
    scale: float | int | Callable[[str], float | int] = 1.0,
    pattern: tuple[str, str] | None = None,
    transposed: bool = False,
    batch_axes: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""A LoRA optimizer for parameters of other libraries, whose factors a and b are two separate leaves.

    The leaves are paired by path. The optimizer sees a tree {"paired": {name: `LowRank`}, "rest": {path:
    leaf}}, with `LowRank` parameters and all other leaves in "rest", and the state is the optimizer's own.
    Gradients are those of the factors (`jax.grad`), so that OPLoRA takes its Riemannian step; the exact one
    needs `LowRank` parameters and `oplora_jax.value_and_grad`.

    Recognised without a pattern are the names of `flax.nnx.LoRA` (lora_a, lora_b), Qwix (kernel_lora_a,
    kernel_lora_b) and PyTorch (lora_A, lora_B), also with "/kernel" or "/weight" behind them. A factor may
    have several input or output axes, such as heads: a is (\*batch, \*inputs, r), b (\*batch, r, \*outputs).

    Args:
      tx: any transformation that takes `LowRank` parameters, such as `oplora`.
      scale: the scale s of the increment s a b in the other library's forward pass, alpha / rank for Qwix, 1
        for `nnx.LoRA`; or a function from a pair's name, such as "encoder/query/kernel", to it.
      pattern: how the paths of a and b end, such as ("down/kernel", "up/kernel"), instead of the names
        above. An ending begins at the path's start or after "/", "." or "_".
      transposed: whether the factors are laid out as PyTorch's, a (\*batch, r, n) and b (\*batch, m, r).
      batch_axes: how many leading axes count the layers of a stack, where the shapes leave it open: a
        (4, 16, 4) with b (4, 4, 8) may be a stack of four, or one layer with two axes on each side.

    Raises:
      ValueError: at init and update, for no pair at all, for a factor without the other one, for shapes that
        do not fit (a rank above n or m, as of square layers of PyTorch without `transposed`) or leave the
        batch axes open, and for gradients of another shape.

    Example:
      >>> import jax, jax.numpy as jnp, optax, oplora_jax
      >>> params = {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.zeros((2, 3))}
      >>> tx = oplora_jax.pair_factors(oplora_jax.oplora(0.1))
      >>> loss_fn = lambda p: jnp.mean((jnp.ones((5, 4)) @ p["lora_a"] @ p["lora_b"] - 1) ** 2)
      >>> updates, state = tx.update(jax.grad(loss_fn)(params), tx.init(params), params)
      >>> bool(loss_fn(optax.apply_updates(params, updates)) < loss_fn(params))
      True
    """
    tx = optax.with_extra_args_support(tx)
    take_apart = lambda tree: _take_apart(tree, scale, pattern, transposed, batch_axes)

    def init_fn(params):
        tree = take_apart(params)
        return tx.init(_gather(tree, tree.leaves))

    def update_fn(updates, state, params=None, **extra_args):
        tree = take_apart(updates if params is None else params)
        try:
            gradients = tree.treedef.flatten_up_to(updates)
        except ValueError as error:
            raise ValueError(f"the tree does not have the parameters' structure: {error}") from error
        inner = None if params is None else _gather(tree, tree.leaves)
        new, state = tx.update(_gather(tree, gradients), state, inner, **extra_args)
        if not tree.leaves:
            return new, state
        leaves = [new["rest"].get(name) for name in tree.names]
        for name, pair in tree.pairs.items():
            for index, factor in zip(pair.indices, _split(pair, new["paired"][name]), strict=True):
                leaves[index] = factor
        return tree.treedef.unflatten(leaves), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def to_low_rank(tree: Any, **layout: Any) -> dict[str, LowRank]:
    """The LoRA parameters of a tree in which the two factors are separate leaves.

    Args:
      tree: parameters as for `pair_factors`.
      **layout: `scale`, `pattern`, `transposed` and `batch_axes`, as for `pair_factors`.

    Returns:
      A dict from the pairs' names to `LowRank` parameters, a (*batch, n, r) and b (*batch, r, m).

    Example:
      >>> import jax.numpy as jnp, oplora_jax
      >>> params = {"query": {"kernel_lora_a": jnp.ones((4, 2)), "kernel_lora_b": jnp.ones((2, 3, 5))}}
      >>> {name: p.shape for name, p in oplora_jax.to_low_rank(params, scale=2.0).items()}
      {'query/kernel': (4, 15)}
    """
    apart = _take_apart(tree, **layout)
    return _gather(apart, apart.leaves)["paired"] if apart.leaves else {}


def from_low_rank(lora: dict[str, LowRank], tree: Any, **layout: Any) -> Any:
    """The tree with other LoRA parameters in it: the inverse of `to_low_rank`.

    Where a parameter's scale is not the tree's, its factors are rescaled, so that the matrix is the same.

    Args:
      lora: LoRA parameters by the pairs' names; pairs that it lacks stay as they are.
      tree, **layout: as for `to_low_rank`.

    Returns:
      A tree like the given one, in its types.

    Raises:
      ValueError: as `pair_factors`, and for a name that the tree lacks, or factors of other shapes.

    Example:
      >>> import jax.numpy as jnp, oplora_jax
      >>> params = {"query": {"lora_a": jnp.zeros((4, 2)), "lora_b": jnp.zeros((2, 3))}}
      >>> lora = {"query": oplora_jax.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)))}
      >>> oplora_jax.from_low_rank(lora, params)["query"]["lora_b"].tolist()
      [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    apart = _take_apart(tree, **layout)
    unknown = sorted(set(lora) - set(apart.pairs))
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no such pair; the tree has {', '.join(apart.pairs)}")
    leaves = list(apart.leaves)
    for name, new in lora.items():
        pair = apart.pairs[name]
        old = _join(pair, *(leaves[index] for index in pair.indices))
        shapes = [(z.a.shape, z.b.shape) for z in (new, old)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name}: the factors are {shapes[0]}; the tree needs {shapes[1]}")
        root = math.sqrt(new.scale / old.scale)
        rescaled = new if root == 1 else new.with_factors(root * new.a, root * new.b)
        for index, factor in zip(pair.indices, _split(pair, rescaled), strict=True):
            leaves[index] = factor.astype(leaves[index].dtype)
    return apart.treedef.unflatten(leaves)


def _take_apart(
    tree: Any, scale: Any = 1.0, pattern: Any = None, transposed: bool = False, batch_axes: Any = None
) -> _Tree:
    """Finds the pairs among the leaves of a tree."""
    paths_and_leaves, treedef = jax.tree.flatten_with_path(tree, is_leaf=is_matrix)
    names, leaves = [leaf_name(path) for path, _ in paths_and_leaves], [leaf for _, leaf in paths_and_leaves]
    endings = _ENDINGS if pattern is None else (pattern,)
    found = collections.defaultdict(dict)  # by what is before the ending, and the ending: {0 or 1: index}
    for index, (name, leaf) in enumerate(zip(names, leaves, strict=True)):
        key = None if is_matrix(leaf) else _factor(name, endings)
        if key is not None:
            stem, ending, which = key
            found[stem, ending][which] = index
    pairs: dict[str, _Pair] = {}
    for (stem, ending), halves in found.items():
        if len(halves) < 2:
            [(which, index)] = halves.items()
            other = f"{stem}{ending[1 - which]}; both must be in the tree (and both masked or none)"
            raise ValueError(f"{names[index]}: a LoRA factor without the other one, {other}")
        name, indices = stem[:-1], [halves[0], halves[1]]
        paths, shapes = [names[i] for i in indices], [jnp.shape(leaves[i]) for i in indices]
        if name in pairs:
            raise ValueError(f"{paths[0]}: another pair of factors is named {name!r} as well")
        value = scale(name) if callable(scale) else scale
        if (number := positive_number(value)) is None:
            raise ValueError(f"{paths[0]}: scale is {value!r}; expected a positive number, alpha / rank")
        batch = _batch(paths, shapes, transposed, batch_axes)
        pairs[name] = _Pair(paths, indices, shapes, batch, number, transposed)
    if leaves and not pairs:
        expected = "lora_a and lora_b, or lora_A and lora_B" if pattern is None else " and ".join(pattern)
        found = f"no paths end in {expected}; the paths are: {', '.join(names)}"
        raise ValueError(f"no pair of LoRA factors: {found}")
    repeated = [name for name, count in collections.Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{', '.join(repeated)}: several leaves have this path")
    return _Tree(names, leaves, treedef, pairs)


def _factor(name: str, endings: tuple[tuple[str, str], ...]) -> tuple[str, tuple[str, str], int] | None:
    """(what is before the ending, the pair of endings, 0 for a or 1 for b) of a factor's path."""
    for ending in endings:
        for which, end in enumerate(ending):
            stem = name.removesuffix(end)
            if stem != name and (not stem or stem.endswith(("/", ".", "_"))):
                return stem, ending, which
    return None


def _batch(paths: list[str], shapes: list[tuple[int, ...]], transposed: bool, batch_axes: int | None) -> int:
    """The number of batch axes of a pair, which is what the shapes allow."""
    sizes = _sizes(*shapes, transposed)
    sizes = {batch_axes: sizes[batch_axes]} if batch_axes in sizes else sizes
    fitting = [k for k, (n, r, m) in sizes.items() if r <= min(n, m)]
    if len(fitting) == 1:
        return fitting[0]
    named = f"{paths[0]} {shapes[0]} and {paths[1]} {shapes[1]}"
    if fitting:
        counts = " or ".join(map(str, fitting))
        raise ValueError(f"{named}: the shapes allow {counts} batch axes; say which with batch_axes")
    layouts = ["(*batch, *inputs, r) and (*batch, r, *outputs)", "(*batch, r, n) and (*batch, m, r)"]
    other = any(r <= min(n, m) for n, r, m in _sizes(*shapes, not transposed).values())
    hint = f" (with transposed={not transposed} they would)" if other else ""
    found = "the factors do not fit"
    for n, r, m in list(sizes.values())[:1]:
        found += f": with transposed={transposed} they are of rank {r}, above a side of a matrix ({n}, {m})"
    raise ValueError(f"{named}: {found}; expected {layouts[transposed]}{hint}")


def _sizes(a: tuple[int, ...], b: tuple[int, ...], transposed: bool) -> dict[int, tuple[int, int, int]]:
    """(n, r, m) by the numbers of batch axes with which the shapes of two factors fit together."""
    if transposed:
        fits = len(a) == len(b) >= 2 and a[:-2] == b[:-2] and a[-2] == b[-1] > 0
        return {len(a) - 2: (a[-1], a[-2], b[-2])} if fits else {}
    if len(a) < 2 or not b:
        return {}
    fits = lambda k: a[:k] == b[:k] and a[-1] == b[k] > 0
    most = max(min(len(a), len(b)) - 2, 0)
    return {k: (math.prod(a[k:-1]), a[-1], math.prod(b[k + 1 :])) for k in range(most + 1) if fits(k)}


def _gather(tree: _Tree, leaves: list[Any]) -> Any:
    """What the optimizer sees of a tree with these leaves.

    A tree without leaves stays as it is: `optax.tree.map_params` marks parameters with one.
    """
    if not tree.leaves:
        return tree.treedef.unflatten([])
    taken = {index for pair in tree.pairs.values() for index in pair.indices}
    rest = {name: leaves[i] for i, name in enumerate(tree.names) if i not in taken}
    paired = {name: _join(pair, *(leaves[i] for i in pair.indices)) for name, pair in tree.pairs.items()}
    return {"paired": paired, "rest": rest}


def _join(pair: _Pair, a: Any, b: Any) -> LowRank:
    """The matrix of two leaves: (*batch, *inputs, r) and (*batch, r, *outputs), or transposed."""
    for path, shape, leaf in zip(pair.paths, pair.shapes, (a, b), strict=True):
        got = getattr(leaf, "shape", type(leaf).__name__)
        if got != shape:
            raise ValueError(f"{path}: the gradient is {got}; the parameter needs an array {shape}")
    if pair.transposed:
        return LowRank(transpose(a), transpose(b), pair.scale)
    batch, rank = pair.shapes[0][: pair.batch], pair.shapes[0][-1]
    inputs, outputs = pair.shapes[0][pair.batch : -1], pair.shapes[1][pair.batch + 1 :]
    a = jnp.reshape(a, (*batch, math.prod(inputs), rank))
    b = jnp.reshape(b, (*batch, rank, math.prod(outputs)))
    return LowRank(a, b, pair.scale)


def _split(pair: _Pair, node: LowRank) -> tuple[Array, Array]:
    """The two leaves of a matrix, the inverse of `_join`."""
    if pair.transposed:
        return transpose(node.a), transpose(node.b)
    return jnp.reshape(node.a, pair.shapes[0]), jnp.reshape(node.b, pair.shapes[1])
