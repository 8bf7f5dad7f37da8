"""What there is to know of each optimizer before one is chosen: `python -m experiments optimizers`.

What it works from, its paper and which split into factors matters to it are declared where the optimizer is;
what it keeps and costs is counted here.
"""

import re
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax

from benchmarks.counts import operations
from experiments import ExperimentError
from oplora_jax import LowRank, OuterProduct
from oplora_jax.optimizers import OPTIMIZERS as OURS
from oplora_jax.optimizers._facts import Facts

# Optax's own, of the factors, that the tables hold the others against.
OPTIMIZERS = {
    "optax.sgd": Facts(partial(optax.sgd, momentum=0.9), "factors", "2106.09685", "orthogonal", {}),
    "optax.adamw": Facts(partial(optax.adamw, weight_decay=0.0), "factors", "2106.09685", "none", {}),
    **OURS,
}

# Of the table's LoRA parameter, (n, m) and r, and of the tokens N.
N, M, RANK, TOKENS = 768, 768, 8, 4096

_GRADIENTS = {"factors": "factors", "exact": "exact", "moments": "exact, with moments"}
_INVARIANT = {"any": "any R", "orthogonal": "orthogonal R", "none": "none"}


def state_size(name: str, n: int, m: int, rank: int) -> int:
    """The numbers in an optimizer's state of one LoRA parameter, counters aside."""
    state = jax.eval_shape(OPTIMIZERS[name].factory(0.1).init, _low_rank(n, m, rank))
    return sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)


@cache
def update_operations(name: str, n: int, m: int, rank: int, tokens: int) -> float:
    """The operations of an optimizer's update of one LoRA parameter, of its compiled program.

    Its gradient is that of the factors if that is what the optimizer works from, and else an `OuterProduct`.
    """
    facts, param = OPTIMIZERS[name], _low_rank(n, m, rank)
    tx = facts.factory(0.1)
    state = jax.eval_shape(tx.init, param)
    if facts.gradient == "factors":
        return operations(tx.update, param, state, param)
    # Made where it is used, as in a training step: nothing has been done to it that would have to be checked.
    update = lambda x, dy, *rest: tx.update(OuterProduct(x, dy), *rest)
    return operations(update, _shape(tokens, n), _shape(tokens, m), state, param)


def _low_rank(n: int, m: int, rank: int) -> LowRank:
    return LowRank(_shape(n, rank), _shape(rank, m))


def _shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def markdown() -> str:
    """The table of all optimizers."""
    rows = [
        ("optimizer", "gradient", "state", "operations of a step", "unchanged under", "source"),
        ("---",) * 6,
    ]
    for name, facts in OPTIMIZERS.items():
        size = state_size(name, N, M, RANK) / (RANK * (N + M))
        cost = update_operations(name, N, M, RANK, TOKENS) / (2 * TOKENS * N * M)
        invariant = _INVARIANT[facts.invariant]
        if facts.invariant_with:
            settings = ", ".join(f"{key}={value!r}" for key, value in facts.invariant_with.items())
            invariant += f" (any R with `{settings}`)"
        paper = f"[{facts.source}](https://arxiv.org/abs/{facts.source})"
        cells = (f"`{name}`", _GRADIENTS[facts.gradient], f"{size:.3g}", _share(cost), invariant, paper)
        rows.append(cells)
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _share(cost: float) -> str:
    """Two digits; what is less than a thousandth is nothing beside the rest of a step."""
    return "< 0.001" if cost < 1e-3 else f"{cost:.2g}"


def write_into(path: Path) -> None:
    """Puts the table in the place of the one that is in a Markdown file.

    Raises:
      ExperimentError: there is none, or more than one.
      OSError: the file cannot be read or written.
    """
    text = path.read_text(encoding="utf-8")
    new, found = re.subn(r"^\| optimizer \|.*(?:\n\|.*)*", lambda _: markdown(), text, flags=re.MULTILINE)
    if found != 1:
        raise ExperimentError(f"{path} has {found} tables that begin with '| optimizer |'; expected one")
    path.write_text(new, encoding="utf-8")
