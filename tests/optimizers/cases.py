"""The table of all optimizers, and the small problem that every property is tested on."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import oplora_jax
from oplora_jax import LowRank, lora_dot, scaled_oplora
from oplora_jax.optimizers import OPTIMIZERS
from tests.arrays import normals
from tests.optimizers.toy import toy

KINDS = ("outer", "dense", "factors")


@functools.wraps(scaled_oplora)
def _scaled_oplora(learning_rate, **settings):
    """With one learning rate for all leaves, as the other optimizers have."""
    return scaled_oplora(learning_rate, **settings | {"others_learning_rate": learning_rate})


# Of a learning rate and the settings; `others` if ours.
PLAIN = {"sgd": optax.sgd, "adamw": optax.adamw}
FACTORIES = {name: facts.factory for name, facts in OPTIMIZERS.items()}
FACTORIES |= {"scaled_oplora": _scaled_oplora, "toy": toy, **PLAIN}


class Case(NamedTuple):
    """One optimizer with its settings."""

    of: str  # the optimizer's name
    settings: dict[str, Any]
    learning_rate: float  # for the problem below
    kinds: tuple[str, ...] = KINDS  # of gradients
    mirrors: bool = True  # the state at a LoRA parameter has the parameter's structure
    wide: bool = False  # the state is in float32 at least
    trains_a: bool = True
    solves: bool = True  # systems of r equations, or decomposes
    forms: bool = False  # matrices as large as the weight's

    @property
    def ours(self) -> bool:
        """Whether it takes full gradients, and skips non-finite ones."""
        return self.of not in PLAIN

    @property
    def factory(self) -> Callable[..., optax.GradientTransformation]:
        """Makes it of a learning rate and the settings."""
        return FACTORIES[self.of]


CASES = {
    "oplora": Case("oplora", {"momentum": 0.5}, 0.2),
    "oplora_projected": Case("oplora", {"momentum": 0.5, "momentum_kind": "projected"}, 0.2),
    "oplora_extrapolated": Case("oplora", {"momentum": 0.5, "momentum_kind": "extrapolated"}, 0.2),
    "oplora_no_momentum": Case("oplora", {"momentum": 0}, 0.3),
    "oplora_two_iterations": Case("oplora", {"momentum": 0.5, "num_iters": 2, "momentum_rank": 4}, 0.2),
    "svdlora": Case("svdlora", {}, 0.2, mirrors=False, forms=True),
    "scaled_gd": Case("scaled_gd", {"momentum": 0.5}, 0.2),
    "scaled_adamw": Case("scaled_adamw", {}, 0.03),
    "scaled_oplora": Case(
        "scaled_oplora",
        {},
        0.03,
        kinds=("outer", "diagonal moments", "dense moments"),
        mirrors=False,
        wide=True,
    ),
    "scaled_oplora_dense": Case(
        "scaled_oplora",
        {"structure": "dense", "metric_every": 2, "damping": 0.1},
        0.03,
        kinds=("outer", "dense moments"),
        mirrors=False,
        wide=True,
    ),
    "scaled_oplora_shampoo": Case(
        "scaled_oplora",
        {"metric": "shampoo", "power": 0.25},
        0.03,
        mirrors=False,
        wide=True,
    ),
    "scaled_oplora_low_rank": Case(
        "scaled_oplora",
        {"momentum_kind": "low_rank", "b1": 0.5, "num_iters": 2},
        0.02,
        kinds=("outer", "dense moments"),
        mirrors=False,
        wide=True,
    ),
    "scaled_oplora_absolute": Case(
        "scaled_oplora",
        {"units": "absolute", "b1": 0.5},
        0.2,
        kinds=("outer", "dense moments"),
        mirrors=False,
        wide=True,
    ),
    "altlora": Case("altlora", {}, 0.05),
    "altlora_plus": Case("altlora_plus", {"b2": 0.99}, 0.03, wide=True),
    # The joint norm would tie LoRA parameters together; the threshold, never reached, brings counts along.
    "lora_rite": Case(
        "lora_rite",
        {"max_norm": None, "skip_threshold": 1e3, "b2": 0.9},
        0.03,
        mirrors=False,
        wide=True,
    ),
    "lora_pro": Case("lora_pro", {}, 0.03, mirrors=False, wide=True, forms=True),
    "lora_pro_sgd": Case("lora_pro_sgd", {}, 0.2),
    "reflora": Case("reflora", {"warmup_steps": 2}, 0.03),
    "lora_fa": Case("lora_fa", {}, 0.05, trains_a=False),
    "lora_plus": Case("lora_plus", {"ratio": 4.0}, 0.03, solves=False),
    "lora_pre": Case("lora_pre", {"b2": 0.99}, 0.03, wide=True),
    "mofasgd": Case("mofasgd", {"momentum": 0.5}, 0.08, mirrors=False, wide=True),
    # Through the public `lora_optimizer` alone.
    "toy": Case("toy", {}, 0.05, mirrors=False, wide=True, solves=False),
    # Plain optimizers of the factors, which check the properties themselves.
    "sgd": Case("sgd", {"momentum": 0.5}, 0.1),
    "adamw": Case("adamw", {"weight_decay": 0.0}, 0.03),
}
OURS = [name for name, case in CASES.items() if case.ours]
OURS_AND_KINDS = [(name, kind) for name in OURS for kind in CASES[name].kinds]
# At a LoRA parameter these take what has the parameter's structure.
OF_FACTORS = [name for name, case in CASES.items() if "factors" in case.kinds]

N, M, R, TOKENS = 8, 6, 2, 40


def make(name, learning_rate=None, **more):
    """An optimizer of the table; at its own learning rate if None."""
    case = CASES[name]
    learning_rate = case.learning_rate if learning_rate is None else learning_rate
    return case.factory(learning_rate, **case.settings, **more)


def problem(dtype=jnp.float32, layers=("first",), b_zero=False, trains_a=True):
    """(params, loss_fn): LoRA layers and a bias, whose targets are of rank R each.

    Without training of a the targets are within the columns of a.
    """
    normal = normals(0, dtype)
    params, data = {"bias": jnp.zeros((M,), dtype)}, {}
    for name in layers:
        params[name] = LowRank(0.3 * normal(N, R), (0 if b_zero else 0.3) * normal(R, M), scale=2.0)
        x, w = normal(TOKENS, N), normal(N, M)
        left = 0.3 * normal(N, R)
        data[name] = x, w, x @ (w + (left if trains_a else params[name].a) @ normal(R, M))

    def loss_fn(params):
        # Mean over tokens, sum over outputs: the Hessian by an increment is about the identity.
        squares = [jnp.sum((lora_dot(x, w, params[k]) - y) ** 2) for k, (x, w, y) in data.items()]
        return sum(squares) / (2 * TOKENS) + jnp.sum((params["bias"] - 1) ** 2) / 2

    return params, loss_fn


def gradient_of(loss_fn, kind):
    """The gradient function of a kind of gradient."""
    if kind == "factors":
        return jax.grad(loss_fn)
    if kind.endswith(" moments"):
        return oplora_jax.grad(loss_fn, "dense", moments=kind.removesuffix(" moments"))
    return oplora_jax.grad(loss_fn, kind)


def run(tx, params, gradient, num_steps, state=None) -> tuple[Any, Any]:
    """(params, state) after some steps, in one compiled scan."""

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradient(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, length=num_steps)[0])
    return scan((params, tx.init(params) if state is None else state))


def dense_tree(params):
    """The tree with its increments formed."""
    form = lambda p: oplora_jax.to_dense(p) if oplora_jax.is_low_rank(p) else p
    return jax.tree.map(form, params, is_leaf=oplora_jax.is_low_rank)


def signature(tree):
    """What `lax.scan`, `lax.cond` and the compilation cache want unchanged between steps."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef, [(z.shape, z.dtype, getattr(z, "weak_type", False)) for z in leaves]
