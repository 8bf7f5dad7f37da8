import shutil

import numpy as np
import pytest
from PIL import Image

from experiments import ExperimentError
from experiments.data import folder_classes, folder_images


def write(path, color=(0, 0, 0), size=(32, 32), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).convert(mode).save(path)


@pytest.fixture
def folder(tmp_path):
    """Two classes; the red channel tells the files apart."""
    write(tmp_path / "train/dog/b.png", (3, 0, 9))
    write(tmp_path / "train/dog/a.PNG", (2, 0, 9))
    write(tmp_path / "train/cat/c.png", (1, 0, 9))
    write(tmp_path / "test/cat/d.jpg", (128, 128, 128))
    write(tmp_path / "test/dog/e.jpeg", (128, 128, 128), mode="L")
    return tmp_path


def test_folder(folder):
    (folder / "train" / "dog" / "notes.txt").write_text("not an image")
    (folder / "train" / ".cache").mkdir()
    train, test = folder_images(folder)
    assert folder_classes(folder) == ("cat", "dog")
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int32
    assert train.images.shape == (3, 32, 32, 3) and test.images.shape == (2, 32, 32, 3)
    assert train.images[:, 5, 6].tolist() == [[1, 0, 9], [2, 0, 9], [3, 0, 9]]
    assert train.labels.tolist() == [0, 1, 1] and test.labels.tolist() == [0, 1]
    assert (test.images == 128).all()  # JPEG keeps an even gray


def test_folder_missing(tmp_path):
    with pytest.raises(ExperimentError, match=r"none/train is missing: expected .*/train/<class>/\*"):
        folder_images(tmp_path / "none")


@pytest.mark.parametrize("split", ["train", "test"])
def test_split_missing(folder, split):
    shutil.rmtree(folder / split)
    with pytest.raises(ExperimentError, match=f"{split} is missing"):
        folder_images(folder)
    (folder / split).mkdir()
    (folder / split / "file.png").touch()
    with pytest.raises(ExperimentError, match=f"{split} has no folders of classes"):
        folder_images(folder)


def test_other_classes_in_test(folder):
    write(folder / "test/bird/f.png")
    with pytest.raises(ExperimentError, match="other classes in train than in test: only one has bird"):
        folder_images(folder)


def test_empty_class(folder):
    (folder / "train/cat/c.png").unlink()
    with pytest.raises(ExperimentError, match=r"train/cat has no images, \.jpeg, \.jpg, \.png"):
        folder_images(folder)


def test_size(folder):
    write(folder / "test/cat/wide.png", size=(33, 32))
    with pytest.raises(ExperimentError, match=r"test/cat/wide\.png is 33 x 32; expected 32 x 32"):
        folder_images(folder)


@pytest.mark.parametrize("content", ["whole", "header", "damaged"])
def test_unreadable(folder, content):
    path = folder / "train/cat/c.png"
    found = path.read_bytes()
    at = found.index(b"IDAT")
    damaged = found[: at + 4] + bytes(8) + found[at + 12 :]
    path.write_bytes({"whole": b"no image", "header": found[:40], "damaged": damaged}[content])
    with pytest.raises(ExperimentError, match=r"train/cat/c\.png cannot be read as an image: "):
        folder_images(folder)
