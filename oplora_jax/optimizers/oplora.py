"""OPLoRA: SGD with momentum on the full weight, with LoRSum in the place of addition."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from oplora_jax.lorsum import lorsum
from oplora_jax.matrix import (
    HIGHEST,
    LowRank,
    from_unit_scale,
    left_product,
    matmul,
    right_product,
    to_unit_scale,
    transpose,
)
from oplora_jax.optimizers._facts import facts
from oplora_jax.optimizers._lift import at_step, difference, for_lora, full_gradient, is_zero, map_lora
from oplora_jax.optimizers.momentum import init_momentum, momentum_rule, take_steps
from oplora_jax.optimizers.precision import check_state_dtype
from oplora_jax.problems import Problem, Rule, Sum
from oplora_jax.solve import inverse


class OPLoRAState(NamedTuple):
    """State of `oplora` at the LoRA parameters."""

    count: Array  # int32 ()
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
    r"""OPLoRA: each step is the full heavy-ball step, brought back to rank r by `lorsum`.

    With P = s a b the increment, G the gradient of the full weight and M the low-rank momentum,

    .. math::
      P &\leftarrow \mathrm{LoRSum}[(1, P), (-\eta (1 - d), G), (-\eta \mu, M)] \\
      M &\leftarrow \mathrm{LoRSum}[(\mu, M), (1 - d, G)],

    both in one pass over G. The state is one more low-rank matrix per parameter. G is taken from whatever
    stands at the parameter in the updates: an `OuterProduct` or an array (`oplora_jax.value_and_grad`,
    exact), or the `LowRank` of factor gradients (`jax.grad`; the step is then the Riemannian one).

    Args:
      learning_rate: eta, a scalar or a schedule. It is a step in the full weight: of SGD's size.
      momentum: mu. With 0 or None no momentum is kept.
      dampening: d.
      num_iters: alternating iterations of each LoRSum; 0 is the Jacobi step, preconditioned LoRA.
      regularization: of the solves for the weights; multiplied by the learning rate.
      momentum_regularization: of the solves for the momentum, likewise; as `regularization` if None.
      momentum_rank: k, the rank of the momentum; the parameter's if None.
      momentum_kind: "low_rank" as above; "projected" keeps the products of the gradients with the factors'
        pseudo-inverses and carries them from one pair of factors to the next; "extrapolated" is
        heavy-ball extrapolation, Z = LoRSum[(1, P), (-eta (1 - d), G)] and then
        P = LoRSum[(1 + mu, Z), (-mu, Z_old)].
      weight_decay: decoupled, multiplied by the learning rate: the anchor's coefficient is 1 - eta * decay.
      state_dtype: of the momentum; the parameters' if None. float32 for bfloat16 parameters computes the
        step in float32 and rounds it once; bfloat16 for float32 parameters halves the state. "extrapolated"
        keeps the last weights there, which a type narrower than the parameters' would round at every step.
      others: for the leaves that are no LoRA parameters; by default the plain counterpart, SGD with the
        same learning rate, momentum, dampening, decay and state_dtype. `optax.set_to_zero()` freezes them.
      seed: of the random start of the momentum's left factor.

    Returns:
      An Optax transformation. Its state has a field `momentum`, a tree with a `LowRank` at each LoRA
      parameter, for `optax.tree.get` and `optax.tree.set`. (Under `optax.inject_hyperparams` a
      hyperparameter has the same name: pass static_args="momentum", and "momentum_rank" and "state_dtype"
      if they are given.)

    Raises:
      ValueError: an argument out of range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import oplora_jax
      >>> target = jnp.outer(jnp.arange(3.0), jnp.ones(2))
      >>> params = oplora_jax.LowRank(jnp.ones((3, 1)), jnp.zeros((1, 2)))
      >>> tx = oplora_jax.oplora(0.1, momentum=0.5)
      >>> state = tx.init(params)
      >>> def loss_fn(params):
      ...   return jnp.sum((oplora_jax.to_dense(params) - target) ** 2)
      >>> for _ in range(50):
      ...   gradients = oplora_jax.grad(loss_fn)(params)
      ...   updates, state = tx.update(gradients, state, params)
      ...   params = optax.apply_updates(params, updates)
      >>> bool(loss_fn(params) < 1e-6)
      True

    References:
      OPLoRA, https://arxiv.org/abs/2509.19977.
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

    def init_fn(params):
        count = jnp.zeros((), jnp.int32)
        if kind == "none":
            return OPLoRAState(count, momentum=None)
        if kind == "projected":
            zeros = jax.tree.map(jnp.zeros_like, params)
            return OPLoRAState(count, momentum=zeros, previous=jax.tree.map(jnp.array, params))
        if kind == "extrapolated":
            return OPLoRAState(count, momentum=jax.tree.map(jnp.array, params))
        return OPLoRAState(count, momentum=init_momentum(params, seed, momentum_rank))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        lr = at_step(learning_rate, state.count)
        weight = 1 - lr * weight_decay
        ridge = 0.0 if is_zero(regularization) else lr * regularization
        ridge_m = ridge
        if momentum_regularization is not None:
            ridge_m = 0.0 if is_zero(momentum_regularization) else lr * momentum_regularization
        share = 1 - dampening
        decay = 0.0 if is_zero(momentum) else momentum
        rate, pull = -lr * share, -lr * decay

        def plain(param, gradient):
            return Problem([full_gradient(param, gradient)], [Sum(param)])

        def low_rank(param, gradient, old):
            return Problem([full_gradient(param, gradient)], [Sum(param), Sum(old)])

        def extrapolated(param, gradient, old):
            g = full_gradient(param, gradient)
            settings = {"num_iters": num_iters, "regularization": ridge}
            z = lorsum([(weight, param), (rate, g)], **settings)
            new = lorsum([(1 + momentum, z), (-momentum, old)], **settings)
            return difference(new, param), z

        def projected(param, gradient, buffers, previous):
            g = full_gradient(param, gradient)
            terms = [(weight, param), (rate, g)]
            z = lorsum(terms, num_iters=num_iters, regularization=ridge)
            step, moment = _transport(z, g, buffers, previous, momentum, share, ridge)
            new = jax.tree.map(lambda old, u: old - (lr * momentum * u).astype(old.dtype), z, step)
            return difference(new, param), moment, z

        count = optax.safe_increment(state.count)
        if kind == "projected":
            trees = map_lora(projected, 3, params, updates, state.momentum, state.previous)
            return trees[0], OPLoRAState(count, *trees[1:])
        if kind == "extrapolated":
            updates, last = map_lora(extrapolated, 2, params, updates, state.momentum)
            return updates, OPLoRAState(count, last)
        if kind == "none":
            updates, _ = take_steps([Rule([weight], [rate], ridge)], plain, num_iters, params, updates)
            return updates, OPLoRAState(count, momentum=None)
        rules = Rule([weight, pull], [rate], ridge), momentum_rule(decay, share, ridge_m)
        updates, moment = take_steps(rules, low_rank, num_iters, params, updates, state.momentum)
        return updates, OPLoRAState(count, moment)

    state_dtype = check_state_dtype(state_dtype)
    if others is None:
        others = _heavy_ball(learning_rate, momentum, dampening, weight_decay, state_dtype)
    lora = optax.GradientTransformation(init_fn, update_fn)
    return for_lora(lora, others, state_dtype=state_dtype)


def _transport(z, g, buffers, previous, momentum, share, ridge):
    """The projected momentum at the new factors z, before and after the gradient g is added to it."""
    at, before = to_unit_scale(z), to_unit_scale(previous)
    ridge = None if is_zero(ridge) else ridge
    to_a = matmul(inverse(matmul(transpose(at.a), at.a, HIGHEST), ridge), transpose(at.a), HIGHEST)
    to_b = matmul(transpose(at.b), inverse(matmul(at.b, transpose(at.b), HIGHEST), ridge), HIGHEST)
    gradient = right_product(g, to_b), left_product(to_a, g)
    old = to_unit_scale(buffers)
    carried = (
        matmul(old.a, matmul(before.b, to_b, HIGHEST), HIGHEST),
        matmul(matmul(to_a, before.a, HIGHEST), old.b, HIGHEST),
    )
    # The first gradient enters whole: nothing has been gathered yet.
    started = jnp.any(buffers.a != 0) | jnp.any(buffers.b != 0)
    share = jnp.where(started, share, 1.0)
    new = (momentum * p + share * q for p, q in zip(carried, gradient, strict=True))
    return from_unit_scale(LowRank(*carried), buffers), from_unit_scale(LowRank(*new), buffers)


def _heavy_ball(learning_rate, momentum, dampening, weight_decay, state_dtype):
    """SGD on plain arrays, with the same hyperparameters."""
    parts = [
        optax.scale(1 - dampening),
        optax.identity() if is_zero(momentum) else optax.trace(momentum, accumulator_dtype=state_dtype),
        optax.identity() if is_zero(weight_decay) else optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    ]
    return optax.chain(*parts)
