"""Scaled OPLoRA: the preconditioned full step, brought back to rank r in the preconditioner's own norm."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from oplora_jax.matrix import DenseGradient, LowRank, OuterProduct, compute_dtype, is_low_rank
from oplora_jax.metrics import (
    KroneckerMetric,
    Reduction,
    Structure,
    average,
    kfac_moments,
    powers,
    shampoo_moments,
)
from oplora_jax.optimizers._facts import facts
from oplora_jax.optimizers._lift import at_step, for_lora, full_gradient, is_zero, map_lora
from oplora_jax.optimizers.momentum import init_momentum, momentum_rule, take_steps
from oplora_jax.optimizers.precision import check_state_dtype
from oplora_jax.problems import Problem, Rule, Sum


class ScaledOPLoRAState(NamedTuple):
    """State of `scaled_oplora` at the LoRA parameters."""

    count: Array  # int32 ()
    momentum: Any  # LowRank at each LoRA parameter: a (*batch, n, r), b (*batch, r, m); None without momentum
    moments: KroneckerMetric  # of trees: (*batch, n) and (*batch, m), dense (*batch, n, n) and (*batch, m, m)
    metric: KroneckerMetric | None = None  # dense alone, of trees: the damped powers of the moments
    inverse_metric: KroneckerMetric | None = None  # likewise


@facts(gradient="moments", source="2602.16456", invariant="orthogonal")
def scaled_oplora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Any = 0.9,
    b2: Any = 0.99,
    num_iters: Any = 1,
    regularization: Any = 1e-2,
    damping: Any = 1e-5,
    power: Any = 0.5,
    metric: Literal["kfac", "shampoo"] = "kfac",
    structure: Structure = "diagonal",
    loss_reduction: Reduction = "mean",
    metric_every: Any = 1,
    bias_correction: Any = False,
    state_dtype: Any = None,
    others: optax.GradientTransformation | None = None,
    others_learning_rate: optax.ScalarOrSchedule = 1e-3,
    seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Scaled OPLoRA: steps of `oplora` preconditioned on both sides and projected in the metric's norm.

    With P = s a b the increment, G the gradient of the full weight and M the low-rank momentum,

    .. math::
      P &\leftarrow \mathrm{LoRSum}_D[(1, P), (-\eta (1 - \beta_1), G), (-\eta \beta_1, M)] \\
      M &\leftarrow \mathrm{LoRSum}[(\beta_1, M), (1 - \beta_1, G)],

    where the first sum is that of `lorsum` in the metric :math:`D = (E + \delta I)^p` of the layer's two
    sides: the full step is :math:`-\eta D_{in}^{-1} G D_{out}^{-1}`. E is an exponential average of second
    moments, started at 1 and taken on before use.

    Next to the momentum the state holds n + m numbers a parameter for a diagonal metric and, with the cached
    powers, 3 (n^2 + m^2) for a dense one.

    Args:
      learning_rate: eta, a scalar or a schedule.
      b1: decay of the momentum. With 0 none is kept.
      b2: decay of the second moments.
      num_iters: alternating iterations of each LoRSum; 0 is the Jacobi step, preconditioned LoRA.
      regularization: of the solves; multiplied by the learning rate, and the product is at least 1e-5.
      damping: delta, added to the second moments.
      power: p. 0 is the Frobenius norm, and 1 the whole preconditioner.
      metric: the second moments. "kfac", x^T x / N and N dy^T dy over the N tokens, needs them in the
        gradient: an `OuterProduct`, or a `DenseGradient` (`value_and_grad(..., moments=structure)`).
        "shampoo", N G G^T and N G^T G, takes any gradient; a plain array does not tell N, and the
        `LowRank` of factor gradients stands for its tangent gradient: there N counts as 1.
      structure: of the metric: the diagonals of both moments, or the whole matrices.
      loss_reduction: of the loss over tokens. "mean" as written above; of a summed loss, dy^T dy / N,
        G G^T / N and G^T G / N.
      metric_every: the steps between two decompositions of a dense metric; its moments are averaged at
        every step all the same.
      bias_correction: whether the averages are those of the moments alone, without the start at 1.
      state_dtype: of the momentum; the parameters' if None. float32 for bfloat16 parameters computes the
        step in float32 and rounds it once; bfloat16 for float32 parameters halves the momentum. The second
        moments and their powers stay in float32 at least, for their averages would hardly move in bfloat16.
      others: for the leaves that are no LoRA parameters; AdamW with the same b1, b2 and state_dtype (of its
        first moment) if None.
      others_learning_rate: of that AdamW, a scalar or a schedule.
      seed: of the random start of the momentum's left factor.

    Returns:
      An Optax transformation. Its state has a field `momentum`, a tree with a `LowRank` at each LoRA
      parameter.

    Raises:
      ValueError: an unknown name, metric_every with a diagonal metric or below 1; at the first update, a
        gradient whose second moments are not known, with the parameter's path.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import oplora_jax
      >>> x, y = jnp.eye(3), jnp.outer(jnp.arange(3.0), jnp.ones(2))
      >>> params = oplora_jax.LowRank(jnp.ones((3, 1)), jnp.zeros((1, 2)))
      >>> tx = oplora_jax.scaled_oplora(0.3, b1=0.5)
      >>> state = tx.init(params)
      >>> def loss_fn(params):
      ...   return jnp.mean((oplora_jax.lora_dot(x, jnp.zeros((3, 2)), params) - y) ** 2)
      >>> @jax.jit
      ... def step(params, state):
      ...   gradients = oplora_jax.grad(loss_fn, moments="diagonal")(params)
      ...   updates, state = tx.update(gradients, state, params)
      ...   return optax.apply_updates(params, updates), state
      >>> for _ in range(100):
      ...   params, state = step(params, state)
      >>> bool(loss_fn(params) < 1e-5)
      True

    References:
      PSI-LoRA, https://arxiv.org/abs/2602.16456.
    """
    names = {
        "metric": (metric, ("kfac", "shampoo")),
        "structure": (structure, ("diagonal", "dense")),
        "loss_reduction": (loss_reduction, ("mean", "sum")),
    }
    for name, (value, known) in names.items():
        if value not in known:
            raise ValueError(f"{name} is {value!r}; expected {known[0]!r} or {known[1]!r}")
    always = isinstance(metric_every, int) and metric_every == 1
    if isinstance(metric_every, int) and (metric_every < 1 or (structure == "diagonal" and not always)):
        raise ValueError(
            f"metric_every is {metric_every} with structure={structure!r}; expected a positive number, and 1 "
            "for a diagonal metric, which is not decomposed"
        )
    has_momentum, dense = not is_zero(b1), structure == "dense"
    estimate = kfac_moments if metric == "kfac" else shampoo_moments

    def init_fn(params):
        ones = KroneckerMetric(*map_lora(lambda param: _ones(param, structure), 2, params))
        momentum = init_momentum(params, seed) if has_momentum else None
        caches = (jax.tree.map(jnp.array, ones), jax.tree.map(jnp.array, ones)) if dense else ()
        return ScaledOPLoRAState(jnp.zeros((), jnp.int32), momentum, ones, *caches)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if metric == "kfac":
            _check_moments(updates, params, structure)
        lr = at_step(learning_rate, state.count)
        ridge = jnp.maximum(lr * regularization, 1e-5)
        share = 1 - b1
        rate, pull = -lr * share, -lr * b1
        rules = [Rule([1.0, pull], [rate], ridge), momentum_rule(b1, share, ridge)]
        if not has_momentum:
            rules = [Rule([1.0], [rate], ridge)]
        count = optax.safe_increment(state.count)
        corrected = (1 - b2) / (1 - jnp.asarray(b2, lr.dtype) ** count)
        weight = jnp.where(bias_correction, corrected, 1 - b2)

        def measure(param, gradient, *old):
            new = estimate(full_gradient(param, gradient), structure, loss_reduction)
            return tuple(average(*pair, weight) for pair in zip(old, new, strict=True))

        def raise_sides(param, *sides):
            at = KroneckerMetric(*sides)
            forward, backward = powers(at, power, damping, batch_ndim=len(param.shape) - 2)
            return *forward, *backward

        def problem(param, gradient, *sides):
            gradient = full_gradient(param, gradient)
            *sides, old = sides if has_momentum else (*sides, None)
            metrics = KroneckerMetric(*sides[:2]), KroneckerMetric(*sides[2:])
            return Problem([gradient], [Sum(param, *metrics), *(() if old is None else (Sum(old),))])

        moments = KroneckerMetric(*map_lora(measure, 2, params, updates, *state.moments))
        decompose = lambda: map_lora(raise_sides, 4, params, *moments)
        if dense and not always:
            kept = lambda: (*state.metric, *state.inverse_metric)
            sides = jax.lax.cond(state.count % metric_every == 0, decompose, kept)
        else:
            sides = decompose()
        olds = [state.momentum] if has_momentum else []
        updates, momentum = take_steps(rules, problem, num_iters, params, updates, *sides, *olds)
        caches = (KroneckerMetric(*sides[:2]), KroneckerMetric(*sides[2:])) if dense else ()
        return updates, ScaledOPLoRAState(count, momentum if olds else None, moments, *caches)

    state_dtype = check_state_dtype(state_dtype)
    if others is None:
        adam = {"b1": b1, "b2": b2, "mu_dtype": state_dtype, "weight_decay": 0.0}
        others = optax.adamw(others_learning_rate, **adam)
    lora = optax.GradientTransformation(init_fn, update_fn)
    return for_lora(lora, others, state_dtype=state_dtype)


def _ones(param: LowRank, structure: Structure) -> tuple[Array, Array]:
    """The identity on both sides of a parameter, in float32 at least, sharded as its rows and columns."""
    dtype = compute_dtype(param.a, param.b)
    column, row = jnp.zeros_like(param.a[..., :1], dtype), jnp.zeros_like(param.b[..., :1, :], dtype)
    if structure == "diagonal":
        return column[..., 0] + 1, row[..., 0, :] + 1
    *batch, n, m = param.shape
    eye = lambda size: jnp.broadcast_to(jnp.eye(size, dtype=dtype), (*batch, size, size))
    return column + eye(n), row + eye(m)


def _check_moments(updates: Any, params: Any, structure: Structure) -> None:
    """Raises ValueError for a LoRA parameter whose gradient does not know its tokens."""
    paths_and_nodes, treedef = jax.tree.flatten_with_path(params, is_leaf=is_low_rank)
    gradients = treedef.flatten_up_to(updates)
    for (path, _), gradient in zip(paths_and_nodes, gradients, strict=True):
        if isinstance(gradient, OuterProduct):
            continue
        if isinstance(gradient, DenseGradient):
            if structure == "diagonal" or gradient.x_moment.ndim == gradient.gradient.ndim:
                continue
            got = "a DenseGradient with diagonal moments"
        else:
            got = "factor gradients" if isinstance(gradient, LowRank) else "an array"
        name = jax.tree_util.keystr(path) or "the LoRA parameter"
        raise ValueError(
            f"{name}: metric='kfac' with structure={structure!r} needs the second moments of x and dy, and "
            f"the gradient is {got}. Take gradients with oplora_jax.value_and_grad and "
            f"moments={structure!r} or gradient='outer', or choose metric='shampoo'"
        )
