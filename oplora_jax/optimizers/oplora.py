"""OPLoRA: SGD with momentum on the full weight, with LoRSum in the place of addition."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from oplora_jax.gradients.tangent import of_full_gradients
from oplora_jax.lorsum import lorsum
from oplora_jax.matrix import LowRank, from_unit_scale, is_zero, left_product, transposed
from oplora_jax.optimizers._factors import gram_inverse, wide_at_unit_scale
from oplora_jax.optimizers._facts import facts
from oplora_jax.optimizers._lift import at_step, each, lora_optimizer
from oplora_jax.optimizers._momentum import at_least_one, heavy_ball, random_start
from oplora_jax.optimizers._types import check_state_dtype
from oplora_jax.products import times, transpose


class OPLoRAState(NamedTuple):
    """State of `oplora` at the LoRA parameters."""

    momentum: Any  # LowRank at each LoRA parameter: a (*batch, n, k), b (*batch, k, m); None without momentum
    previous: Any = None  # "projected" alone: the factors that its buffers belong to


@facts(gradient="exact", source="2509.19977", invariant="orthogonal", invariant_with={"regularization": 0.0})
def oplora(
    learning_rate: optax.ScalarOrSchedule,
    *,
    momentum: Any = 0.9,
    dampening: Any = 0.0,
    num_iters: Any = 1,
    regularization: Any = 1e-3,
    momentum_regularization: Any = None,
    momentum_rank: Any = None,
    momentum_kind: Literal["low_rank", "projected", "extrapolated"] = "low_rank",
    weight_decay: Any = 0.0,
    state_dtype: Any = None,
    others: optax.GradientTransformation | None = None,
    seed: Any = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""OPLoRA: SGD with momentum as on the full weight, with a state as small as the LoRA parameters.

    Each step is the gradient step of full training, brought back to rank r by `lorsum`, without an SVD. For
    well-scaled problems without a transformer; on language models take `scaled_oplora`.

    Args:
      learning_rate: a scalar or a schedule, of the size of full training's by SGD, usually larger than
        Adam's.
      momentum: decay of the momentum. With 0 or None no momentum is kept.
      dampening: the gradient counts for a share 1 - dampening in the momentum and in the step.
      num_iters: alternating iterations of each `lorsum`. With 0 both factors of the weights step from the old
        ones, as in `scaled_gd`, which near full rank goes up to twice as far; the momentum takes one at
        least.
      regularization: of the least-squares solves for the weights; it is multiplied by the learning rate.
      momentum_regularization: the same for the momentum; `regularization` if None.
      momentum_rank: the rank of the momentum; the parameter's if None.
      momentum_kind: "low_rank" is the formula below. "projected" keeps what the factors of the weights need
        to know of the momentum, and carries it from each pair of factors to the next. "extrapolated" keeps
        the last weights, and goes on in the direction from them to the new ones.
      weight_decay: decoupled, as in `optax.adamw`: multiplied by the learning rate.
      state_dtype: the type that the momentum is kept in; the parameters' if None. `jnp.bfloat16` halves the
        state; `jnp.float32` beside bfloat16 parameters computes the step in float32 and rounds it once.
        "extrapolated" keeps weights in it, which a type narrower than theirs would round at every step.
      others: the optimizer of the leaves that are no LoRA parameters, such as a head; SGD with the same
        settings if None. `optax.set_to_zero()` freezes them.
      seed: of the random start of the momentum's left factor.

    Returns:
      An Optax transformation. It takes exact gradients (`value_and_grad`); of those of `jax.grad` it uses
      what `tangent_gradient` makes of them. Its state has a `LowRank` at each LoRA parameter,
      ``optax.tree.get(state, "momentum")``. (Under `optax.inject_hyperparams` a setting has the same name:
      pass `static_args="momentum"`, and "momentum_rank" and "state_dtype" if they are given.)

    Raises:
      ValueError: an argument out of range.

    With $P = s\,a\,b$ the increment of a weight, $G$ the gradient of the whole weight and $M$ the momentum, a
    matrix of low rank, a step is

    $$
    \begin{aligned}
    P &\leftarrow \mathrm{LoRSum}\,[(1 - \eta w)\,P - \eta (1 - d)\,G - \eta \mu\,M] \\
    M &\leftarrow \mathrm{LoRSum}\,[\mu\,M + (1 - d)\,G]
    \end{aligned}
    $$

    for the learning rate $\eta$, the momentum $\mu$, the dampening $d$ and the weight decay $w$; both lines
    take the old $P$ and $M$. "extrapolated" is $Z = \mathrm{LoRSum}\,[(1 - \eta w)\,P - \eta (1 - d)\,G]$ and
    then $P = \mathrm{LoRSum}\,[(1 + \mu)\,Z - \mu\,Z_{old}]$.

    From [OPLoRA](https://arxiv.org/abs/2509.19977).

    Examples:
      >>> import jax.numpy as jnp, optax, oplora_jax
      >>> loss_fn = lambda p: jnp.sum((oplora_jax.to_dense(p) - jnp.outer(jnp.arange(3.0), jnp.ones(2))) ** 2)
      >>> params = oplora_jax.LowRank(jnp.ones((3, 1)), jnp.zeros((1, 2)))
      >>> tx = oplora_jax.oplora(0.1, momentum=0.5)
      >>> state = tx.init(params)
      >>> for _ in range(50):
      ...   updates, state = tx.update(oplora_jax.grad(loss_fn)(params), state, params)
      ...   params = optax.apply_updates(params, updates)
      >>> bool(loss_fn(params) < 1e-6)
      True
    """
    if momentum_kind not in ("low_rank", "projected", "extrapolated"):
        raise ValueError(
            f"momentum_kind is {momentum_kind!r}; expected 'low_rank', 'projected' or 'extrapolated'"
        )
    too_small = isinstance(momentum_rank, int) and momentum_rank < 1
    if momentum_rank is not None and (momentum_kind != "low_rank" or too_small):
        raise ValueError(
            f"momentum_rank is {momentum_rank} with momentum_kind={momentum_kind!r}; expected a positive "
            "number, and only with momentum_kind='low_rank'"
        )
    kind = "none" if is_zero(momentum) else momentum_kind
    decay, share = 0.0 if is_zero(momentum) else momentum, 1 - dampening

    def init(param, key):
        if kind == "none":
            return OPLoRAState(None)
        if kind == "low_rank":
            return OPLoRAState(random_start(param, key, momentum_rank))
        copy = jax.tree.map(jnp.array, param)
        if kind == "extrapolated":
            return OPLoRAState(copy)
        return OPLoRAState(jax.tree.map(jnp.zeros_like, param), previous=copy)

    def step(params, gradients, states, count):
        lr = at_step(learning_rate, count)
        given = regularization if momentum_regularization is None else momentum_regularization
        ridges = tuple(0.0 if is_zero(value) else lr * value for value in (regularization, given))
        momenta = [state.momentum if kind == "low_rank" else None for state in states]
        rates = {"learning_rate": lr, "decay": decay, "share": share, "weight": 1 - lr * weight_decay}
        settings = {"regularization": ridges, "num_iters": num_iters}
        found = heavy_ball(params, momenta, gradients, [None] * len(params), **rates, **settings)
        new = [z for z, _ in found]
        if kind in ("none", "low_rank"):
            return new, [OPLoRAState(moment) for _, moment in found]
        # These add their momentum to the plain step.
        if kind == "extrapolated":
            # The extrapolation of a Jacobi step would be 2 decay long, more than there is.
            settings = {"regularization": ridges[0], "num_iters": at_least_one(num_iters)}
            ahead = lambda z, state: lorsum([(1 + decay, z), (-decay, state.momentum)], **settings)
            return [*map(ahead, new, states)], [OPLoRAState(z) for z in new]
        carry = lambda z, gradient, state, _: _projected(z, gradient, state, lr, decay, share, ridges[0])
        return each(carry)(new, gradients, states, count)

    if others is None:
        others = _heavy_ball_of_arrays(learning_rate, momentum, dampening, weight_decay, state_dtype)
    return lora_optimizer(init, of_full_gradients(step), others=others, state_dtype=state_dtype, seed=seed)


def _projected(z, gradient, state, lr, decay, share, ridge):
    """The step along the projected momentum, from the new factors z, and the momentum carried to them."""
    (at, b), (old_at, old_b) = wide_at_unit_scale(z), wide_at_unit_scale(state.previous)
    buffer_at, buffer_b = wide_at_unit_scale(state.momentum)
    to_a, to_b = times(gram_inverse(b, ridge), b), times(gram_inverse(at, ridge), at)
    carried = times(to_a, transpose(old_b), buffer_at), times(to_b, transpose(old_at), buffer_b)
    new = left_product(to_a, transposed(gradient)), left_product(to_b, gradient)
    # The first gradient enters whole: nothing has been gathered yet.
    started = jnp.any(buffer_at != 0) | jnp.any(buffer_b != 0)
    share = jnp.where(started, share, 1.0)
    unscaled = lambda at, b: from_unit_scale(LowRank(transpose(at), b), state.momentum)
    moment = unscaled(*(decay * p + share * q for p, q in zip(carried, new, strict=True)))
    step = jax.tree.map(lambda old, u: old - lr * decay * u, z, unscaled(*carried))
    return step, OPLoRAState(moment, previous=z)


def _heavy_ball_of_arrays(learning_rate, momentum, dampening, weight_decay, state_dtype):
    """SGD on plain arrays, with the same hyperparameters."""
    dtype = check_state_dtype(state_dtype)
    return optax.chain(
        optax.scale(1 - dampening),
        optax.identity() if is_zero(momentum) else optax.trace(momentum, accumulator_dtype=dtype),
        optax.identity() if is_zero(weight_decay) else optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )
