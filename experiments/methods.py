"""The methods that are compared: the entries of METHODS, and any other optimizer with its defaults."""

import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import optax

import oplora_jax
from experiments import ExperimentError
from experiments.catalogue import OPTIMIZERS


class Settings(NamedTuple):
    """What an optimizer is built from."""

    learning_rate: Any
    momentum: float  # 0 for none
    rank: int  # of the LoRA parameters
    loss_reduction: Literal["mean", "sum"]  # of the loss over a batch's examples
    seed: Any


class Method(NamedTuple):
    """A way to train.

    of names the optimizer in the catalogue, or is "full" for training without LoRA. learning_rates are those
    of the papers, by protocol. optimizer takes the settings, then the numbers in the method's name.
    """

    of: str
    learning_rates: dict[str, float]
    optimizer: Callable[..., optax.GradientTransformation]

    @property
    def gradient(self) -> Literal["exact", "outer", "factors", "full"]:
        """What it trains with: "outer" is the exact gradient where its second moments count."""
        if self.of == "full":
            return "full"
        return {"factors": "factors", "exact": "exact", "moments": "outer"}[OPTIMIZERS[self.of].gradient]


def _rates(
    linear_full_batch: float,
    linear_stochastic: float,
    mnist: float,
    cifar100: float | None = None,
    text: float | None = None,
    glue: float | None = None,
) -> dict[str, float]:
    """By protocol; glue is the papers' with RoBERTa, text the best of a sweep with the bundled encoder."""
    return {protocol: rate for protocol, rate in locals().items() if rate is not None}


def _sgd(settings: Settings) -> optax.GradientTransformation:
    return optax.sgd(settings.learning_rate, momentum=settings.momentum or None)


def _adamw(settings: Settings) -> optax.GradientTransformation:
    return optax.adamw(settings.learning_rate, weight_decay=0.0)


def _oplora(settings: Settings, **options: Any) -> optax.GradientTransformation:
    return oplora_jax.oplora(
        settings.learning_rate,
        momentum=settings.momentum,
        regularization=1e-3,
        seed=settings.seed,
        **options,
    )


def _scaled_oplora(
    structure: str, settings: Settings, k: int, damping: float = 1e-5, power: float = 0.5
) -> optax.GradientTransformation:
    return oplora_jax.scaled_oplora(
        settings.learning_rate,
        b1=settings.momentum,
        b2=0.99,
        num_iters=k,
        regularization=1e-2,
        damping=damping,
        power=power,
        structure=structure,
        loss_reduction=settings.loss_reduction,
        seed=settings.seed,
    )


def _peer(name: str, **settings: Any) -> Method:
    """An optimizer with its own defaults, as its paper gives them."""
    factory = OPTIMIZERS[name].factory
    return Method(name, _PEER_RATES.get(name, {}), lambda s: factory(s.learning_rate, **settings))


# Their papers do not have these tasks: the best of a sweep.
_PEER_RATES = {
    "altlora": _rates(1.0, 0.3, 0.3, text=0.3),
    "altlora_plus": _rates(0.01, 0.03, 0.003, text=0.001),
    "lora_rite": _rates(0.3, 0.3, 0.003, text=0.003),
    "lora_pro": _rates(0.1, 0.1, 0.003, text=0.003),
    "lora_pro_sgd": _rates(0.3, 0.3, 0.3, text=0.3),
    "lora_fa": _rates(0.1, 0.03, 0.003, text=0.01),
    "lora_plus": _rates(0.01, 0.01, 0.003, text=0.001),
    "lora_pre": _rates(0.03, 0.001, 0.003, text=0.001),
    "mofasgd": _rates(1.0, 1.0, 0.01, text=0.01),
    "reflora": _rates(0.1, 0.03, 0.003, text=0.01),
}

# The papers give scaled OPLoRA no rate on these tasks: the best of a sweep, the same for all its variants.
_SCALED_OPLORA = _rates(1.0, 0.1, 1.0, None, 0.3, 0.2)

# In a name K stands for a whole number and X for any positive one.
METHODS = {
    "full_sgd": Method("full", _rates(0.5, 0.1, 0.05, 0.005, 0.03), _sgd),
    "full_adamw": Method("full", _rates(0.5, 0.05, 1e-3, 1e-3, 1e-4, 1e-5), _adamw),
    "svdlora": Method("svdlora", _rates(0.5, 0.1, 0.01, 0.005, 0.1), lambda s: oplora_jax.svdlora(_sgd(s))),
    "lora_sgd": Method("optax.sgd", _rates(0.01, 0.002, 0.002, 0.01, 0.3), _sgd),
    "lora_adamw": Method("optax.adamw", _rates(0.5, 0.05, 1e-3, 1e-3, 0.01, 2e-4), _adamw),
    "scaled_gd": Method(
        "scaled_gd",
        _rates(0.48, 0.1, 0.02, 0.005, 0.1, 2e-3),
        lambda s: oplora_jax.scaled_gd(s.learning_rate, momentum=s.momentum or None, regularization=1e-3),
    ),
    "scaled_adamw": Method(
        "scaled_adamw",
        _rates(0.5, 0.05, 0.02, 5e-4, 0.01),
        lambda s: oplora_jax.scaled_adamw(s.learning_rate, regularization=1e-3),
    ),
    # Without its thresholds, which are for the gradients of language models: above them nothing moves.
    "lora_rite": _peer("lora_rite", skip_threshold=None, max_norm=None),
    "lora_pre": _peer("lora_pre"),
    # Its second moment may come near zero anywhere; where it diverges a larger eps helps.
    "lora_pre_epsX": Method("lora_pre", {}, lambda s, eps: oplora_jax.lora_pre(s.learning_rate, eps=eps)),
    "oplora_K": Method("oplora", _rates(0.5, 0.1, 0.02, 0.01, 0.1), lambda s, k: _oplora(s, num_iters=k)),
    "oplora_K_momentumKx": Method(
        "oplora",
        _rates(0.5, 0.1, 0.02, 0.01, 0.1),
        lambda s, k, multiple: _oplora(s, num_iters=k, momentum_rank=multiple * s.rank),
    ),
    "oplora_projected": Method(
        "oplora", _rates(0.5, 0.1, 0.02, 0.01, 0.1, 5e-3), lambda s: _oplora(s, momentum_kind="projected")
    ),
    "scaled_oplora_K": Method("scaled_oplora", _SCALED_OPLORA, partial(_scaled_oplora, "diagonal")),
    "scaled_oplora_K_dense": Method("scaled_oplora", _SCALED_OPLORA, partial(_scaled_oplora, "dense")),
    "scaled_oplora_K_dampingX_powerX": Method(
        "scaled_oplora", _SCALED_OPLORA, partial(_scaled_oplora, "diagonal")
    ),
    "scaled_oplora_K_dense_dampingX_powerX": Method(
        "scaled_oplora", _SCALED_OPLORA, partial(_scaled_oplora, "dense")
    ),
}
_NAMED = {method.of for method in METHODS.values()}
METHODS |= {name: _peer(name) for name in OPTIMIZERS if name not in _NAMED}

# What "all" stands for: each of them, with the numbers that are usual.
_USUAL = [name for name in METHODS if not re.search("[KX]", name)]
ALL = (*_USUAL, "oplora_1", "oplora_2", "scaled_oplora_1")

_REAL = r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)"
NAMES = f"{', '.join(METHODS)} (K and X are numbers)"


def expand(names: Sequence[str]) -> list[str]:
    """The names, each once, with those of all methods in the place of "all"."""
    return list(dict.fromkeys(z for name in names for z in (ALL if name == "all" else [name])))


def find(name: str) -> Method:
    """The method of a name such as "svdlora", "oplora_2" or "oplora_2_momentum4x".

    Its optimizer takes the settings alone.

    Raises:
      ExperimentError: no such method; the message lists them.
    """
    for pattern, method in METHODS.items():
        found = re.fullmatch(pattern.replace("K", r"(\d+)").replace("X", _REAL), name)
        if found:
            numbers = [int(z) if z.isdigit() else float(z) for z in found.groups()]
            return method._replace(optimizer=partial(_with_numbers, method.optimizer, numbers))
    raise ExperimentError(f"no method {name!r}; there are {NAMES}")


def scaled_oplora_name(structure: str, num_iters: int, damping: float, power: float) -> str:
    """The name of a variant of scaled OPLoRA."""
    dense = "_dense" if structure == "dense" else ""
    return f"scaled_oplora_{num_iters}{dense}_damping{damping:g}_power{power:g}"


def _with_numbers(optimizer, numbers, settings):
    return optimizer(settings, *numbers)


def differentiate(
    gradient: Literal["exact", "outer", "dense", "factors", "full"],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`jax.value_and_grad`, or the library's, for a kind of gradient to train with."""
    if gradient in ("factors", "full"):
        return jax.value_and_grad
    return partial(oplora_jax.value_and_grad, gradient="auto" if gradient == "exact" else gradient)


def protocol_rate(name: str, protocol: str) -> float:
    """The papers' learning rate of a method.

    Raises:
      ExperimentError: they give none.
    """
    rates = find(name).learning_rates
    if protocol not in rates:
        raise ExperimentError(f"{name} has no learning rate for {protocol}; name one")
    return rates[protocol]
