"""One run: from its configuration to its folder, resumed where it was interrupted."""

import itertools
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import serialization
from jaxtyping import Float, Int

import oplora_jax
from experiments import ExperimentError, methods, storage
from experiments.counts import peak_memory
from experiments.storage import Config
from experiments.task import Task

BUCKETED = 32  # batches whose examples are sorted by length together


class State(NamedTuple):
    """What changes from step to step."""

    trainable: Any
    optimizer: Any


def start(config: Config) -> tuple[State, Any]:
    """(the state before the first step, the frozen parameters)."""
    method = methods.find(config.method)
    trainable, frozen = config.task.init(config.seed, full=method.gradient == "full")
    optimizer = make_optimizer(config.task, config.method, config.learning_rate, config.seed, steps=1)
    return State(trainable, optimizer.init(trainable)), frozen


def optimizer_bytes(config: Config) -> int:
    """The size of the optimizer's state."""
    state, _ = jax.eval_shape(partial(start, config))
    return size_in_bytes(state.optimizer)


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


def train(config: Config, notify: Callable[[int, int, dict], None] = lambda *_: None) -> list[dict]:
    """Runs what is not run yet.

    Args:
      config: the run.
      notify: called after each step with the steps done, the steps there are, and the last epoch's metrics.

    Returns:
      The metrics at each evaluation, the last one at the end of training. seconds_per_step is the median over
      the steps since the one before; peak_memory_mib what XLA counts for the largest of them.

    Raises:
      ExperimentError: a configuration that cannot be run.
      OSError: a folder that cannot be written.
    """
    folder, task = config.folder, config.task
    methods.find(config.method)
    if config.finished:
        return storage.read_metrics(folder)
    data, test = task.load(config.seed)
    size = len(data[0])
    _check(config, size)
    storage.write(folder / "config.json", config.to_json().encode())
    state, frozen = start(config)
    done, state = storage.load_checkpoint(folder, state)
    rows = storage.read_metrics(folder)[:done] if done else []
    frozen = jax.device_put(frozen)
    rate, lengths = np.float32(config.learning_rate), task.lengths(data)
    key = jax.random.key(config.seed, impl="rbg")  # the default takes a third of a step on CPU for dropout
    steps = math.ceil(size / task.batch_size)
    total = task.epochs * steps
    parts = min(task.evaluations, steps)  # of an epoch, with an evaluation behind each
    ends = [round(steps * part / parts) for part in range(parts + 1)]
    while len(rows) < task.epochs * parts:
        epoch, part = divmod(len(rows), parts)
        first, last = ends[part : part + 2]
        order = batches(size, task.batch_size, config.seed, epoch + 1, lengths)
        losses, seconds, memory = [], [], {}
        for step, (indices, weights) in enumerate(
            itertools.islice(order, first, last), epoch * steps + first
        ):
            batch = (task.take(data, indices), weights)
            began = time.perf_counter()
            arguments = (task, config.method, total, rate, key, np.int32(step), state, frozen, *batch)
            state, loss = _step(*arguments)
            losses.append(float(loss))  # waits for the step
            seconds.append(time.perf_counter() - began)
            shapes = tuple(z.shape for z in jax.tree.leaves(batch))
            if shapes not in memory:  # the compiled step is there already
                memory[shapes] = peak_memory(_step.lower(*arguments).compile())
            notify(step + 1, total, rows[-1] if rows else {})
        passes = storage.whole(epoch + (part + 1) / parts)
        row = {"epoch": passes, "train_loss": float(np.mean(losses))}
        row |= task.evaluate(state.trainable, frozen, test)
        row["peak_memory_mib"] = max(memory.values()) / 2**20
        rows.append(row | {"seconds_per_step": float(np.median(seconds))})
        # The checkpoint last: it says how many of the rows count.
        storage.write_rows(folder / "metrics.csv", rows)
        storage.save_checkpoint(folder, len(rows), state)
    storage.write(folder / storage.PARAMETERS, serialization.to_bytes(state.trainable))
    (folder / storage.CHECKPOINT).unlink()
    notify(total, total, rows[-1])
    return rows


def load_parameters(config: Config) -> tuple[Any, Any]:
    """The final parameters of a finished run, `LowRank` nodes included.

    Returns:
      (what was trained, what was frozen), as the task's `init` gives them.
    """
    state, frozen = start(config)
    content = (config.folder / storage.PARAMETERS).read_bytes()
    return serialization.from_bytes(state.trainable, content), frozen


def make_optimizer(
    task: Task, name: str, learning_rate: Any, seed: int, steps: int
) -> optax.GradientTransformation:
    """A method's optimizer, with the task's clipping and schedule, for so many steps."""
    if task.decay:
        learning_rate = optax.linear_schedule(learning_rate, 0.0, steps)
    settings = methods.Settings(learning_rate, task.momentum, task.rank, task.loss_reduction, seed)
    optimizer = methods.find(name).optimizer(settings)
    if task.max_norm is None:
        return optimizer
    return optax.chain(oplora_jax.clip_by_global_norm(task.max_norm), optimizer)


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


# The learning rate is an argument, so that all runs of a method share one compilation.
@partial(jax.jit, static_argnums=(0, 1, 2))
def _step(task, name, steps, learning_rate, key, step, state, frozen, batch, weights):
    value_and_grad = methods.differentiate(methods.find(name).gradient)(task.loss)
    optimizer = make_optimizer(task, name, learning_rate, 0, steps)
    key = jax.random.fold_in(key, step)
    return advance(value_and_grad, optimizer, state, frozen, batch, weights, key)


def _check(config: Config, size: int) -> None:
    task = config.task
    if task.epochs < 1:
        raise ExperimentError(f"epochs is {task.epochs}; expected 1 or more")
    if not 1 <= task.batch_size <= size:
        raise ExperimentError(f"batch-size is {task.batch_size}; expected 1 to {size}, all examples")
    if not (config.learning_rate > 0 and math.isfinite(config.learning_rate)):
        raise ExperimentError(f"learning-rate is {config.learning_rate}; expected a positive number")
    if config.seed < 0:
        raise ExperimentError(f"seed is {config.seed}; expected 0 or more")
