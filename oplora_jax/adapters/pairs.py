"""Trees of other LoRA libraries, whose factors are leaves of their own: paired by path, and taken apart."""

import collections
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from oplora_jax.adapters.init import positive_number
from oplora_jax.adapters.layouts import Layout, layout_of
from oplora_jax.adapters.paths import leaf_name, weight_name
from oplora_jax.matrix import LowRank, is_low_rank, is_matrix

# How the paths of a and b end: flax.nnx.LoRA and Qwix (kernel_lora_a), and PyTorch's habit; as arrays, or
# as dense layers of their own.
_TAILS = ("", "/kernel", "/weight", ".weight")
_NAMED = tuple((f"lora_{a}{tail}", f"lora_{b}{tail}") for a, b in ("ab", "AB") for tail in _TAILS)
_ENDINGS = (*_NAMED, ("lora/a", "lora/b"))  # the last are gemma's
_QWIX = _NAMED[0]  # behind the weight's name and "_"


class _Pair(NamedTuple):
    """Two leaves, a and b, that are the factors of one matrix."""

    paths: list[str]
    indices: list[int]  # among the tree's leaves
    shapes: list[tuple[int, ...]]
    layout: Layout
    scale: float | int


class _Tree(NamedTuple):
    """A tree taken apart."""

    names: list[str]  # the leaves' paths
    leaves: list[Any]
    treedef: Any
    pairs: dict[str, _Pair]  # by name
    nodes: dict[str, int]  # whole LoRA parameters by name: their places among the leaves


def pair_factors(
    tx: optax.GradientTransformation,
    *,
    scale: float | int | Callable[[str], float | int] | None = None,
    pattern: tuple[str, str] | None = None,
    transposed: bool | None = None,
    batch_axes: int | Callable[[str], int | None] | None = None,
    stack_axis: int | Callable[[str], int | None] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """A LoRA optimizer for parameters of other libraries, whose factors a and b are two separate leaves.

    For `flax.nnx.LoRA`, Qwix's own LoRA, gemma's, MaxText's and models ported from PyTorch. Gradients are
    those of `jax.grad`; exact ones need `LowRank` parameters and `value_and_grad`. Say `scale`, what the
    other library multiplies a b with: alpha / rank for Qwix and PEFT, 1 for `flax.nnx.LoRA` and gemma.

    Args:
      tx: any transformation that takes `LowRank` parameters, such as `oplora`.
      scale: the scale s of the increment s a b in the other library's forward pass; or a function from a
        pair's name, such as "encoder/query/kernel", to it. 1 if None, which Qwix's names do not allow.
      pattern: how the paths of a and b end, such as ("down/kernel", "up/kernel"). An ending begins at the
        path's start or after "/", "." or "_". If None the names of `flax.nnx.LoRA` (lora_a, lora_b), Qwix
        (kernel_lora_a, kernel_lora_b) and PyTorch (lora_A, lora_B) are found, also with "/kernel" or
        "/weight" behind them, and gemma's (lora/a, lora/b).
      transposed: whether the factors are laid out as PyTorch's, a `(*batch, r, n)` and b `(*batch, m, r)`. If
        None the shapes decide, or an error asks.
      batch_axes: how many leading axes count the layers of a stack, the axis `stack_axis` among them, where
        the shapes leave it open: a (4, 16, 4) with b (4, 4, 8) may be a stack of four, or one layer with two
        axes on each side. Or a function from a pair's name to it, or to None.
      stack_axis: the axis of both factors that stacks layers where it is not the first, such as 1 for MaxText
        and for `nn.scan` with `variable_axes={"params": 1}`: a (n, layers, r), b (r, layers, m). Or a
        function from a pair's name to it, or to None.

    Returns:
      An Optax transformation. The optimizer within sees a tree
      `{"paired": {name: LowRank}, "rest": {path: leaf}}`, and the state is its own.

    Raises:
      ValueError: at init and update, for no pair at all, for a factor without the other one, for shapes that
        do not fit what is said (a rank above n or m, as of square layers of PyTorch without `transposed`) or
        allow several layouts, for Qwix's names without a scale, and for gradients of another shape.

    A factor may have several axes of inputs or outputs, such as heads: a is `(*batch, *inputs, r)`, b
    `(*batch, r, *outputs)`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, oplora_jax
      >>> params = {"lora_a": jnp.ones((4, 2)), "lora_b": jnp.zeros((2, 3))}
      >>> tx = oplora_jax.pair_factors(oplora_jax.oplora(0.1))
      >>> loss_fn = lambda p: jnp.mean((jnp.ones((5, 4)) @ p["lora_a"] @ p["lora_b"] - 1) ** 2)
      >>> updates, state = tx.update(jax.grad(loss_fn)(params), tx.init(params), params)
      >>> bool(loss_fn(optax.apply_updates(params, updates)) < loss_fn(params))
      True
    """
    tx = optax.with_extra_args_support(tx)
    take_apart = lambda tree: _take_apart(tree, scale, pattern, transposed, batch_axes, stack_axis)

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
            for index, factor in zip(
                pair.indices, pair.layout.split(new["paired"][name], pair.shapes), strict=True
            ):
                leaves[index] = factor
        return tree.treedef.unflatten(leaves), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def to_low_rank(tree: Any, **layout: Any) -> dict[str, LowRank]:
    """All LoRA parameters of a tree in a dict by name, whatever library made them.

    For `merge` and `oplora_jax.peft.save_adapter`, for example.

    Args:
      tree: parameters with `LowRank` nodes, or with factors in separate leaves as for `pair_factors`. The
        name of a node is the path of the weight beside it: "query/kernel" of "query/lora", and "query/w" of
        "query/lora/w".
      **layout: `scale`, `pattern`, `transposed`, `batch_axes` and `stack_axis`, as for `pair_factors`.

    Returns:
      A dict from names to `LowRank` parameters, a `(*batch, n, r)` and b `(*batch, r, m)`.

    Raises:
      ValueError: as for `pair_factors`.

    Examples:
      >>> import jax.numpy as jnp, oplora_jax
      >>> params = {"query": {"kernel_lora_a": jnp.ones((4, 2)), "kernel_lora_b": jnp.ones((2, 3, 5))}}
      >>> {name: p.shape for name, p in oplora_jax.to_low_rank(params, scale=2.0).items()}
      {'query/kernel': (4, 15)}
    """
    apart = _take_apart(tree, **layout)
    pairs = _gather(apart, apart.leaves)["paired"] if apart.leaves else {}
    return {name: apart.leaves[index] for name, index in apart.nodes.items()} | pairs


def from_low_rank(lora: dict[str, LowRank], tree: Any, **layout: Any) -> Any:
    """A tree with other LoRA parameters in it: the inverse of `to_low_rank`.

    Where a parameter's scale is not the tree's its factors are rescaled, so that the matrix is the same.

    Args:
      lora: LoRA parameters by name. Those of the tree that it lacks stay as they are.
      tree: as for `to_low_rank`.
      **layout: as for `to_low_rank`.

    Returns:
      A tree like the given one, in its types.

    Raises:
      ValueError: as for `pair_factors`, and for a name that the tree lacks, or factors of other shapes.

    Examples:
      >>> import jax.numpy as jnp, oplora_jax
      >>> params = {"query": {"lora_a": jnp.zeros((4, 2)), "lora_b": jnp.zeros((2, 3))}}
      >>> lora = {"query": oplora_jax.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)))}
      >>> oplora_jax.from_low_rank(lora, params)["query"]["lora_b"].tolist()
      [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    apart = _take_apart(tree, **layout)
    known = [*apart.nodes, *apart.pairs]
    unknown = sorted(set(lora) - set(known))
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no such LoRA parameter; the tree has {', '.join(known)}")
    leaves = list(apart.leaves)
    for name, new in lora.items():
        pair = apart.pairs.get(name)
        old = leaves[apart.nodes[name]] if pair is None else _join(pair, *(leaves[i] for i in pair.indices))
        shapes = [(z.a.shape, z.b.shape) for z in (new, old)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name}: the factors are {shapes[0]}; the tree needs {shapes[1]}")
        root = math.sqrt(new.scale / old.scale)
        rescaled = new if root == 1 else new.with_factors(root * new.a, root * new.b)
        if pair is None:
            factors = (z.astype(like.dtype) for z, like in ((rescaled.a, old.a), (rescaled.b, old.b)))
            leaves[apart.nodes[name]] = old.with_factors(*factors)
            continue
        for index, factor in zip(pair.indices, pair.layout.split(rescaled, pair.shapes), strict=True):
            leaves[index] = factor.astype(leaves[index].dtype)
    return apart.treedef.unflatten(leaves)


def _take_apart(
    tree: Any,
    scale: Any = None,
    pattern: Any = None,
    transposed: bool | None = None,
    batch_axes: Any = None,
    stack_axis: Any = None,
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
        of_pair = lambda value, name=name: value(name) if callable(value) else value
        of_qwix = pattern is None and ending == _QWIX and stem.endswith("_")
        number = _checked_scale(paths[0], of_pair(scale), of_qwix)
        layout = layout_of(paths, shapes, transposed, of_pair(batch_axes), of_pair(stack_axis))
        pairs[name] = _Pair(paths, indices, shapes, layout, number)
    nodes = {weight_name(name): i for i, name in enumerate(names) if is_low_rank(leaves[i])}
    if leaves and not pairs and not nodes:
        expected = " and ".join(pattern or ("lora_a", "lora_b; lora_A", "lora_B; lora/a", "lora/b"))
        found = f"no paths end in {expected}; the paths are: {', '.join(names)}"
        raise ValueError(f"no pair of LoRA factors: {found}")
    repeated = [name for name, count in collections.Counter(names).items() if count > 1]
    repeated += set(pairs) & set(nodes)
    if repeated:
        raise ValueError(f"{', '.join(repeated)}: several leaves have this path")
    return _Tree(names, leaves, treedef, pairs, nodes)


def _checked_scale(path: str, scale: Any, of_qwix: bool) -> float | int:
    """The scale of a pair, 1 where nobody says it and the library is not known to have another."""
    if scale is None and of_qwix:
        known = "by its name it is Qwix's, which multiplies the factors by alpha / rank"
        raise ValueError(f"{path}: {known}; say scale=alpha / rank, or scale=1.0 if nothing does")
    if (number := positive_number(1.0 if scale is None else scale)) is None:
        raise ValueError(f"{path}: scale is {scale!r}; expected a positive number, alpha / rank")
    return number


def _factor(name: str, endings: tuple[tuple[str, str], ...]) -> tuple[str, tuple[str, str], int] | None:
    """(what is before the ending, the pair of endings, 0 for a or 1 for b) of a factor's path."""
    for ending in endings:
        for which, end in enumerate(ending):
            stem = name.removesuffix(end)
            if stem != name and (not stem or stem.endswith(("/", ".", "_"))):
                return stem, ending, which
    return None


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
    """The matrix of two leaves."""
    for path, shape, leaf in zip(pair.paths, pair.shapes, (a, b), strict=True):
        got = getattr(leaf, "shape", type(leaf).__name__)
        if got != shape:
            raise ValueError(f"{path}: the gradient is {got}; the parameter needs an array {shape}")
    return pair.layout.join(a, b, pair.scale)
