import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import classification
from experiments.data import Images
from experiments.mnist import LeNet5, Mnist, max_pool
from experiments.storage import Config
from experiments.training import train
from oplora_jax import LowRank, is_low_rank


def test_pooling_is_that_of_windows():
    x = jax.random.normal(jax.random.key(0), (2, 6, 4, 3))
    expected = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    np.testing.assert_array_equal(max_pool(x), expected)


def test_lenet_has_the_papers_layers():
    init = LeNet5(rank=None).init
    params = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 28, 28), jnp.uint8))["params"]
    shapes = {name: layer["kernel"].shape for name, layer in params.items()}
    assert shapes == {
        "Conv_0": (5, 5, 1, 6),
        "Conv_1": (5, 5, 6, 16),
        "Dense_0": (400, 120),
        "Dense_1": (120, 84),
        "Dense_2": (84, 10),
    }


def test_what_trains():
    trainable, frozen = jax.eval_shape(lambda: Mnist().init(0, full=False))
    dense = [f"LoRADense_{i}" for i in range(3)]
    convolutions = {f"Conv_{i}/{leaf}" for i in range(2) for leaf in ("kernel", "bias")}
    assert set(trainable) == convolutions | {f"{layer}/lora" for layer in dense}
    assert set(frozen) == {f"{layer}/{leaf}" for layer in dense for leaf in ("kernel", "bias")}
    assert all(is_low_rank(trainable[f"{layer}/lora"]) for layer in dense)
    trainable, frozen = jax.eval_shape(lambda: Mnist().init(0, full=True))
    assert not frozen and not any(isinstance(leaf, LowRank) for leaf in trainable.values())


def test_evaluation_adds_up_over_chunks():
    task = Mnist()
    trainable, frozen = task.init(0, full=False)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (1500, 28, 28), dtype=np.uint8)
    test = Images(images, rng.integers(0, 10, 1500).astype(np.int32))
    found = task.evaluate(trainable, frozen, test)
    weights = jnp.ones(1500)
    batch = Images(*map(jnp.asarray, test))
    # float32 sums of 1500 losses
    np.testing.assert_allclose(found["test_loss"], task.loss(trainable, frozen, batch, weights), rtol=1e-5)
    assert found["test_accuracy"] == float(classification._sums(task, trainable, frozen, batch)[1]) / 1500


def test_padding_of_a_batch_does_not_count():
    task = Mnist()
    trainable, frozen = task.init(0, full=False)
    train_images, _ = task.load(0)
    batch = lambda n: Images(jnp.asarray(train_images.images[:n]), jnp.asarray(train_images.labels[:n]))
    padded = task.loss(trainable, frozen, batch(8), jnp.array([1.0] * 5 + [0.0] * 3))
    np.testing.assert_allclose(padded, task.loss(trainable, frozen, batch(5), jnp.ones(5)), rtol=1e-5)


def test_oplora_is_as_good_as_svdlora(tmp_path):
    task = Mnist(epochs=3)
    rates = {"oplora_1": 0.02, "svdlora": 0.01}
    accuracy = {m: train(Config(task, m, lr, 0, tmp_path))[-1]["test_accuracy"] for m, lr in rates.items()}
    assert accuracy["svdlora"] > 0.85  # 0.927 in a trial
    assert accuracy["oplora_1"] > accuracy["svdlora"] - 0.01  # one point; 0.948 in a trial


@pytest.mark.parametrize("data", ["bundled", "tfds"])
def test_protocol(data):
    task = Mnist(data)
    assert (task.epochs, task.batch_size, task.momentum, task.rank) == (20, 64, 0.9, 8)
    assert task.name == f"mnist_{data}"
