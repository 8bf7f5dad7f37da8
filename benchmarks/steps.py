"""The cost of training steps, next to the step of LoRA with AdamW."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.bounds import measure_rates
from benchmarks.counts import Counts, compile_anew, count
from benchmarks.timing import alternate, runner
from experiments import ExperimentError, methods
from experiments.methods import Method
from experiments.task import Task
from experiments.training import State, advance, advance_in_backward, make_optimizer, size_in_bytes

BASELINE = "lora_adamw"
PLAIN = "plain"
IN_BACKWARD = "in_backward"
NAMES = (
    f"{methods.NAMES}; _K behind a name for num_iters=K; with :outer, :dense or :factors behind that of an "
    "exact gradient, for the kind to train with, or :in_backward, for value_and_update; all for every "
    f"method, {PLAIN} for {BASELINE} without lora_dot"
)
# Every optimizer, and the kinds of gradient and iterations of those that there are several of.
DEFAULT = (
    PLAIN,
    *(f"oplora_{k}:{kind}" for kind in ("outer", "dense", "factors") for k in (1, 2, 8)),
    *(f"psi_lora_{k}" for k in (1, 2, 8)),
    "svdlora",
    *(name for name in methods.PRESETS if name not in (BASELINE, "svdlora", "oplora", "psi_lora")),
)
COUNTED = (
    "flops",
    "bytes_accessed",
    "temporary_bytes",
    "peak_bytes",
    "optimizer_bytes",
    "instructions",
    "fusions",
    "compile_seconds",
)
TIMED = (
    "milliseconds",
    "time_ratio",
    "time_ratio_least",
    "time_ratio_largest",
    "bound_ratio",  # the least time for its operations, or for its bytes, in the first variant's
    "bound_by",
)
COMPILATIONS = 3  # that are measured, of each step and of the baseline's
RATE = 1e-3  # small enough for every method to stay finite; the cost does not depend on it


class Variant(NamedTuple):
    """A method and the kind of gradient it trains with."""

    name: str
    method: Method
    gradient: str
    plain: bool = False


def parse(name: str, task: Task) -> Variant:
    """The variant of a name such as "svdlora" or "oplora_2:dense".

    Raises:
      ExperimentError: there is no such method for the task, or it does not train with this gradient.
    """
    if name == PLAIN and hasattr(task, "plain"):
        return Variant(name, methods.method(BASELINE), "factors", plain=True)
    named, _, kind = name.partition(":")
    preset, k = re.fullmatch(r"(.*?)(?:_(\d+))?", named).groups()
    method = methods.method(preset, **({"num_iters": int(k)} if k else {}))
    needed = method.gradient
    allowed = ("outer", "dense", "factors") if needed == "exact" else (needed,)
    if method.of in ("oplora", "scaled_oplora"):
        allowed += (IN_BACKWARD,)
    if kind and kind not in allowed:
        raise ExperimentError(f"{named} with gradient {kind!r}; expected one of {', '.join(allowed)}")
    return Variant(name, method, kind or needed)


def expand(names: Sequence[str]) -> list[str]:
    """The names, each once, with those of all methods in the place of "all"."""
    return list(dict.fromkeys(z for name in names for z in (methods.PRESETS if name == "all" else [name])))


def build(task: Task, variant: Variant) -> tuple[Callable[..., Any], Callable[[], tuple[State, Any]]]:
    """A training step, (state, frozen, *data) to (state, loss), and what makes its (state, frozen)."""
    if variant.plain:
        task = dataclasses.replace(task, plain=True)
    optimizer = make_optimizer(task, variant.method, RATE, seed=0, steps=1000)
    if variant.gradient == IN_BACKWARD:
        step = partial(advance_in_backward, task.loss, optimizer)
    else:
        step = partial(advance, methods.differentiate(variant.gradient)(task.loss), optimizer)

    def start():
        trainable, frozen = task.init(0, full=variant.gradient == "full")
        # Copies, for a step overwrites the state.
        init = lambda trainable: jax.tree.map(jnp.copy, State(trainable, optimizer.init(trainable)))
        return jax.jit(init)(trainable), frozen

    return step, start


def measure(
    prepare: Callable[[Any], "Prepared"],
    variants: Sequence[Any],
    pairs: int,
    begin: Callable[[str], Callable[[int, int, dict], None]],
) -> Iterator[dict[str, Any]]:
    """One row for each variant: counts, times, and both in units of the first one's.

    Args:
      prepare: compiles the step of a variant.
      variants: with a name and a gradient each. The first one is what the others are held against, itself
        too.
      pairs: how many steps of each are measured, in turn with one of the first variant's, and what bounds
        them; 0 for none. Compilations are measured likewise, in any case.
      begin: as `progress` yields it.
    """
    first = baseline = rates = None
    for variant in variants:
        notify = begin(variant.name)
        notify(0, pairs + 1, {})
        prepared = prepare(variant)
        counts, optimizer_bytes, make_runner, _ = prepared
        if first is None:
            first = prepared
            baseline = make_runner() if pairs else None
            rates = measure_rates(baseline, pairs) if pairs else None
        compilations = alternate(first.compile, prepared.compile, COMPILATIONS, lambda _: None)
        notify(1, pairs + 1, {})
        row = {"method": variant.name, "gradient": variant.gradient}
        row |= counts._asdict() | {"optimizer_bytes": optimizer_bytes}
        row |= dict.fromkeys(TIMED)
        units = first.counts._asdict() | {"optimizer_bytes": first.optimizer_bytes}
        row |= {f"{name}_ratio": row[name] / units[name] for name in COUNTED}
        row["compile_seconds"], row["compile_seconds_ratio"] = map(float, map(np.median, compilations))
        if pairs:
            seconds, ratios = alternate(
                baseline, make_runner(), pairs, lambda done, notify=notify: notify(done + 1, pairs + 1, {})
            )
            row["milliseconds"] = 1e3 * float(np.median(seconds))
            row["time_ratio"] = float(np.median(ratios))
            row["time_ratio_least"], row["time_ratio_largest"] = float(min(ratios)), float(max(ratios))
            operations = counts.flops + counts.decomposition_flops
            row["bound_ratio"], row["bound_by"] = rates.bound(operations, counts.bytes_accessed)
        yield row


class Prepared(NamedTuple):
    """A training step that is compiled."""

    counts: Counts
    optimizer_bytes: int  # of the optimizer's state
    make_runner: Callable[[], Callable[[], float]]  # makes a runner of steps
    compile: Callable[[], float]  # compiles it again and returns the seconds


def prepare(task: Task, data: Sequence[Any], variant: Variant) -> Prepared:
    """Compiles a training step."""
    step, start = build(task, variant)
    state, frozen = jax.eval_shape(start)
    arguments, donated = (step, state, frozen, *data), (0,)
    counts, compiled = count(*arguments, donated=donated)

    def make_runner():
        state, frozen = start()
        return runner(compiled, state, jax.device_put(frozen), *jax.device_put(tuple(data)))

    compile_again = lambda: compile_anew(*arguments, donated=donated)[0]
    return Prepared(counts, size_in_bytes(state.optimizer), make_runner, compile_again)


def at_least(least: int, **sizes: int) -> None:
    """Raises ExperimentError for a size that is smaller."""
    for name, size in sizes.items():
        if size < least:
            raise ExperimentError(f"{name.replace('_', '-')} is {size}; expected {least} or more")
