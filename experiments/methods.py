"""The methods that are compared: presets of an optimizer and its settings, from presets.toml."""

import inspect
import tomllib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import optax

import oplora_jax
from benchmarks.catalogue import OPTIMIZERS
from experiments import ExperimentError, did_you_mean

PRESETS = tomllib.loads(Path(__file__).with_name("presets.toml").read_text())
PRESETS |= {
    name: {} for name in OPTIMIZERS if name not in {p.get("optimizer", k) for k, p in PRESETS.items()}
}
NAMES = ", ".join(PRESETS)

_OWN = {"optimizer", "full", "learning_rate"}  # what is no argument of the optimizer
_NO_SETTINGS = {"learning_rate", "seed", "base", "others", "mask", "mu_dtype", "accumulator_dtype"}


def _svdlora(learning_rate: Any, *, momentum: float | None = None) -> optax.GradientTransformation:
    return oplora_jax.svdlora(optax.sgd(learning_rate, momentum=momentum))


_FACTORIES: dict[str, Callable[..., optax.GradientTransformation]] = {
    **{name: facts.factory for name, facts in OPTIMIZERS.items()},
    "optax.sgd": optax.sgd,
    "svdlora": _svdlora,
}


class Method(NamedTuple):
    """A preset, and the settings in which it is changed, as `method` makes it; it prints as it is called."""

    preset: str
    changes: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        changes = ", ".join(f"{name}={value}" for name, value in self.changes)
        return f"{self.preset}({changes})" if changes else self.preset

    @property
    def of(self) -> str:
        """The optimizer's name in the catalogue."""
        return PRESETS[self.preset].get("optimizer", self.preset)

    @property
    def gradient(self) -> Literal["exact", "outer", "factors", "full"]:
        """What it trains with: "outer" is the exact gradient where its second moments count."""
        if PRESETS[self.preset].get("full"):
            return "full"
        return {"factors": "factors", "exact": "exact", "moments": "outer"}[OPTIMIZERS[self.of].gradient]

    @property
    def settings(self) -> dict[str, Any]:
        """All settings, those of the preset and the optimizer's defaults included."""
        return _settings(self.preset) | dict(self.changes)

    def optimizer(self, task: Any, learning_rate: Any, seed: Any) -> optax.GradientTransformation:
        """The optimizer, with what the task sets: its momentum and the reduction of its loss."""
        factory = _FACTORIES[self.of]
        parameters = inspect.signature(factory).parameters
        settings = {}
        for name, value in self.settings.items():
            if isinstance(value, str) and value.startswith("task."):
                # No momentum is None to an optimizer that then keeps no state for it; None is b1's default.
                value = getattr(task, value.removeprefix("task."))
                value = value or (0.0 if name == "b1" else parameters[name].default and 0.0)
            settings[name] = value
        if "seed" in parameters:
            settings["seed"] = seed
        try:
            return factory(learning_rate, **settings)
        except (TypeError, ValueError) as error:
            raise ExperimentError(f"{self}: {error}") from error

    def rate(self, protocol: str) -> float:
        """The papers' learning rate."""
        rates = PRESETS[self.preset].get("learning_rate", {})
        if protocol not in rates:
            raise ExperimentError(f"{self.preset} has no learning rate for {protocol}; name one")
        return rates[protocol]


def method(name: str, **changes: Any) -> Method:
    """The method of a preset, with other settings: `method("oplora", num_iters=2)`."""
    if name not in PRESETS:
        raise ExperimentError(f"no method {name!r}; there are {NAMES}{did_you_mean(name, PRESETS)}")
    known = _settings(name)
    for key in changes.keys() - known.keys():
        raise ExperimentError(
            f"{name} has no setting {key!r}; it has {', '.join(known) or 'none'}{did_you_mean(key, known)}"
        )
    for key, value in changes.items():
        if isinstance(value, str) and (known[key] == "task.momentum" or isinstance(known[key], int | float)):
            raise ExperimentError(f"{name}: {key} is {value!r}; expected a number, true or false")
        if isinstance(known[key], float) and type(value) is int:
            changes[key] = float(value)  # 1 and 1.0 are one run
    return Method(name, tuple((k, changes[k]) for k in known if k in changes and changes[k] != known[k]))


@cache
def _settings(preset: str) -> dict[str, Any]:
    """A preset's settings, with the optimizer's defaults."""
    own = PRESETS[preset]
    parameters = inspect.signature(_FACTORIES[own.get("optimizer", preset)]).parameters
    settings = {name: z.default for name, z in parameters.items() if name not in _NO_SETTINGS}
    return settings | {name: parse(value) for name, value in own.items() if name not in _OWN}


def parse(value: Any) -> Any:
    """The value of a setting as it is written: a number, true, false, "none" for None, or a word."""
    if not isinstance(value, str):
        return value
    if value.lower() in ("none", "true", "false"):
        return {"none": None, "true": True, "false": False}[value.lower()]
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def differentiate(
    gradient: Literal["exact", "outer", "dense", "factors", "full"],
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`jax.value_and_grad`, or the library's, for a kind of gradient to train with."""
    if gradient in ("factors", "full"):
        return jax.value_and_grad
    return partial(oplora_jax.value_and_grad, gradient="auto" if gradient == "exact" else gradient)
