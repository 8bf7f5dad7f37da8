"""Meshes of eight devices, and how the arrays of two layers lie on them."""

from typing import NamedTuple

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

DEVICES = jax.devices("cpu")[:8]


class Layout(NamedTuple):
    """A mesh, and how the two layers' kernels and activations lie on it."""

    shape: tuple[int, ...]
    names: tuple[str, ...]
    inputs: P
    first: P
    hidden: P
    second: P
    outputs: P


LAYOUTS = {
    "data": Layout((8,), ("data",), P("data"), P(), P("data"), P(), P("data")),
    "model": Layout((8,), ("model",), P(), P(None, "model"), P(None, None, "model"), P("model"), P()),
    "data and model": Layout(
        *((2, 4), ("data", "model")),
        *(P("data"), P(None, "model"), P("data", None, "model"), P("model"), P("data")),
    ),
    # The kernels are spread over the devices that have the data, by rows and by columns.
    "fully sharded": Layout((8,), ("data",), P("data"), P("data"), P("data"), P(None, "data"), P("data")),
}
BOTH = "data and model"


def make_mesh(layout, axis_types):
    """axis_types is "explicit", "auto", or "mixed": all axes explicit but the last."""
    types = [AxisType.Auto if axis_types == "auto" else AxisType.Explicit] * len(layout.names)
    if axis_types == "mixed":
        types[-1] = AxisType.Auto
    return jax.make_mesh(layout.shape, layout.names, axis_types=tuple(types), devices=DEVICES)


def assert_lie_alike(some, others):
    for one, other in zip(*map(jax.tree.leaves, (some, others)), strict=True):
        assert one.sharding.is_equivalent_to(other.sharding, one.ndim)


def spec(array):
    return P(*array.sharding.spec, *[None] * (array.ndim - len(array.sharding.spec)))
