"""Which optimizers' increments depend on how a b is split into factors, and on how the scale is."""

import numpy as np
import optax
import pytest

from oplora_jax import altlora, altlora_plus, lora_pro, lora_pro_sgd, lora_rite, reflora, scaled_gd
from tests.optimizers.paths import factors, full_gradients, low_rank, path

# What changes nothing: any invertible R in (a R, R^-1 b), or an orthogonal R alone, or neither; and whether
# (sqrt(s) a, sqrt(s) b) with scale 1 goes the way of (a, b) with scale s.
OPTIMIZERS = {
    "scaled_gd": (scaled_gd(0.05, regularization=0.0), "any", True),
    "scaled_gd, damped": (scaled_gd(0.05, regularization=0.5), "orthogonal", True),
    "altlora": (altlora(0.03, regularization=0.0), "any", False),
    "altlora, damped": (altlora(0.03, regularization=0.5), "orthogonal", False),
    "altlora_plus": (altlora_plus(0.02, regularization=0.0), "none", False),
    "lora_rite": (lora_rite(0.05, skip_threshold=4.0), "any", False),
    "lora_rite, escaped mass": (
        lora_rite(0.05, max_norm=None, escaped_mass=True),
        "any",
        False,
    ),
    "lora_pro, X = 0": (lora_pro(0.05, x_mode="zero"), "any", True),
    "lora_pro": (lora_pro(0.05), "orthogonal", True),
    "lora_pro_sgd, X = 0": (lora_pro_sgd(0.1, x_mode="zero"), "any", True),
    "lora_pro_sgd": (lora_pro_sgd(0.1), "orthogonal", True),
    "reflora, SGD": (reflora(optax.sgd(0.02), warmup_steps=0), "any", False),
    "reflora, Adam": (reflora(optax.adam(0.05), warmup_steps=0), "none", False),
}
SCALE = 2.0


def rotation(angle):
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


ORTHOGONAL = [rotation(0.7), rotation(2.0) @ np.diag([1.0, -1.0])]
INVERTIBLE = [rotation(0.7) @ np.diag([2.0, 0.3]) @ rotation(1.9), np.array([[3.0, 1.0], [-1.0, 0.2]])]


def difference(products, others):
    """The largest along the way, relative to the length of the way."""
    length = np.abs(products[-1] - products[0]).max()
    assert length > 0.1
    return np.abs(np.asarray(products) - np.asarray(others)).max() / length


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_split_into_factors(name, x64):
    tx, what, _ = OPTIMIZERS[name]
    (a, b), run = factors(SCALE), path(tx, full_gradients())
    product = lambda change: run(low_rank(a @ change, np.linalg.inv(change) @ b, SCALE))[2]
    for changes, same in ((ORTHOGONAL, what != "none"), (INVERTIBLE, what == "any")):
        for change in changes:
            gap = difference(product(np.eye(2)), product(change))
            # float64, condition numbers up to 1e3 squared; or a difference that shows in a plot.
            assert gap < 1e-8 if same else gap > 1e-3


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "damped" not in name])
def test_the_split_of_the_scale(name, x64):
    tx, _, same = OPTIMIZERS[name]
    a, b = factors(SCALE)
    root, targets = np.sqrt(SCALE), full_gradients()
    products = [path(tx, targets)(z)[2] for z in (low_rank(a, b, SCALE), low_rank(root * a, root * b))]
    gap = difference(*products)
    assert gap < 1e-8 if same else gap > 1e-3  # as above
