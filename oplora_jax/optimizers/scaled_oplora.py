"""Scaled OPLoRA: the preconditioned full step, brought back to rank r in the preconditioner's own norm."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from oplora_jax.gradients.tangent import of_full_gradients
from oplora_jax.matrix import DenseGradient, LowRank, OuterProduct, is_zero
from oplora_jax.metrics import (
    KroneckerMetric,
    Structure,
    average,
    kfac_moments,
    powers,
    relative,
    shampoo_moments,
    typical,
)
from oplora_jax.optimizers import _rulers
from oplora_jax.optimizers._factors import from_wide
from oplora_jax.optimizers._facts import facts
from oplora_jax.optimizers._lift import at_step, lora_optimizer
from oplora_jax.optimizers._momentum import heavy_ball, random_start
from oplora_jax.optimizers._types import check_state_dtype
from oplora_jax.products import compute_dtype

_DEFAULTS = {
    "relative": {
        "b1": 0.8,
        "regularization": 0.1,
        "damping": 1e-3,
        "momentum_kind": "factors",
        "bias_correction": True,
    },
    "absolute": {  # of PSI-LoRA
        "b1": 0.9,
        "regularization": 1e-2,
        "damping": 1e-5,
        "momentum_kind": "low_rank",
        "bias_correction": False,
    },
}


class ScaledOPLoRAState(NamedTuple):
    """State of `scaled_oplora` at the LoRA parameters."""

    momentum: Any  # LowRank at each LoRA parameter: a (*batch, n, r), b (*batch, r, m); None without momentum
    moments: KroneckerMetric  # of trees: (*batch, n) and (*batch, m), dense (*batch, n, n) and (*batch, m, m)
    size: Any = None  # relative units alone: (*batch, 2), mean squares of what steps take of gradients
    metric: KroneckerMetric | None = None  # dense alone, of trees: the damped powers of the moments
    inverse_metric: KroneckerMetric | None = None  # likewise


@facts(gradient="moments", source="2602.16456", invariant="orthogonal")
def scaled_oplora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: Any = None,
    b2: Any = 0.99,
    num_iters: Any = None,
    regularization: Any = None,
    damping: Any = None,
    power: Any = 0.5,
    hold: Any = 4.0,
    units: Literal["relative", "absolute"] = "relative",
    momentum_kind: Literal["factors", "low_rank"] | None = None,
    metric: Literal["kfac", "shampoo"] = "kfac",
    structure: Structure = "diagonal",
    loss_reduction: Literal["mean", "sum"] = "mean",
    metric_every: Any = 1,
    bias_correction: Any = None,
    state_dtype: Any = None,
    others: optax.GradientTransformation | None = None,
    others_learning_rate: optax.ScalarOrSchedule = 1e-3,
    seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Scaled OPLoRA: preconditioned steps of the full weight, with little more than half of Adam's state.

    The one to begin with on language models: `scaled_oplora(1e-4)`, with gradients of
    `value_and_grad(loss_fn, moments="diagonal")`. Second moments of a layer's inputs, and of the gradients at
    its outputs, precondition each step.

    A learning rate means the same whatever the units of the loss and of a layer's inputs are, and changes
    little with the rank and the batch. It is the root mean square of the entries of a step in the full
    weight, where the inputs' is 1, and less where they are larger. In this project's experiments the best
    were 1e-4 for a language model and 1e-4 to 3e-4 for small networks.

    Args:
      learning_rate: a scalar or a schedule, of the size of Adam's in full training.
      b1: decay of the momentum; 0.8 if None. With 0 none is kept.
      b2: decay of the second moments.
      num_iters: alternating iterations of `lorsum`, for `momentum_kind="low_rank"` alone; 1 if None.
      regularization: of the least-squares solves, as a share of the mean eigenvalue of the r x r matrix that
        is inverted; 0.1 if None.
      damping: added to the second moments, as a share of their mean; 1e-3 if None.
      power: of the second moments: 0.5 takes their root, as Adam does; 0 leaves the gradient as it is, and 1
        divides by all of them.
      hold: how long a waits at the start, when b is zero: until b is longer than the root of so many steps.
        Early gradients of few tokens are mostly noise. With 0 it does not wait.
      units: "relative" as written here; "absolute" is the paper's optimizer, see below.
      momentum_kind: "factors" averages the two products of the gradient with the factors, all that a step
        needs to know of it, and is the usual one. "low_rank" keeps the momentum as a matrix of rank r and
        steps by `lorsum`, as `oplora` does. None takes "factors" with relative units and "low_rank" with
        absolute ones.
      metric: where the second moments come from. "kfac": the layer's inputs and the gradients at its outputs,
        which an `OuterProduct` holds and a `DenseGradient` (`value_and_grad(..., moments=structure)`)
        measures. "shampoo": G G^T and G^T G, of any gradient G; it does not know the size of the inputs,
        which counts as 1, nor of an array or of factor gradients the number of tokens, which counts as 1 too.
      structure: "diagonal", one number for each input and each output; or "dense", whole matrices.
      loss_reduction: whether the loss is a "mean" or a "sum" over tokens.
      metric_every: with dense structure, the steps between two decompositions of the second moments; their
        averages take in every step.
      bias_correction: whether averages are corrected for their start, as Adam's are. True if None, and always
        with relative units; False with absolute ones.
      state_dtype: the type that the momentum is kept in; the parameters' if None. Second moments are kept in
        float32 at least.
      others: the optimizer of the leaves that are no LoRA parameters, such as a head; AdamW with the same b1,
        b2 and state_dtype if None.
      others_learning_rate: of that AdamW, a scalar or a schedule.
      seed: of the random start of a low-rank momentum's left factor.

    Returns:
      An Optax transformation. Its state has, for a weight of n inputs and m outputs, two factors of momentum,
      ``optax.tree.get(state, "momentum")``, and n + m numbers, or 3 (n^2 + m^2) with dense structure.

    Raises:
      ValueError: an unknown name, arguments that do not go together; at the first update, a gradient whose
        second moments are not known, with the parameter's path.

    With $E$ the averaged second moments of either side, each over its mean, $D = (E + \delta I)^p$, and
    $g_a$, $g_b$ the averages of $G b^\top$ and $a^\top G$, corrected for their start, a step is

    $$
    \begin{aligned}
    a &\leftarrow a - c\,D_{in}^{-1}\,g_a\,(b\,D_{out}\,b^\top + \lambda_b I + (h\,l^2 / \alpha)\,I)^{-1} \\
    b &\leftarrow b - c\,(a^\top D_{in}\,a + \lambda_a I)^{-1}\,g_b\,D_{out}^{-1}
    \end{aligned}
    $$

    for the damping $\delta$, the power $p$, the regularization as $\lambda_a$ and $\lambda_b$, and $h$ the
    argument `hold`. A step's length in the full weight is $l = \eta \sqrt{n m} / x$, with $\eta$ the learning
    rate and $x$ the root mean square of the inputs, 0.1 at least; $c$ is such that a step of b along a usual
    gradient has this length, and $\alpha$ is the mean eigenvalue of $a^\top D_{in}\,a$. A gradient that would
    move a factor more than twice as far as usual counts for twice the usual.

    With `units="absolute"` the step is PSI-LoRA's,
    $P \leftarrow \mathrm{LoRSum}_D\,[P - \eta (1 - b_1)\,G - \eta\,b_1\,M]$, `lorsum` in the metric $D$ with
    a low-rank momentum $M$. Moments start at 1, damping is added as it is, regularization is multiplied by
    the learning rate (1e-5 at least), and None stands for the paper's values: b1 0.9, regularization 1e-2,
    damping 1e-5, no bias correction.

    From [PSI-LoRA](https://arxiv.org/abs/2602.16456).

    Examples:
      >>> import jax, jax.numpy as jnp, optax, oplora_jax
      >>> x, y = jnp.eye(3), jnp.outer(jnp.arange(3.0), jnp.ones(2))
      >>> loss_fn = lambda p: jnp.mean((oplora_jax.lora_dot(x, jnp.zeros((3, 2)), p) - y) ** 2)
      >>> params = oplora_jax.LowRank(jnp.ones((3, 1)), jnp.zeros((1, 2)))
      >>> tx = oplora_jax.scaled_oplora(optax.linear_schedule(0.1, 0.0, 100))
      >>> grad_fn = oplora_jax.grad(loss_fn, moments="diagonal")
      >>> step = jax.jit(lambda state, params: tx.update(grad_fn(params), state, params))
      >>> state = tx.init(params)
      >>> for _ in range(100):
      ...   updates, state = step(state, params)
      ...   params = optax.apply_updates(params, updates)
      >>> bool(loss_fn(params) < 1e-3)
      True
    """
    known = {
        "units": (units, ("relative", "absolute")),
        "momentum_kind": (momentum_kind, ("factors", "low_rank", None)),
        "metric": (metric, ("kfac", "shampoo")),
        "structure": (structure, ("diagonal", "dense")),
        "loss_reduction": (loss_reduction, ("mean", "sum")),
    }
    for name, (value, values) in known.items():
        if value not in values:
            raise ValueError(f"{name} is {value!r}; expected {values[0]!r} or {values[1]!r}")
    always = isinstance(metric_every, int) and metric_every == 1
    if isinstance(metric_every, int) and (metric_every < 1 or (structure == "diagonal" and not always)):
        raise ValueError(
            f"metric_every is {metric_every} with structure={structure!r}; expected a positive number, and 1 "
            "for a diagonal metric, which is not decomposed"
        )
    is_relative, dense = units == "relative", structure == "dense"
    given = {
        "b1": b1,
        "regularization": regularization,
        "damping": damping,
        "momentum_kind": momentum_kind,
        "bias_correction": bias_correction,
    }
    chosen = {name: _DEFAULTS[units][name] if value is None else value for name, value in given.items()}
    b1, regularization, damping, momentum_kind, bias_correction = chosen.values()
    of_factors = momentum_kind == "factors"
    if of_factors and (num_iters is not None or not is_relative):
        raise ValueError(
            f"num_iters is {num_iters} and units is {units!r} with momentum_kind='factors', whose steps are "
            "not iterated and have relative units; expected momentum_kind='low_rank'"
        )
    if is_relative and bias_correction is False:
        raise ValueError("bias_correction is False with units='relative'; expected units='absolute'")
    estimate = kfac_moments if metric == "kfac" else shampoo_moments

    def init(param, key):
        ones = _ones(param, structure)
        caches = [jax.tree.map(jnp.array, ones) if dense else None for _ in range(2)]
        momentum = jax.tree.map(jnp.zeros_like, param) if of_factors else random_start(param, key)
        zeros = jnp.zeros_like(param.a, compute_dtype(param.a, param.b))
        size = jnp.stack([jnp.sum(zeros, axis=(-2, -1))] * 2, axis=-1) if is_relative else None
        return ScaledOPLoRAState(None if is_zero(b1) else momentum, ones, size, *caches)

    def step(params, gradients, states, count):
        lr = at_step(learning_rate, count)
        since_start = lambda decay: 1 - jnp.asarray(decay, lr.dtype) ** (count + 1)
        # Exactly 1 at the first step: rounding would leave of the start what is more than small moments.
        of_moments = jnp.where(count == 0, 1, (1 - b2) / since_start(b2))
        weight = jnp.where(bias_correction, of_moments, 1 - b2)

        def measured(gradient, state):
            new = estimate(gradient, structure, loss_reduction)
            return jax.tree.map(lambda x, y: average(x, y, weight), state.moments, new)

        def of_one(moment, shape):
            shares = relative(moment, shape) if is_relative else moment
            return powers(shares, power, damping, batch_ndim=len(shape) - 2)

        moments = [measured(*z) for z in zip(gradients, states, strict=True)]
        shapes = [param.shape for param in params]
        decompose = lambda: [*map(of_one, moments, shapes)]
        if dense and not always:
            kept = lambda: [(state.metric, state.inverse_metric) for state in states]
            metrics = jax.lax.cond(count % metric_every == 0, decompose, kept)
        else:
            metrics = decompose()
        momenta, sizes = [state.momentum for state in states], [state.size for state in states]
        rates = {"learning_rate": lr, "decay": b1, "share": 1 - b1, "weight": 1.0}
        ridge = jnp.maximum(lr * regularization, 1e-5)
        if is_relative:
            known = [typical(z.input, shape, damping) for z, shape in zip(moments, shapes, strict=True)]
            inputs = known if metric == "kfac" else [1.0] * len(known)
            products = [_rulers.factor_products(*z) for z in zip(params, gradients, strict=True)]
            settings = {"weight": weight, "regularization": regularization, "hold": hold}
            rulers = _rulers.measure(params, products, metrics, inputs, sizes, learning_rate=lr, **settings)
            sizes, ridge = [z.size for z in rulers], regularization
            rates["learning_rate"] = lr / since_start(b1)  # the momentum starts at zero
        if of_factors:
            ahead = [_rulers.averaged(*z, b1) for z in zip(momenta, products, rulers, strict=True)]
            new = [
                _rulers.step_along(*z, since_start(b1))
                for z in zip(params, ahead, metrics, rulers, strict=True)
            ]
            momenta = [m if m is None else from_wide(m, *z) for m, z in zip(momenta, ahead, strict=True)]
        else:
            if is_relative:
                metrics = [_rulers.in_units(*z) for z in zip(metrics, rulers, strict=True)]
            settings = {"regularization": (ridge, ridge), "num_iters": 1 if num_iters is None else num_iters}
            found = heavy_ball(params, momenta, gradients, metrics, **rates, **settings, relative=is_relative)
            new, momenta = map(list, zip(*found, strict=True))
        after = zip(momenta, moments, sizes, metrics, strict=True)
        return new, [ScaledOPLoRAState(*z, *(d if dense else ())) for *z, d in after]

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
