"""What the tasks share that classify images: what is trained, the loss and the accuracy."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, UInt8

from experiments.data import Images
from experiments.task import Task, Trainable, divide, is_full, join

CHUNK = 1000  # images at a time in evaluation


class Classification(Task):
    """A Flax model of images, from a random start; what is trained and what is frozen are by path.

    The dense layers' biases stay at their start, and so do their kernels, which LoRA adapts; all else trains.
    """

    shape: tuple[int, ...]  # of an image
    dropout = 0.0  # the rate; if it is not zero the model takes training=True
    metrics = ("test_accuracy", "train_loss")

    def model(self, full: bool) -> nn.Module:
        """The model, with LoRA unless full."""
        raise NotImplementedError

    def init(self, seed: Any, full: bool) -> tuple[Trainable, dict[str, Any]]:
        """(what is trained, what is frozen), by path."""
        images = jnp.zeros((1, *self.shape), jnp.uint8)
        params = self.model(full).init(jax.random.key(seed), images)["params"]
        adapted = lambda path: "Dense" in path and path.endswith("/kernel" if full else "/lora")
        return divide(flatten_dict(params, sep="/"), adapted, lambda path: "Dense" not in path)

    def logits(
        self, trainable: Any, frozen: Any, images: UInt8[Array, "N ..."], key: Any = None
    ) -> Float[Array, "N classes"]:
        """The model's outputs, with dropout if there is a key."""
        params = join(trainable, frozen)
        training = {"training": True, "rngs": {"dropout": key}} if self.dropout and key is not None else {}
        return self.model(is_full(trainable)).apply({"params": params}, images, **training)

    def loss(
        self, trainable: Any, frozen: Any, batch: Images, weights: Float[Array, " N"], key: Any = None
    ) -> Float[Array, ""]:
        """The cross-entropy, averaged over a batch's examples of weight 1; key draws what is dropped."""
        logits = self.logits(trainable, frozen, batch.images, key)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return jnp.sum(weights * losses) / jnp.sum(weights)

    def evaluate(self, trainable: Any, frozen: Any, data: Images) -> dict[str, float]:
        """The mean loss and the accuracy, without dropout."""
        size = len(data.labels)
        chunks = [data.take(np.arange(i, min(i + CHUNK, size))) for i in range(0, size, CHUNK)]
        sums = [_sums(self, trainable, frozen, chunk) for chunk in chunks]
        loss, accuracy = (float(sum(column)) / size for column in zip(*sums, strict=True))
        return {"loss": loss, "accuracy": accuracy}


@partial(jax.jit, static_argnums=0)
def _sums(task, trainable, frozen, batch):
    """The sum of the losses, and how many labels are found."""
    logits = task.logits(trainable, frozen, batch.images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return jnp.sum(losses), jnp.sum(jnp.argmax(logits, axis=-1) == batch.labels)
