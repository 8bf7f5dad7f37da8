"""Images in folders, DIR/train/<class>/* and DIR/test/<class>/*: the layout of TFDS's ImageFolder."""

import functools
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from experiments import ExperimentError
from experiments.data import Images

SUFFIXES = {".png", ".jpg", ".jpeg"}
SIZE = 32


@functools.cache
def folder_classes(folder: Path) -> tuple[str, ...]:
    """The names of the classes, sorted; a class's label is its place among them. No image is read.

    Raises:
      ExperimentError: a folder that is missing or has no classes, or not the same to train and to test on.
    """
    train, test = _classes(folder, "train"), _classes(folder, "test")
    if train != test:
        only = sorted(set(train) ^ set(test))
        raise ExperimentError(f"{folder} has other classes in train than in test: only one has {only[0]}")
    return train


@functools.cache
def folder_images(folder: Path) -> tuple[Images, Images]:
    """(the training images, the test images) of a folder, class by class.

    Args:
      folder: with train/<class>/* and test/<class>/*, PNG or JPEG files of 32 x 32 pixels; other files in it
        are left aside.

    Raises:
      ExperimentError: a folder that is missing, has no classes or other ones in train than in test; a class
        without images; a file that is no image or of another size.
    """
    classes = folder_classes(folder)
    return _split(folder / "train", classes), _split(folder / "test", classes)


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


def _split(folder: Path, classes: tuple[str, ...]) -> Images:
    images, counts = [], []
    for name in classes:
        paths = sorted(z for z in (folder / name).iterdir() if z.suffix.lower() in SUFFIXES)
        if not paths:
            raise ExperimentError(f"{folder / name} has no images, {', '.join(sorted(SUFFIXES))}")
        images += map(_read, paths)
        counts.append(len(paths))
    return Images(np.stack(images), np.repeat(np.arange(len(classes), dtype=np.int32), counts))


def _read(path: Path) -> UInt8[np.ndarray, "32 32 3"]:
    try:
        with Image.open(path) as image:
            if image.size != (SIZE, SIZE):
                width, height = image.size
                raise ExperimentError(f"{path} is {width} x {height}; expected {SIZE} x {SIZE} pixels")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's, by the format that is broken
        raise ExperimentError(f"{path} cannot be read as an image: {error}") from error
