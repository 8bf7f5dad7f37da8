"""`value_and_grad` and `grad` with the exact gradient of the full weight at every LoRA parameter."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from oplora_jax._jax import ClosedJaxpr, Tracer
from oplora_jax.gradients.count_uses import Use, Uses, count_uses
from oplora_jax.gradients.evaluate import evaluate
from oplora_jax.gradients.microbatches import accumulate
from oplora_jax.gradients.tap import Tap, from_tap
from oplora_jax.gradients.views import whole
from oplora_jax.matrix import LowRank, check_factors, is_low_rank, matrix_entries
from oplora_jax.metrics import Structure
from oplora_jax.products import compute_dtype
from oplora_jax.sharding import partition, zeros

Kind = Literal["auto", "outer", "dense"]


def value_and_grad(
    loss_fn: Callable[..., Any],
    gradient: Kind = "auto",
    has_aux: bool = False,
    *,
    moments: Structure | None = None,
    microbatches: int | None = None,
    weight: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """`jax.value_and_grad` whose gradient at a LoRA parameter is the exact one of the full weight.

    In the place of a `LowRank` parameter it returns the gradient of the whole weight W + s a b: an
    `OuterProduct`, or an array of the weight's shape. Elsewhere it is what JAX gives. It works under
    `jax.jit`, `jax.vmap`, `jax.checkpoint`, `jax.lax.scan`, `nn.scan` and `nn.remat`.

    The loss must use its LoRA parameters through `lora_dot`, `merge` or `to_dense`: whole or in parts, `p[i]`
    of stacked layers, transposed, cast, or put together again from the same factors. Another use, whose
    gradient would be missed, is an error.

    Args:
      loss_fn: a function of `(params, *args, **kwargs)` that returns a scalar loss, or with `has_aux` a pair
        of the loss and auxiliary data. It is traced once.
      gradient: what stands at LoRA parameters. "outer": an `OuterProduct`, x and dy of the layer's N tokens,
        for parameters that are used once per forward pass, through `lora_dot`. "dense": an array, which adds
        up over all uses. "auto": for each parameter the kind that takes less arithmetic; dense where outer is
        not possible.
      has_aux: whether the loss returns auxiliary data.
      moments: with "diagonal" or "dense" a dense gradient is a `DenseGradient`, with the second moments that
        `scaled_oplora` takes. The parameter must then be used through `lora_dot` alone. None leaves them out.
      microbatches: k, to run the loss on one k-th of the batch after the other, with the activations of one
        in memory. The batch is all arrays in the positional arguments after params, whose first axes have one
        size, a multiple of k; microbatch i takes the rows i, i + k, i + 2 k and so on. Keyword arguments are
        passed whole: for dropout pass one random key a row in the batch, as a key by keyword is the same in
        all microbatches. Value and gradients are those of the mean over the microbatches; auxiliary data are
        stacked along a new first axis. None runs the whole batch at once.
      weight: what a microbatch counts for in that mean: a function of the loss's arguments after params, such
        as `lambda x, y, mask: mask.sum()` for a loss that is a mean over the tokens of a mask. Value and
        gradients are then those of the whole batch. By default all count the same.

    Returns:
      A function with the arguments of `loss_fn` that returns (value, gradients), or ((value, aux),
      gradients).

    Raises:
      ValueError: an unknown `gradient` or `moments`; a parameter, named by its path, that is used in a way
        whose exact gradient or moments cannot be taken, or that is no array of floating-point numbers; a
        batch that does not make k microbatches.

    With N tokens, rank r and an n x m weight, "auto" compares the arithmetic with the optimizer's step: 8 N r
    (n + m) for an outer product, 2 N n m + 8 n m r for an array.

    Examples:
      >>> import jax.numpy as jnp
      >>> import oplora_jax
      >>> params = {"lora": oplora_jax.LowRank(jnp.ones((3, 1)), jnp.zeros((1, 2)))}
      >>> def loss_fn(params, x):
      ...   return oplora_jax.lora_dot(x, jnp.ones((3, 2)), params["lora"]).sum()
      >>> loss, gradients = oplora_jax.value_and_grad(loss_fn, gradient="outer")(params, jnp.ones((1, 3)))
      >>> gradients["lora"].x.tolist(), gradients["lora"].dy.tolist()
      ([[1.0, 1.0, 1.0]], [[1.0, 1.0]])
    """

    def loss_and_state(params: Any, state: None, /, *args: Any, **kwargs: Any) -> Any:
        out = loss_fn(params, *args, **kwargs)
        if has_aux and not (isinstance(out, tuple | list) and len(out) == 2):
            raise ValueError(f"with has_aux=True the loss must return (loss, auxiliary data), not {out!r}")
        loss, aux = out if has_aux else (out, None)
        return loss, (aux, state)

    differentiate = stateful_value_and_grad(loss_and_state, gradient, moments, microbatches, weight)

    @functools.wraps(loss_fn)
    def value_and_grad_fn(params: Any, /, *args: Any, **kwargs: Any) -> Any:
        value, (aux, _), grads = differentiate(params, None, args, kwargs)
        return ((value, aux) if has_aux else value), grads

    return value_and_grad_fn


def stateful_value_and_grad(
    loss_fn: Callable[..., Any], gradient: Any, moments: Any, microbatches: Any, weight: Any = None
) -> Callable[..., Any]:
    """`value_and_grad` of a loss (params, state, *args, **kwargs) -> (loss, (aux, state)).

    The result is a function (params, state, args, kwargs) -> (value, (aux, state), gradients).
    """
    if gradient not in ("auto", "outer", "dense"):
        raise ValueError(f"gradient is {gradient!r}; expected 'auto', 'outer' or 'dense'")
    if moments not in (None, "diagonal", "dense"):
        raise ValueError(f"moments is {moments!r}; expected None, 'diagonal' or 'dense'")
    if microbatches is not None and microbatches < 1:
        raise ValueError(f"microbatches is {microbatches}; expected a positive number, or None")

    def differentiate(params, state, args, kwargs, share=None):
        paths_and_nodes, treedef = jax.tree.flatten_with_path(params, is_leaf=is_low_rank)
        nodes = [node for _, node in paths_and_nodes]

        def loss(nodes):
            value, rest = loss_fn(treedef.unflatten(nodes), state, *args, **kwargs)
            # The gradients of microbatches add up: each is of its share of the mean.
            return (value if share is None else value * share.astype(value.dtype)), rest

        program = TracedLoss(loss, paths_and_nodes)
        zeros = [
            None if found is None else _tap(name_of(path), node, found, gradient, moments, microbatches or 1)
            for (path, node), found in zip(paths_and_nodes, program.uses, strict=True)
        ]

        def tapped_loss(at):
            taps = {i: (z, (), None) for i, z in enumerate(at) if zeros[i] is not None}
            return program(at, taps)

        at = [node if z is None else z for node, z in zip(nodes, zeros, strict=True)]
        (value, rest), grads = jax.value_and_grad(tapped_loss, has_aux=True)(at)
        grads = [g if z is None else from_tap(g) for g, z in zip(grads, zeros, strict=True)]
        return value, program.rest(rest), treedef.unflatten(grads)

    return differentiate if microbatches is None else accumulate(differentiate, microbatches, weight)


def grad(
    loss_fn: Callable[..., Any],
    gradient: Kind = "auto",
    has_aux: bool = False,
    *,
    moments: Structure | None = None,
    microbatches: int | None = None,
    weight: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """`jax.grad` whose gradient at a LoRA parameter is the exact one of the full weight.

    `value_and_grad` without the value.

    Args:
      loss_fn: as for `value_and_grad`.
      gradient: as for `value_and_grad`.
      has_aux: whether the loss returns a pair of the loss and auxiliary data.
      moments: as for `value_and_grad`.
      microbatches: as for `value_and_grad`.
      weight: as for `value_and_grad`.

    Returns:
      A function with the arguments of `loss_fn` that returns the gradients, or (gradients, aux).

    Raises:
      ValueError: as for `value_and_grad`.

    Examples:
      >>> import jax.numpy as jnp
      >>> from oplora_jax import LowRank, grad, to_dense
      >>> lora = LowRank(jnp.ones((3, 1)), jnp.zeros((1, 2)))
      >>> grad(lambda lora: to_dense(lora).sum())(lora).tolist()
      [[1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]
    """
    of_all = {"moments": moments, "microbatches": microbatches, "weight": weight}
    value_and_grad_fn = value_and_grad(loss_fn, gradient, has_aux, **of_all)

    @functools.wraps(loss_fn)
    def grad_fn(*args: Any, **kwargs: Any) -> Any:
        value, grads = value_and_grad_fn(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return grad_fn


class TracedLoss:
    """A loss of the nodes of a tree, traced, and what it does with each LoRA parameter.

    loss is a function of the nodes that returns a pair, of the loss and of anything else. `uses` has None for
    the nodes that are no LoRA parameters.
    """

    program: ClosedJaxpr
    uses: list[Uses | None]

    def __init__(self, loss: Callable[..., Any], paths_and_nodes: list[Any]) -> None:
        self.nodes = [node for _, node in paths_and_nodes]
        for path, node in paths_and_nodes:
            if is_low_rank(node):
                check_factors(node, name_of(path))
            else:
                _check_differentiable(node, name_of(path))

        def traced(nodes):
            value, rest = loss(nodes)
            shape = getattr(value, "shape", () if isinstance(value, int | float | complex) else None)
            if shape != ():
                form = f"an array {shape}" if shape else f"a {type(value).__name__}"
                raise ValueError(f"the loss returns {form}; expected a scalar, or has_aux=True for a pair")
            leaves, self._treedef = jax.tree.flatten(rest)
            # Anything may come out of a loss; what is not computed need not be an array.
            self._known = {k: z for k, z in enumerate(leaves) if not isinstance(z, Tracer)}
            return jnp.asarray(value), [z for z in leaves if isinstance(z, Tracer)]

        self.program, factors = jax.make_jaxpr(traced)(self.nodes), []
        for i, node in enumerate(self.nodes):
            views = [whole(i, side, jnp.ndim(z)) for side, z in enumerate(jax.tree.leaves(node))]
            factors += views if is_low_rank(node) else [None] * len(views)
        found = count_uses(self.program, factors)
        for i, uses in found.items():
            if uses.elsewhere:
                raise ValueError(
                    f"{name_of(paths_and_nodes[i][0])}: the loss depends on the factors a and b of this LoRA "
                    "parameter p in a way whose full gradient cannot be taken. Multiply through lora_dot, "
                    "merge or to_dense alone, with parts of it as p[i], p.T or p.astype and statistics of a "
                    "and b in jax.lax.stop_gradient, outside of while loops and of functions with a "
                    "derivative of their own; or use jax.grad"
                )
        self.uses = [found.get(i) for i in range(len(self.nodes))]

    def __call__(self, nodes: list[Any], taps: dict[int, tuple[Any, ...]]) -> tuple[Any, list[Any]]:
        """The loss, and what `rest` takes, at other nodes.

        Instead of a LoRA parameter taps has (zeros, held, rule) of its `Tap`, by its number.
        """
        values, beside = [], []
        for i, node in enumerate(self.nodes):
            leaves = jax.tree.leaves(node if i in taps else nodes[i])
            values += leaves
            beside += self._beside(i, leaves, taps[i]) if i in taps else [None] * len(leaves)
        value, *rest = evaluate(self.program, values, beside)
        return value, rest

    def _beside(self, i: int, factors: list[Any], tap: tuple[Any, ...]) -> list[Tap]:
        """The tap of a parameter beside the factor, or factors, that stand first where it is used."""
        first = {int(use.transposed) for use in self.uses[i].places}
        of = lambda side, z: Tap(
            *(tap if side in first else ((),)), view=whole(i, side, z.ndim), scale=self.nodes[i].scale
        )
        return [of(*z) for z in enumerate(factors)]

    def rest(self, computed: list[Any]) -> Any:
        """What the loss returned beside its value."""
        computed = iter(computed)
        leaves = range(self._treedef.num_leaves)
        return self._treedef.unflatten(self._known[k] if k in self._known else next(computed) for k in leaves)


def name_of(path: Any) -> str:
    """A path of a tree, to name a parameter in an error."""
    return jax.tree_util.keystr(path) or "the LoRA parameter"


def _check_differentiable(leaf: Any, name: str) -> None:
    """Raises ValueError for what JAX takes no derivative by, such as a function among a module's leaves."""
    try:
        what = f"{jax.typeof(leaf).dtype} numbers"
        if jnp.issubdtype(jax.typeof(leaf).dtype, jnp.inexact):
            return
    except TypeError:
        what = f"a {type(leaf).__name__}"
    raise ValueError(
        f"{name}: {what} among the parameters, by which there is no derivative; expected LoRA parameters and "
        "floating-point arrays. Close the loss over it. For Equinox's modules "
        "oplora_jax.equinox.value_and_grad does that"
    )


def _tap(
    name: str, node: LowRank, uses: Uses, gradient: Kind, moments: Structure | None, microbatches: int
) -> tuple[jax.Array, ...]:
    (*batch, n, m), rank = node.shape, node.a.shape[-1]
    places, once = uses.places, uses.once
    if gradient == "outer" and not once:
        raise ValueError(
            f"{name}: gradient='outer' needs one use per forward pass, through lora_dot, but this is {uses}. "
            "Use gradient='dense' or 'auto', or concatenate the inputs and multiply once"
        )
    # Of an unused parameter: one row of zeros.
    unused = Use("dot", 0, 1, (node.a.dtype, node.b.dtype), (None,) * 3, node.scale, False)
    tokens, dtypes, (rows, *columns) = (places[0] if once and places else unused)[2:5]
    *batch_sharding, row, column = matrix_entries(node)

    def tap(shape, dtype, *sharding):
        return zeros((*batch, *shape), dtype, partition(*batch_sharding, *sharding), like=node)

    outer = 8 * microbatches * tokens * rank * (n + m)
    dense = 2 * microbatches * tokens * n * m + 8 * n * m * rank
    if gradient == "outer" or (gradient == "auto" and once and outer <= dense):
        sides = zip((n, m), dtypes, columns, strict=True)
        return tuple(tap((tokens, size), dtype, rows, entry) for size, dtype, entry in sides)
    gradient_tap = tap((n, m), node.dtype, row, column)
    if moments is None:
        return (gradient_tap,)
    if any(use.kind != "dot" for use in places):
        raise ValueError(
            f"{name}: moments={moments!r} needs the inputs of the layer, but this LoRA parameter is merged "
            "into a weight. Multiply through lora_dot, or take no moments and metric='shampoo'"
        )
    dtype = compute_dtype(node.a, node.b)
    axes = 1 if moments == "diagonal" else 2
    return gradient_tap, tap((n,) * axes, dtype, row), tap((m,) * axes, dtype, column), tap((), dtype)
