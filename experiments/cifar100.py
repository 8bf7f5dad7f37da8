"""CIFAR-100: an MLP on patches from a random start, with LoRA on its dense layers."""

import dataclasses
from pathlib import Path
from typing import Literal

import flax.linen as nn
import numpy as np
from jaxtyping import Array, Float, UInt8

from experiments import ExperimentError
from experiments.classification import Classification
from experiments.data import Images, folder_classes, folder_images, hold_out, subset, tfds_images
from oplora_jax.linen import LoRADense

MEAN = np.array([0.5071, 0.4867, 0.4408]).reshape(1, 1, 1, 3)
STD = np.array([0.2675, 0.2565, 0.2761]).reshape(1, 1, 1, 3)


class PatchMLP(nn.Module):
    """Residual MLPs on patches of 4 x 4, with LoRA on all dense layers unless rank is None.

    A layer with fewer outputs than rank has a LoRA of as many.
    """

    classes: int
    rank: int | None
    dropout: float

    @nn.compact
    def __call__(
        self, images: UInt8[Array, "N 32 32 3"], training: bool = False
    ) -> Float[Array, "N classes"]:
        """The logits; in training it needs a random key "dropout"."""
        x = nn.Conv(256, (4, 4), strides=(4, 4), padding="VALID")((images / 255 - MEAN) / STD)
        x = x.reshape(len(x), 64, 256)
        x += self.param("positions", nn.initializers.normal(0.02), (1, 64, 256))
        for _ in range(4):
            y = self._dense(512)(nn.LayerNorm()(x))
            y = self._dense(256)(nn.gelu(y))
            x += nn.Dropout(self.dropout, deterministic=not training)(y)
        return self._dense(self.classes)(nn.LayerNorm()(x).mean(1))

    def _dense(self, features: int) -> nn.Module:
        return nn.Dense(features) if self.rank is None else LoRADense(features, rank=min(self.rank, features))


@dataclasses.dataclass(frozen=True)
class Cifar100(Classification):
    """An MLP on patches on CIFAR-100, from a random start.

    The dense layers' kernels and biases stay at their start; their LoRA of rank 16, the patches' embedding,
    the positions and the norms train; in full training the kernels do too. Learning rates are chosen on
    images held out from the training ones.
    """

    data: Literal["tfds", "folder"] = "tfds"
    """CIFAR-100 from TensorFlow Datasets, or any images of 32 x 32 in folders of classes."""
    data_dir: Path | None = None
    """Folder of TensorFlow Datasets, its default if not given; or of train/<class>/* and test/<class>/*."""
    epochs: int = 20
    """Passes over the training images."""
    batch_size: int = 64
    """Images in a batch."""
    examples: int | None = None
    """Images to train on, always the same ones, with each class's share; all if not given."""
    dropout: float = 0.1
    """Rate of dropout in training, on what each residual MLP adds."""
    others_rate: float = 1e-3
    """Of AdamW, which trains the embedding, the positions and the norms whatever the method."""

    rank = 16
    shape = (32, 32, 3)
    protocol = "cifar100"

    @property
    def name(self) -> str:
        """Names the task's folder."""
        return f"cifar100_{self.data}"

    def load(self, seed: int) -> tuple[Images, dict[str, Images]]:
        """(the training images, those held out and the test images); the same for every seed."""
        if not 0 <= self.dropout < 1:
            raise ExperimentError(f"dropout is {self.dropout}; expected 0 or more and less than 1")
        if self.data == "folder":
            train, test = folder_images(self._folder())
        else:
            train, test = tfds_images("cifar100", self.data_dir)
        train, held_out = hold_out(train, test)
        return subset(train, self.examples), held_out

    def model(self, full: bool) -> PatchMLP:
        """The model, with LoRA unless full."""
        classes = len(folder_classes(self._folder())) if self.data == "folder" else 100
        return PatchMLP(classes, None if full else self.rank, self.dropout)

    def _folder(self) -> Path:
        if self.data_dir is None:
            raise ExperimentError("data-dir is not given: images from a folder need one")
        return self.data_dir
