"""What there is to know of an optimizer before one is chosen, declared where the optimizer is."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

import optax

_Optimizer = TypeVar("_Optimizer", bound=Callable[..., optax.GradientTransformation])


class Facts(NamedTuple):
    """What tables, experiments and tests read of an optimizer; `facts` says what each means."""

    factory: Callable[..., optax.GradientTransformation]  # of a learning rate and settings
    gradient: Literal["factors", "exact", "moments"]
    source: str
    invariant: Literal["any", "orthogonal", "none"]
    invariant_with: Mapping[str, Any]


OPTIMIZERS: dict[str, Facts] = {}  # by name: all that are imported


def facts(
    *,
    gradient: Literal["factors", "exact", "moments"],
    source: str,
    invariant: Literal["any", "orthogonal", "none"],
    invariant_with: Mapping[str, Any] | None = None,
    base: Callable[[Any], optax.GradientTransformation] | None = None,
) -> Callable[[_Optimizer], _Optimizer]:
    """A decorator that records an optimizer in `OPTIMIZERS` and leaves the function as it is.

    Args:
      gradient: what it works from: the "factors'" derivatives, which every kind of gradient has in it; an
        "exact" one, for which factor gradients stand in as their projection on the tangent space; or an exact
        one with its second "moments".
      source: the arXiv number of its paper.
      invariant: which R leave the path of the increment alone when training starts from a R, R^-1 b instead
        of a, b: "any" invertible one, an "orthogonal" one, or "none".
      invariant_with: settings with which it is any.
      base: where the first argument is another optimizer in the place of a learning rate, the usual one of a
        learning rate.
    """

    def record(optimizer: _Optimizer) -> _Optimizer:
        factory = optimizer if base is None else _of_a_rate(optimizer, base)
        OPTIMIZERS[optimizer.__name__] = Facts(factory, gradient, source, invariant, invariant_with or {})
        return optimizer

    return record


def _of_a_rate(optimizer: Callable[..., Any], base: Callable[[Any], Any]) -> Callable[..., Any]:
    def factory(learning_rate, **settings):
        return optimizer(base(learning_rate), **settings)

    signature = inspect.signature(optimizer)  # `optax.inject_hyperparams` reads it
    rate = inspect.Parameter("learning_rate", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    factory.__signature__ = signature.replace(parameters=[rate, *list(signature.parameters.values())[1:]])
    return factory
