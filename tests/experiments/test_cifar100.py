from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from experiments import ExperimentError, data
from experiments.cifar100 import MEAN, STD, Cifar100, PatchMLP
from experiments.data import Images
from experiments.methods import method
from experiments.storage import Config
from experiments.training import make_optimizer

DENSE = [f"LoRADense_{i}" for i in range(9)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of 8 and 2 images, of noise."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, size in (("train", 8), ("test", 2)):
        for name in ("bird", "cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i in range(size):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def task(folder):
    return Cifar100(data="folder", data_dir=folder, epochs=1, batch_size=8, dropout=0.5)


@pytest.fixture(scope="module")
def parameters(task):
    """(what is trained, what is frozen) at the start."""
    return jax.jit(partial(task.init, full=False))(0)


def norm(x, layer):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    return x * layer["scale"] + layer["bias"]


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def reference(params, images):
    """The model without LoRA, in NumPy."""
    dense = lambda i, x: x @ params[f"Dense_{i}"]["kernel"] + params[f"Dense_{i}"]["bias"]
    x = (images / 255 - MEAN) / STD
    patches = x.reshape(-1, 8, 4, 8, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 64, 48)
    convolution = params["Conv_0"]
    x = patches @ convolution["kernel"].reshape(48, 256) + convolution["bias"] + params["positions"]
    for i in range(4):
        x = x + dense(2 * i + 1, gelu(dense(2 * i, norm(x, params[f"LayerNorm_{i}"]))))
    return dense(8, norm(x, params["LayerNorm_4"]).mean(1))


def test_model_is_the_papers(x64):
    model = PatchMLP(classes=5, rank=None, dropout=0.1)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    params = jax.jit(partial(model.init, training=False))(jax.random.key(0), images)["params"]
    keys = iter(jax.random.split(jax.random.key(1), 100))  # biases and scales away from 0 and 1
    params = jax.tree.map(lambda p: p + 0.1 * jax.random.normal(next(keys), p.shape, jnp.float64), params)
    found = model.apply({"params": params}, images, training=False)
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, reference(jax.tree.map(np.asarray, params), images), rtol=1e-10)


def test_what_trains(task):
    trainable, frozen = jax.eval_shape(lambda: task.init(0, full=False))
    norms = {f"LayerNorm_{i}/{leaf}" for i in range(5) for leaf in ("scale", "bias")}
    others = {"Conv_0/kernel", "Conv_0/bias", "positions"} | norms
    assert trainable["others"].keys() == others
    assert trainable["adapted"].keys() == {f"{layer}/lora" for layer in DENSE}
    assert set(frozen) == {f"{layer}/{leaf}" for layer in DENSE for leaf in ("kernel", "bias")}
    # The head has three outputs, as many as there are classes, and no more rank than that.
    assert [trainable["adapted"][f"{layer}/lora"].a.shape[-1] for layer in DENSE] == [16] * 8 + [3]
    assert frozen["LoRADense_8/kernel"].shape == (256, 3)
    trainable, frozen = jax.eval_shape(lambda: task.init(0, full=True))
    assert trainable["others"].keys() == others
    assert trainable["adapted"].keys() == {f"Dense_{i}/kernel" for i in range(9)}
    assert set(frozen) == {f"Dense_{i}/bias" for i in range(9)}


def test_hundred_classes_without_a_folder():
    trainable, frozen = jax.eval_shape(lambda: Cifar100().init(0, full=False))
    assert frozen["LoRADense_8/kernel"].shape == (256, 100)
    assert trainable["adapted"]["LoRADense_8/lora"].a.shape == (256, 16)


@pytest.mark.parametrize(
    "of",
    [
        method("oplora"),
        method("oplora", momentum_rank=64),
        method("svdlora"),
        method("lora_adamw"),
        method("scaled_adamw"),
    ],
    ids=str,
)
def test_optimizers_take_its_head(task, of):
    trainable, _ = jax.eval_shape(lambda: task.init(0, full=False))
    jax.eval_shape(make_optimizer(task, of, 0.1, seed=0, steps=1).init, trainable)


def test_dropout_in_training_alone(task, parameters):
    train, held_out = task.load(0)
    test = held_out["test_"]
    batch = Images(jnp.asarray(train.images[:4]), jnp.asarray(train.labels[:4]))
    loss = jax.jit(lambda key: task.loss(*parameters, batch, jnp.ones(4), key))
    losses = [float(loss(jax.random.key(i))) for i in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    kept = task.logits(*parameters, batch.images)
    np.testing.assert_array_equal(kept, task.logits(*parameters, batch.images))
    found = task.evaluate(*parameters, test)
    logits = np.asarray(task.logits(*parameters, test.images), np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -log_probabilities[np.arange(6), test.labels].mean()
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-4)  # float32 sums
    assert found["accuracy"] == np.mean(logits.argmax(-1) == test.labels)


def test_padding_of_a_batch_does_not_count(folder, parameters):
    task = Cifar100(data="folder", data_dir=folder, dropout=0.0)
    train, _ = task.load(0)
    batch = lambda n: Images(jnp.asarray(train.images[:n]), jnp.asarray(train.labels[:n]))
    loss = lambda n, weights: task.loss(*parameters, batch(n), jnp.array(weights), jax.random.key(0))
    np.testing.assert_allclose(loss(4, [1.0] * 3 + [0.0]), loss(3, [1.0] * 3), rtol=1e-5)


def test_examples(folder):
    load = lambda seed, **fields: Cifar100(data="folder", data_dir=folder, **fields).load(seed)
    train, held_out = load(0, examples=6)
    assert train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert {prefix: len(z.labels) for prefix, z in held_out.items()} == {"validation_": 6, "test_": 6}
    np.testing.assert_array_equal(train.images, load(1, examples=6)[0].images)
    assert len(load(0)[0].labels) == 18  # of 24
    for examples in (0, 19):
        with pytest.raises(ExperimentError, match=f"examples is {examples}; expected 1 to 18"):
            load(0, examples=examples)


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_dropout_out_of_range(dropout):
    with pytest.raises(ExperimentError, match=f"dropout is {dropout}; expected"):
        Cifar100(dropout=dropout).load(0)


def test_folder_not_given():
    task = Cifar100(data="folder")
    with pytest.raises(ExperimentError, match="data-dir is not given"):
        task.load(0)
    with pytest.raises(ExperimentError, match="data-dir is not given"):
        task.init(0, full=False)


def test_tfds():
    tfds = pytest.importorskip("tensorflow_datasets")
    data.tfds_images.cache_clear()
    with tfds.testing.mock_data(num_examples=12):
        train, held_out = Cifar100(examples=5).load(0)
        test = held_out["test_"]
    data.tfds_images.cache_clear()
    assert train.images.shape == (5, 32, 32, 3) and test.images.shape == (12, 32, 32, 3)
    assert train.images.dtype == np.uint8 and train.labels.dtype == np.int32


def test_folders_of_runs_differ_by_their_images(tmp_path):
    config = lambda **fields: Config(Cifar100(**fields), method("oplora"), 0.01, 0, tmp_path)
    one, other = (config(data="folder", data_dir=tmp_path / name) for name in "ab")
    assert one.folder != other.folder
    assert config().folder == config(data_dir=tmp_path).folder  # the same images, wherever they lie


@pytest.mark.parametrize("data", ["tfds", "folder"])
def test_protocol(data):
    task = Cifar100(data)
    assert (task.epochs, task.batch_size, task.momentum, task.rank) == (20, 64, 0.9, 16)
    assert task.name == f"cifar100_{data}"
    rates = {"svdlora": 0.005, "oplora": 0.01, "lora_sgd": 0.01, "scaled_adamw": 5e-4, "full_adamw": 1e-3}
    assert {name: method(name).rate(task.protocol) for name in rates} == rates
    with pytest.raises(ExperimentError, match="altlora has no learning rate for cifar100; name one"):
        method("altlora").rate(task.protocol)
