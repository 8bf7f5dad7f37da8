"""One run: from its configuration to its folder, resumed where it was interrupted."""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pandas as pd
from jaxtyping import Float, Int

import oplora_jax
from benchmarks.counts import peak_memory
from experiments import ExperimentError, methods, storage
from experiments.methods import Method
from experiments.storage import Config
from experiments.task import Task
from oplora_jax.optimizers import OPTIMIZERS as OURS

BUCKETED = 32  # batches whose examples are sorted by length together


class State(NamedTuple):
    """What changes from step to step."""

    trainable: Any
    optimizer: Any


# Called with the steps done, the steps there are, the metrics where they were just evaluated, and the state.
Hook = Callable[[int, int, dict[str, float], State], None]


def train(config: Config, *hooks: Hook, checkpoint_seconds: float = 10.0) -> pd.DataFrame:
    """Runs what is not run yet.

    Args:
      config: the run.
      *hooks: called after each step.
      checkpoint_seconds: the least time between two checkpoints.

    Returns:
      The metrics, one row for each evaluation, the last one at the end of training, which alone has those of
      the test data. seconds_per_step is the median over the steps since the one before; peak_memory_mib what
      XLA counts for the largest of them.

    Raises:
      ExperimentError: a configuration that cannot be run.
      OSError: a folder that cannot be written.
    """
    task, folder = config.task, config.folder
    if config.finished:
        return storage.read_metrics(folder)
    of_method, of_all = optimizer_bytes(task, config.method)
    data, held_out = task.load(config.seed)
    size, lengths = len(data[0]), task.lengths(data)
    _check(config, size)
    ends = evaluations(task, size)
    state, frozen = start(config)
    frozen = jax.device_put(frozen)
    storage.write(folder / "config.json", config.to_json().encode())
    with contextlib.closing(storage.Checkpoints(folder, checkpoint_seconds)) as checkpoints:
        done, state = checkpoints.restore(state)
        metrics_file = storage.Metrics(folder, sum(end <= done for end in ends))
        train_step = make_step(config, max(ends), frozen)
        epochs = (batches(size, task.batch_size, config.seed, i + 1, lengths) for i in range(task.epochs))
        order = itertools.islice(itertools.chain.from_iterable(epochs), done, None)
        window = []  # of the steps since the last evaluation
        for step, (indices, weights) in enumerate(order, done + 1):
            state, measured = train_step(state, step - 1, task.take(data, indices), weights)
            window.append(measured)
            metrics = {}
            if step in ends:
                losses, seconds, memory = zip(*window, strict=True)
                metrics = {"epoch": ends[step], "train_loss": float(np.mean(losses))}
                for prefix, part in held_out.items():
                    if prefix.startswith("test_") and step < max(ends):
                        continue
                    found = task.evaluate(state.trainable, frozen, part)
                    metrics |= {f"{prefix}{name}": value for name, value in found.items()}
                metrics |= {
                    "peak_memory_mib": max(memory) / 2**20,
                    "seconds_per_step": float(np.median(seconds)),
                    "lora_state_kib": of_method / 1024,
                    "optimizer_state_kib": of_all / 1024,
                }
                window = []
            # The checkpoint last: it says how many rows of the metrics count.
            for hook in (metrics_file, *hooks, checkpoints):
                hook(step, max(ends), metrics, state)
        checkpoints.finish(state.trainable)
    return storage.read_metrics(folder)


def evaluations(task: Task, size: int) -> dict[int, float]:
    """How often the data were passed, by the steps that an evaluation comes after, the last one too."""
    steps = math.ceil(size / task.batch_size)
    parts = min(task.evaluations, steps)
    return {
        epoch * steps + round(steps * part / parts): epoch + part / parts
        for epoch in range(task.epochs)
        for part in range(1, parts + 1)
    }


def start(config: Config) -> tuple[State, Any]:
    """(the state before the first step, the frozen parameters)."""
    trainable, frozen = config.task.init(config.seed, full=config.method.gradient == "full")
    optimizer = make_optimizer(config.task, config.method, config.learning_rate, config.seed, steps=1)
    try:
        return State(trainable, optimizer.init(trainable)), frozen
    except (TypeError, ValueError) as error:
        raise ExperimentError(f"{config.method}: {error}") from error


@cache
def optimizer_bytes(task: Task, method: Method) -> tuple[int, int]:
    """The size of the optimizer's state: (of LoRA, or of the kernels in its place; of all that trains)."""
    state, _ = jax.eval_shape(partial(start, Config(task, method, 1.0, 0, Path())))
    of_method = state.optimizer if task.others_rate is None else state.optimizer.inner_states["adapted"]
    return size_in_bytes(of_method), size_in_bytes(state.optimizer)


def size_in_bytes(tree: Any) -> int:
    """The size of a tree of arrays, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def batches(
    size: int, batch_size: int, seed: int, epoch: int, lengths: Int[np.ndarray, " N"] | None = None
) -> Iterator[tuple[Int[np.ndarray, " B"], Float[np.ndarray, " B"]]]:
    """One epoch's batches in random order, as (indices, weights).

    The order depends on the seed, the epoch and the lengths alone. Every example comes once; the last batch
    is filled up with the epoch's first examples at weight 0: no one example stands out in its second moments.

    Args:
      size: how many examples there are.
      batch_size: how many a batch has.
      seed: of the order.
      epoch: 1 for the first.
      lengths: those of the examples, to put examples of similar length into a batch.
    """
    random = np.random.default_rng([seed, epoch])
    order = random.permutation(size)
    starts = np.arange(0, size, batch_size)
    if lengths is not None:
        parts = np.split(order, range(BUCKETED * batch_size, size, BUCKETED * batch_size))
        order = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in parts])
        starts = random.permutation(starts)
    for start in starts:
        places = np.arange(start, start + batch_size)
        yield order.take(places, mode="wrap"), (places < size).astype(np.float32)


def load_parameters(config: Config) -> tuple[Any, Any]:
    """The final parameters of a finished run, `LowRank` nodes included.

    Returns:
      (what was trained, what was frozen), as the task's `init` gives them.
    """
    state, frozen = start(config)
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state.trainable)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore((config.folder / "parameters").absolute(), like), frozen


def make_optimizer(
    task: Task, method: Method, learning_rate: Any, seed: int, steps: int
) -> optax.GradientTransformation:
    """A method's optimizer, beside the AdamW of what is not adapted, for so many steps.

    Both have the task's schedule and clipping, each for itself: what is not adapted trains in the same way
    whatever the method and its kind of gradient are.
    """

    def finish(make, rate):
        tx = make(optax.linear_schedule(rate, 0.0, steps) if task.decay else rate)
        if task.max_norm is None:
            return tx
        return optax.chain(oplora_jax.clip_by_global_norm(task.max_norm), tx)

    of_method = finish(lambda rate: method.optimizer(task, rate, seed), learning_rate)
    if task.others_rate is None:
        return of_method
    others = finish(partial(optax.adamw, weight_decay=0.0), task.others_rate)
    return optax.partition(
        {"adapted": of_method, "others": others}, {"adapted": "adapted", "others": "others"}
    )


def make_step(config: Config, steps: int, frozen: Any) -> Callable[..., tuple[State, tuple]]:
    """A training step, (state, steps done, batch, weights) to (state, (loss, seconds, bytes of memory))."""
    key = jax.random.key(config.seed, impl="rbg")  # the default takes a third of a step on CPU for dropout
    constant = (config.task, config.method, steps, np.float32(config.learning_rate), key)
    memory: dict[tuple, int] = {}
    take_step = _step_at_rate if config.task.in_backward else _step

    def step(state, done, *batch):
        arguments = (*constant, np.int32(done), state, frozen, *batch)
        began = time.perf_counter()
        state, loss = take_step(*arguments)
        loss = float(loss)  # waits for the step
        seconds = time.perf_counter() - began
        shapes = tuple(z.shape for z in jax.tree.leaves(batch))
        if shapes not in memory:  # the compiled step is there already
            memory[shapes] = peak_memory(take_step.lower(*arguments).compile())
        return state, (loss, seconds, memory[shapes])

    return step


def advance(
    value_and_grad: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    state: State,
    *arguments: Any,
) -> tuple[State, Any]:
    """One step: (the state after it, the loss before it); the arguments are the loss's behind what trains."""
    loss, gradients = value_and_grad(state.trainable, *arguments)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
    return State(optax.apply_updates(state.trainable, updates), optimizer_state), loss


def advance_in_backward(
    loss: Callable[..., Any], optimizer: optax.GradientTransformation, state: State, *arguments: Any
) -> tuple[State, Any]:
    """`advance` with each LoRA parameter's step inside the backward pass."""
    step = oplora_jax.value_and_update(loss, optimizer)
    loss, updates, optimizer_state = step(state.trainable, state.optimizer, *arguments)
    return State(optax.apply_updates(state.trainable, updates), optimizer_state), loss


def _one_step(task, method, steps, learning_rate, key, step, state, frozen, batch, weights):
    optimizer = make_optimizer(task, method, learning_rate, 0, steps)
    arguments = state, frozen, batch, weights, jax.random.fold_in(key, step)
    if not task.in_backward:
        return advance(methods.differentiate(method.gradient)(task.loss), optimizer, *arguments)
    try:
        return advance_in_backward(task.loss, optimizer, *arguments)
    except ValueError as error:
        raise ExperimentError(f"{method} with in-backward: {error}") from error


# The learning rate is an argument, so that all runs of a method share one compilation; not so in the backward
# pass, where an optimizer takes a number or a schedule.
_step = jax.jit(_one_step, static_argnums=(0, 1, 2))
_step_at_rate = jax.jit(_one_step, static_argnums=(0, 1, 2, 3))


def _check(config: Config, size: int) -> None:
    task = config.task
    if task.epochs < 1:
        raise ExperimentError(f"epochs is {task.epochs}; expected 1 or more")
    if not 1 <= task.batch_size <= size:
        raise ExperimentError(f"batch-size is {task.batch_size}; expected 1 to {size}, all examples")
    if not (config.learning_rate > 0 and math.isfinite(config.learning_rate)):
        raise ExperimentError(f"learning-rate is {config.learning_rate}; expected a positive number")
    if task.others_rate is not None and not (task.others_rate > 0 and math.isfinite(task.others_rate)):
        raise ExperimentError(f"others-rate is {task.others_rate}; expected a positive number")
    if task.in_backward and (config.method.of not in OURS or task.max_norm is not None):
        raise ExperimentError(
            f"in-backward with {config.method}{'' if task.max_norm is None else ' and clipping'}; expected "
            "one of this package's optimizers, and no clipping, which needs all gradients at once"
        )
    if config.seed < 0:
        raise ExperimentError(f"seed is {config.seed}; expected 0 or more")
