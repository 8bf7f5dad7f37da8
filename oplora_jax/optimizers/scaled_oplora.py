"""Scaled OPLoRA: the preconditioned full step, brought back to rank r in the preconditioner's own norm."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from oplora_jax.gradients.tangent import of_full_gradients
from oplora_jax.matrix import DenseGradient, LowRank, OuterProduct, is_zero
from oplora_jax.metrics import KroneckerMetric, Structure, average, kfac_moments, powers, shampoo_moments
from oplora_jax.optimizers._facts import facts
from oplora_jax.optimizers._lift import at_step, lora_optimizer
from oplora_jax.optimizers._momentum import heavy_ball, random_start
from oplora_jax.optimizers._types import check_state_dtype
from oplora_jax.products import compute_dtype


class ScaledOPLoRAState(NamedTuple):
    """State of `scaled_oplora` at the LoRA parameters."""

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
    loss_reduction: Literal["mean", "sum"] = "mean",
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

    Args:
      learning_rate: eta, a scalar or a schedule, of a step in the full weight, preconditioned.
      b1: decay of the momentum. With 0 none is kept.
      b2: decay of the second moments.
      num_iters: as for `oplora`: 0 is the Jacobi step of the weights, preconditioned LoRA.
      regularization: of the solves; multiplied by the learning rate, and the product is at least 1e-5.
      damping: delta, added to the second moments.
      power: p. 0 is the Frobenius norm, and 1 the whole preconditioner.
      metric: the second moments. "kfac", x^T x / N and N dy^T dy over the N tokens, needs them in the
        gradient: an `OuterProduct`, or a `DenseGradient` (`value_and_grad(..., moments=structure)`).
        "shampoo", N G G^T and N G^T G, takes any gradient; a plain array does not tell N, and factor
        gradients (`jax.grad`) stand for their projection on the tangent space: for both N counts as 1.
      structure: of the metric: the diagonals of both moments, or the whole matrices.
      loss_reduction: of the loss over tokens. "mean" as written above; of a summed loss, dy^T dy / N,
        G G^T / N and G^T G / N.
      metric_every: the steps between two decompositions of a dense metric; its moments are averaged at
        every step all the same.
      bias_correction: whether the averages are those of the moments alone, without the start at 1.
      state_dtype: of the momentum, as for `oplora`; the metric stays in float32 at least.
      others: for the leaves that are no LoRA parameters; AdamW with the same b1, b2 and state_dtype if None.
      others_learning_rate: of that AdamW, a scalar or a schedule.
      seed: of the random start of the momentum's left factor.

    Returns:
      An Optax transformation. Its state is a low-rank matrix a parameter, `momentum`, and beside it n + m
      numbers for a diagonal metric or 3 (n^2 + m^2) for a dense one.

    Raises:
      ValueError: an unknown name, metric_every with a diagonal metric or below 1; at the first update, a
        gradient whose second moments are not known, with the parameter's path.

    Example:
      >>> import jax, jax.numpy as jnp, optax, oplora_jax
      >>> x, y = jnp.eye(3), jnp.outer(jnp.arange(3.0), jnp.ones(2))
      >>> loss_fn = lambda p: jnp.mean((oplora_jax.lora_dot(x, jnp.zeros((3, 2)), p) - y) ** 2)
      >>> params = oplora_jax.LowRank(jnp.ones((3, 1)), jnp.zeros((1, 2)))
      >>> tx = oplora_jax.scaled_oplora(0.3, b1=0.5)
      >>> grad_fn = oplora_jax.grad(loss_fn, moments="diagonal")
      >>> step = jax.jit(lambda state, params: tx.update(grad_fn(params), state, params))
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...   updates, state = step(state, params)
      ...   params = optax.apply_updates(params, updates)
      >>> bool(loss_fn(params) < 1e-5)
      True

    References:
      PSI-LoRA, https://arxiv.org/abs/2602.16456.
    """
    for name, value, *known in (
        ("metric", metric, "kfac", "shampoo"),
        ("structure", structure, "diagonal", "dense"),
        ("loss_reduction", loss_reduction, "mean", "sum"),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; expected {known[0]!r} or {known[1]!r}")
    always = isinstance(metric_every, int) and metric_every == 1
    if isinstance(metric_every, int) and (metric_every < 1 or (structure == "diagonal" and not always)):
        raise ValueError(
            f"metric_every is {metric_every} with structure={structure!r}; expected a positive number, and 1 "
            "for a diagonal metric, which is not decomposed"
        )
    dense = structure == "dense"
    estimate = kfac_moments if metric == "kfac" else shampoo_moments

    def init(param, key):
        ones = _ones(param, structure)
        caches = (jax.tree.map(jnp.array, ones), jax.tree.map(jnp.array, ones)) if dense else ()
        return ScaledOPLoRAState(None if is_zero(b1) else random_start(param, key), ones, *caches)

    def step(params, gradients, states, count):
        lr = at_step(learning_rate, count)
        ridge = jnp.maximum(lr * regularization, 1e-5)
        corrected = (1 - b2) / (1 - jnp.asarray(b2, lr.dtype) ** (count + 1))
        weight = jnp.where(bias_correction, corrected, 1 - b2)

        def measured(gradient, state):
            new = estimate(gradient, structure, loss_reduction)
            return jax.tree.map(lambda x, y: average(x, y, weight), state.moments, new)

        moments = [measured(*z) for z in zip(gradients, states, strict=True)]
        of_one = lambda z, param: powers(z, power, damping, batch_ndim=param.a.ndim - 2)
        decompose = lambda: [*map(of_one, moments, params)]
        if dense and not always:
            kept = lambda: [(state.metric, state.inverse_metric) for state in states]
            metrics = jax.lax.cond(count % metric_every == 0, decompose, kept)
        else:
            metrics = decompose()
        momenta = [state.momentum for state in states]
        rates = {"learning_rate": lr, "decay": b1, "share": 1 - b1, "weight": 1.0}
        settings = {"regularization": (ridge, ridge), "num_iters": num_iters}
        found = heavy_ball(params, momenta, gradients, metrics, **rates, **settings)
        after = zip(found, moments, metrics, strict=True)
        states = [ScaledOPLoRAState(m, z, *(d if dense else ())) for (_, m), z, d in after]
        return [new for new, _ in found], states

    if others is None:
        adam = {"b1": b1, "b2": b2, "mu_dtype": check_state_dtype(state_dtype), "weight_decay": 0.0}
        others = optax.adamw(others_learning_rate, **adam)
    check = (lambda param, gradient: _missing_moments(gradient, structure)) if metric == "kfac" else None
    return lora_optimizer(
        init, of_full_gradients(step), others=others, state_dtype=state_dtype, check=check, seed=seed
    )


def _ones(param: LowRank, structure: Structure) -> KroneckerMetric:
    """The identity on both sides of a parameter, in float32 at least, sharded as its rows and columns."""
    dtype = compute_dtype(param.a, param.b)
    column, row = jnp.zeros_like(param.a[..., :1], dtype), jnp.zeros_like(param.b[..., :1, :], dtype)
    if structure == "diagonal":
        return KroneckerMetric(column[..., 0] + 1, row[..., 0, :] + 1)
    *batch, n, m = param.shape
    eye = lambda size: jnp.broadcast_to(jnp.eye(size, dtype=dtype), (*batch, size, size))
    return KroneckerMetric(column + eye(n), row + eye(m))


def _missing_moments(gradient: Any, structure: Structure) -> str | None:
    """What is wrong with a gradient that does not know the second moments of its tokens."""
    if isinstance(gradient, OuterProduct):
        return None
    got = "factor gradients" if isinstance(gradient, LowRank) else "an array"
    if isinstance(gradient, DenseGradient):
        if structure == "diagonal" or gradient.x_moment.ndim == gradient.gradient.ndim:
            return None
        got = "a DenseGradient with diagonal moments"
    return (
        f"metric='kfac' with structure={structure!r} needs the second moments of x and dy, and the gradient "
        f"is {got}. Take gradients with oplora_jax.value_and_grad and moments={structure!r} or "
        "gradient='outer', or choose metric='shampoo'"
    )
