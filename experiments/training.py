"""One run: from its configuration to its folder, resumed where it was interrupted."""

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
from experiments.storage import Config


class State(NamedTuple):
    """What changes from step to step."""

    trainable: Any
    optimizer: Any


def start(config: Config) -> tuple[State, Any]:
    """(the state before the first step, the frozen parameters)."""
    method = methods.find(config.method)
    trainable, frozen = config.task.init(config.seed, full=method.gradient == "full")
    return State(trainable, _optimizer(config, config.learning_rate).init(trainable)), frozen


def optimizer_bytes(config: Config) -> int:
    """The size of the optimizer's state."""
    state, _ = jax.eval_shape(partial(start, config))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.optimizer))


def batches(
    size: int, batch_size: int, seed: int, epoch: int
) -> Iterator[tuple[Int[np.ndarray, " B"], Float[np.ndarray, " B"]]]:
    """One epoch's batches in random order, as (indices, weights).

    The order depends on the seed and the epoch alone. Every example comes once; the last batch is filled up
    with the epoch's first examples at weight 0: no one example stands out in its second moments.
    """
    order = np.random.default_rng([seed, epoch]).permutation(size)
    for i in range(0, size, batch_size):
        places = np.arange(i, i + batch_size)
        yield order.take(places, mode="wrap"), (places < size).astype(np.float32)


def train(config: Config, notify: Callable[[int, int, dict], None] = lambda *_: None) -> list[dict]:
    """Runs what is not run yet.

    Args:
      config: the run.
      notify: called after each step with the steps done, the steps there are, and the last epoch's metrics.

    Returns:
      The metrics of each epoch. seconds_per_step is the median over its steps.

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
    data, rate = jax.device_put((data, np.float32(config.learning_rate)))
    steps = math.ceil(size / task.batch_size)
    for epoch in range(done + 1, task.epochs + 1):
        losses, seconds = [], []
        for indices, weights in batches(size, task.batch_size, config.seed, epoch):
            began = time.perf_counter()
            state, loss = _step(task, config.method, rate, state, frozen, data, indices, weights)
            losses.append(float(loss))  # waits for the step
            seconds.append(time.perf_counter() - began)
            notify((epoch - 1) * steps + len(losses), task.epochs * steps, rows[-1] if rows else {})
        row = {"epoch": epoch, "train_loss": float(np.mean(losses))}
        row |= task.evaluate(state.trainable, frozen, test)
        rows.append(row | {"seconds_per_step": float(np.median(seconds))})
        # The checkpoint last: it says how many of the rows count.
        storage.write_rows(folder / "metrics.csv", rows)
        storage.save_checkpoint(folder, epoch, state)
    parameters = serialization.to_bytes((state.trainable, frozen))
    storage.write(folder / storage.PARAMETERS, parameters)
    (folder / storage.CHECKPOINT).unlink()
    notify(task.epochs * steps, task.epochs * steps, rows[-1])
    return rows


def load_parameters(config: Config) -> tuple[Any, Any]:
    """The final parameters of a finished run, `LowRank` nodes included.

    Returns:
      (what was trained, what was frozen), as the task's `init` gives them.
    """
    state, frozen = start(config)
    content = (config.folder / storage.PARAMETERS).read_bytes()
    return serialization.from_bytes((state.trainable, frozen), content)


def _optimizer(config: Config, learning_rate: Any) -> optax.GradientTransformation:
    return methods.find(config.method).optimizer(_settings(config.task, learning_rate, config.seed))


def _settings(task: storage.Task, learning_rate: Any, seed: int) -> methods.Settings:
    return methods.Settings(learning_rate, task.momentum, task.rank, task.loss_reduction, seed)


# The learning rate is an argument, so that all runs of a method share one compilation.
@partial(jax.jit, static_argnums=(0, 1))
def _step(task, name, learning_rate, state, frozen, data, indices, weights):
    method = methods.find(name)
    batch = jax.tree.map(lambda z: z[indices], data)
    differentiate = {
        "exact": oplora_jax.value_and_grad,
        "outer": partial(oplora_jax.value_and_grad, gradient="outer"),
    }.get(method.gradient, jax.value_and_grad)
    loss, gradients = differentiate(task.loss)(state.trainable, frozen, batch, weights)
    optimizer = method.optimizer(_settings(task, learning_rate, seed=0))
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
    return State(optax.apply_updates(state.trainable, updates), optimizer_state), loss


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
