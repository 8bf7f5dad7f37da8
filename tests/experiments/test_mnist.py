import jax
import jax.numpy as jnp
import numpy as np

from experiments import classification
from experiments.data import Images
from experiments.methods import method
from experiments.mnist import LeNet5, Mnist, max_pool
from experiments.storage import Config
from experiments.training import train
from oplora_jax import is_low_rank

MEAN, DEVIATION = 0.1307, 0.3081  # of the training images' pixels


def test_pooling_is_that_of_windows():
    x = jax.random.normal(jax.random.key(0), (2, 6, 4, 3))
    expected = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    np.testing.assert_array_equal(max_pool(x), expected)


def reference(params, images):
    """LeNet-5 in float64: 32 x 32 pixels, two convolutions with pooling, three dense layers."""
    w = jax.tree.map(lambda z: np.asarray(z, np.float64), params)
    x = np.zeros((len(images), 32, 32, 1))  # black around the digits
    x[:, 2:30, 2:30, 0] = images / 255
    x = (x - MEAN) / DEVIATION
    for name in ("Conv_0", "Conv_1"):
        windows = np.lib.stride_tricks.sliding_window_view(x, (5, 5), axis=(1, 2))  # (N, h, w, c, 5, 5)
        x = np.tanh(np.einsum("nhwcij,ijco->nhwo", windows, w[name]["kernel"]) + w[name]["bias"])
        corners = [x[:, i::2, j::2] for i in range(2) for j in range(2)]
        x = np.max(corners, axis=0)
    x = x.reshape(len(x), -1)
    for name in ("Dense_0", "Dense_1", "Dense_2"):
        x = x @ w[name]["kernel"] + w[name]["bias"]
        x = np.tanh(x) if name != "Dense_2" else x
    return x


def test_lenet_by_hand():
    train_images, _ = Mnist().load(0)
    images = train_images.images[:3]
    model = LeNet5(rank=None)
    params = model.init(jax.random.key(0), images)["params"]
    params = jax.tree.map(lambda z: z + 0.01, params)  # biases that count
    # float32 through five layers, logits of about 1
    np.testing.assert_allclose(model.apply({"params": params}, images), reference(params, images), atol=1e-5)


def test_pixels_are_normalized_by_those_of_the_data():
    train_images, _ = Mnist().load(0)
    pixels = train_images.images / 255
    # Those of all 60000 images; of the 4000 bundled ones they differ in the third digit.
    np.testing.assert_allclose([pixels.mean(), pixels.std()], [MEAN, DEVIATION], atol=5e-3)


def test_what_trains():
    trainable, frozen = jax.eval_shape(lambda: Mnist().init(0, full=False))
    dense = [f"LoRADense_{i}" for i in range(3)]
    convolutions = {f"Conv_{i}/{leaf}" for i in range(2) for leaf in ("kernel", "bias")}
    assert trainable["others"].keys() == convolutions
    assert trainable["adapted"].keys() == {f"{layer}/lora" for layer in dense}
    assert set(frozen) == {f"{layer}/{leaf}" for layer in dense for leaf in ("kernel", "bias")}
    assert all(is_low_rank(trainable["adapted"][f"{layer}/lora"]) for layer in dense)
    trainable, frozen = jax.eval_shape(lambda: Mnist().init(0, full=True))
    assert trainable["others"].keys() == convolutions
    assert trainable["adapted"].keys() == {f"Dense_{i}/kernel" for i in range(3)}
    assert set(frozen) == {f"Dense_{i}/bias" for i in range(3)}


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
    np.testing.assert_allclose(found["loss"], task.loss(trainable, frozen, batch, weights), rtol=1e-5)
    assert found["accuracy"] == float(classification._sums(task, trainable, frozen, batch)[1]) / 1500


def test_padding_of_a_batch_does_not_count():
    task = Mnist()
    trainable, frozen = task.init(0, full=False)
    train_images, _ = task.load(0)
    batch = lambda n: Images(jnp.asarray(train_images.images[:n]), jnp.asarray(train_images.labels[:n]))
    padded = task.loss(trainable, frozen, batch(8), jnp.array([1.0] * 5 + [0.0] * 3))
    np.testing.assert_allclose(padded, task.loss(trainable, frozen, batch(5), jnp.ones(5)), rtol=1e-5)


def test_oplora_is_as_good_as_svdlora(tmp_path):
    task = Mnist(epochs=3)
    rates = {"oplora": 0.02, "svdlora": 0.01}
    final = lambda name, rate: train(Config(task, method(name), rate, 0, tmp_path))["test_accuracy"].iloc[-1]
    accuracy = {name: final(name, rate) for name, rate in rates.items()}
    assert accuracy["svdlora"] > 0.85  # 0.927 in a trial
    assert accuracy["oplora"] > accuracy["svdlora"] - 0.01  # one point; 0.948 in a trial


def test_a_source_of_data_has_a_folder_of_its_own(tmp_path):
    folders = {Config(Mnist(data), method("oplora"), 0.1, 0, tmp_path).folder for data in ("bundled", "tfds")}
    assert len(folders) == 2
