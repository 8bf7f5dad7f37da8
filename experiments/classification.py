"""What the tasks share that classify images: what is trained, the loss and the accuracy."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jaxtyping import Array, Float, UInt8

from experiments.data import Images
from experiments.task import Task

CHUNK = 1000  # test images at a time


class Classification(Task):
    """A Flax model of images, from a random start; what is trained and what is frozen are by path.

    The kernels and biases of `LoRADense` stay at their start, their LoRA and all else train.
    """

    shape: tuple[int, ...]  # of an image
    dropout = 0.0  # the rate; if it is not zero the model takes training=True
    metrics = ("test_accuracy", "train_loss")

    def model(self, full: bool) -> nn.Module:
        """The model, with LoRA unless full."""
        raise NotImplementedError

    def init(self, seed: Any, full: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """(what is trained, what is frozen), by path."""
        images = jnp.zeros((1, *self.shape), jnp.uint8)
        params = self.model(full).init(jax.random.key(seed), images)["params"]
        flat = traverse_util.flatten_dict(params, sep="/")
        frozen = {path for path in flat if "LoRADense" in path and not path.endswith("/lora")}
        return (
            {path: leaf for path, leaf in flat.items() if path not in frozen},
            {path: leaf for path, leaf in flat.items() if path in frozen},
        )

    def logits(
        self, trainable: Any, frozen: Any, images: UInt8[Array, "N ..."], key: Any = None
    ) -> Float[Array, "N classes"]:
        """The model's outputs, with dropout if there is a key."""
        params = traverse_util.unflatten_dict({**frozen, **trainable}, sep="/")
        training = {"training": True, "rngs": {"dropout": key}} if self.dropout and key is not None else {}
        return self.model(full=not frozen).apply({"params": params}, images, **training)

    def loss(
        self, trainable: Any, frozen: Any, batch: Images, weights: Float[Array, " N"], key: Any = None
    ) -> Float[Array, ""]:
        """The cross-entropy, averaged over a batch's examples of weight 1; key draws what is dropped."""
        logits = self.logits(trainable, frozen, batch.images, key)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return jnp.sum(weights * losses) / jnp.sum(weights)

    def evaluate(self, trainable: Any, frozen: Any, test: Images) -> dict[str, float]:
        """The mean loss and the accuracy on the test images, without dropout."""
        chunks = [Images(*(z[i : i + CHUNK] for z in test)) for i in range(0, len(test.labels), CHUNK)]
        sums = [_sums(self, trainable, frozen, chunk) for chunk in chunks]
        loss, accuracy = (float(sum(column)) / len(test.labels) for column in zip(*sums, strict=True))
        return {"test_loss": loss, "test_accuracy": accuracy}


@partial(jax.jit, static_argnums=0)
def _sums(task, trainable, frozen, batch):
    """The sum of the losses, and how many labels are found."""
    logits = task.logits(trainable, frozen, batch.images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return jnp.sum(losses), jnp.sum(jnp.argmax(logits, axis=-1) == batch.labels)
