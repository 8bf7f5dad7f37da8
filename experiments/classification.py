"""What the tasks share that classify images: what is trained, the loss and the accuracy.

Their models' parameters are dictionaries by path. A task has `logits(trainable, frozen, images)`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from jaxtyping import Array, Float, Int

from experiments.data import Images

CHUNK = 1000  # test images at a time


def split(params: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what is trained, what is frozen), by path: the kernels and biases that LoRA stands beside stay."""
    frozen = lambda path: "LoRADense" in path and not path.endswith("/lora")
    flat = traverse_util.flatten_dict(params, sep="/")
    return (
        {path: leaf for path, leaf in flat.items() if not frozen(path)},
        {path: leaf for path, leaf in flat.items() if frozen(path)},
    )


def join(trainable: dict[str, Any], frozen: dict[str, Any]) -> Any:
    """The model's parameters again."""
    return traverse_util.unflatten_dict({**frozen, **trainable}, sep="/")


def mean_loss(
    logits: Float[Array, "N classes"], labels: Int[Array, " N"], weights: Float[Array, " N"]
) -> Float[Array, ""]:
    """The cross-entropy, averaged over a batch's examples of weight 1."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(weights * losses) / jnp.sum(weights)


def evaluate(task: Any, trainable: Any, frozen: Any, test: Images) -> dict[str, float]:
    """The mean loss and the accuracy on the test images."""
    chunks = [Images(*(z[i : i + CHUNK] for z in test)) for i in range(0, len(test.labels), CHUNK)]
    sums = [_sums(task, trainable, frozen, chunk) for chunk in chunks]
    loss, accuracy = (float(sum(column)) / len(test.labels) for column in zip(*sums, strict=True))
    return {"test_loss": loss, "test_accuracy": accuracy}


@partial(jax.jit, static_argnums=0)
def _sums(task, trainable, frozen, batch):
    """The sum of the losses, and how many labels are found."""
    logits = task.logits(trainable, frozen, batch.images)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return jnp.sum(losses), jnp.sum(jnp.argmax(logits, axis=-1) == batch.labels)
