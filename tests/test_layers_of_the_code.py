"""Which part of the library may import which."""

import pathlib
import sys

import pytest

import oplora_jax
from tests.sources import imports, uses

PACKAGE = pathlib.Path(oplora_jax.__file__).parent
GUIDE = PACKAGE.parent / "CONTRIBUTING.md"

# A part imports from those below it, and not from those beside it.
LAYERS = """\
tunix: Tunix's trainer, with exact gradients
equinox, linen, nnx, peft, qwix, reslora: models of other libraries; the public names of adapters' modules
_flax: what Flax is to know of LowRank nodes
adapters, optimizers: LoRA parameters beside a model's kernels; what steps them
gradients: lora_dot, the exact gradient of the full weight, clipping
lorsum: a sum of low-rank matrices, brought back to rank r
norms, metrics, svd, together: what is computed of matrices; of many parameters at once
solve: Gram solves, and every decomposition there is
matrix: low-rank, outer product, dense: what the others multiply with
marker, seal: the mark of a use of a LoRA parameter; what tells a scaled outer product from a sum
products: of arrays
sharding: how arrays lie on a mesh
_jax: what is not public in JAX
"""
# So within optimizers/.
OPTIMIZERS = """\
each optimizer, in_backward: a formula, its docstring, its facts
_rulers: steps whose length a learning rate says
_factors, _momentum: what several optimizers share
_lift: a step of LoRA parameters, lifted to trees
_facts, _trees, _types: what is declared; trees, types
"""
# The other libraries, and who imports them.
EVERYWHERE = {"jax", "jaxtyping", "numpy", "oplora_jax"} | sys.stdlib_module_names
LIBRARIES = {
    "equinox": {"equinox"},
    "flax": {"_flax", "linen", "nnx", "qwix", "tunix"},
    "optax": {"adapters", "gradients", "optimizers", "tunix"},
    "orbax": {"tunix"},
    "qwix": {"qwix"},
    "safetensors": {"adapters"},
    "tunix": {"tunix"},
}


def heights(picture):
    """How high each name stands."""
    rows = [line.partition(":")[0].split(", ") for line in picture.splitlines()]
    return {name: height for height, row in enumerate(reversed(rows)) for name in row}


def files(package, read=imports):
    """(path below the package, what it imports) of each module but the package's own `__init__`."""
    paths = [path for path in package.rglob("*.py") if path != package / "__init__.py"]
    return [(path.relative_to(package), set(read(path))) for path in paths]


def part_of(path):
    return path.parts[0].removesuffix(".py")


def ours(found):
    """The modules of the package that are among what a file imports, as tuples of names."""
    for module, name in found:
        if module.split(".")[0] == "oplora_jax":
            yield (*module.split(".")[1:], *filter(None, [name]))


def crossings(package):
    """(file, part) where a file imports from a part that does not stand below its own."""
    height = heights(LAYERS)
    for path, found in files(package):
        part = part_of(path)
        for other in {names[0] if names and names[0] in height else "oplora_jax" for names in ours(found)}:
            if other != part and height.get(other, len(height)) >= height[part]:
                yield path.as_posix(), other


def crossings_of_optimizers(package):
    """The same between modules of optimizers/."""
    height, top = heights(OPTIMIZERS), heights(OPTIMIZERS)["each optimizer"]
    for path, found in files(package / "optimizers"):
        for other in {z[1] for z in ours(found) if len(z) > 1 and z[0] == "optimizers"}:
            if height.get(other, top) >= height.get(path.stem, top):
                yield path.as_posix(), other


def borrowed(package):
    """(file, library) where a file imports from another library."""
    for path, found in files(package):
        yield from ((path, z) for z in {module.split(".")[0] for module, _ in found} - EVERYWHERE)


def borrowings(package):
    """Those that are not for a part to borrow; a relative import's library is the empty name."""
    return [
        (path.as_posix(), z) for path, z in borrowed(package) if part_of(path) not in LIBRARIES.get(z, ())
    ]


def mentions(package, words):
    """(file, name) where a name that is imported or read has these words in it."""
    for path, found in files(package, uses):
        names = (".".join(pair) for pair in found)
        yield from ((path.as_posix(), name) for name in names if f".{words}." in f".{name}.")


RULES = {
    "layers": crossings,
    "optimizers": crossings_of_optimizers,
    "libraries": borrowings,
    "private parts of Optax": lambda package: mentions(package, "optax._src"),
    "decompositions": lambda package: [z for z in mentions(package, "linalg") if z[0] != "solve.py"],
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_every_module_keeps_to(rule):
    assert sorted(rule(PACKAGE)) == []


WRONG = [
    ("layers", "matrix.py", "from oplora_jax import solve", "solve"),
    ("layers", "norms.py", "import oplora_jax.svd", "svd"),
    ("layers", "optimizers/new.py", "def f():\n  from oplora_jax.adapters.init import init_lora", "adapters"),
    ("layers", "adapters/pairs.py", "from oplora_jax.optimizers import oplora", "optimizers"),
    ("layers", "nnx/layers.py", "from oplora_jax import LowRank", "oplora_jax"),
    ("layers", "svd.py", "import oplora_jax", "oplora_jax"),
    ("optimizers", "optimizers/new.py", "from oplora_jax.optimizers.mofasgd import _start", "mofasgd"),
    ("optimizers", "optimizers/_lift.py", "from oplora_jax.optimizers import _factors", "_factors"),
    ("optimizers", "optimizers/new.py", "import oplora_jax\nimport oplora_jax.optimizers.oplora", "oplora"),
    ("libraries", "adapters/merge.py", "from flax import nnx", "flax"),
    ("libraries", "lorsum.py", "import optax", "optax"),
    ("private parts of Optax", "optimizers/new.py", "from optax._src import base", "optax._src.base"),
    ("decompositions", "svd.py", "import jax.numpy as jnp\nq = jnp.linalg.qr", "jnp.linalg"),
    ("decompositions", "svd.py", "from jax.scipy.linalg import solve", "jax.scipy.linalg.solve"),
    ("decompositions", "svd.py", "from jax.lax import linalg", "jax.lax.linalg"),
    ("libraries", "gradients/tap.py", "import numpy, torch.nn", "torch"),
    ("libraries", "svd.py", "from .solve import svd", ""),
]


@pytest.mark.parametrize("rule, path, source, found", WRONG)
def test_what_breaks_a_rule_is_found(tmp_path, rule, path, source, found):
    (tmp_path / "optimizers").mkdir()
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).write_text(source)
    name = path.removeprefix("optimizers/") if rule == "optimizers" else path
    assert (name, found) in set(RULES[rule](tmp_path))


def test_the_picture_is_of_what_is_there():
    there = {path.name.removesuffix(".py") for path in PACKAGE.glob("[!.]*") if path.name != "py.typed"}
    assert there - {"__init__", "__pycache__"} == set(heights(LAYERS))
    private = {path.stem for path in (PACKAGE / "optimizers").glob("_[!_]*.py")}
    assert private | {"each optimizer", "in_backward"} == set(heights(OPTIMIZERS))


def test_no_library_is_named_in_vain():
    assert {(z, part) for z, parts in LIBRARIES.items() for part in parts} <= {
        (z, part_of(path)) for path, z in borrowed(PACKAGE)
    }


def test_the_guide_for_contributors_shows_the_picture():
    for picture in (LAYERS, OPTIMIZERS):
        assert f"```text\n{picture}```\n" in GUIDE.read_text()
