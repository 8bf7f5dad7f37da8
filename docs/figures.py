"""Draws the site's figures, those of results from experiments/RESULTS.md: `python docs/figures.py`."""

import re
from pathlib import Path

import jax
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

from oplora_jax import LowRank, frobenius_norm, lorsum, svd, to_dense

DOCS = Path(__file__).parent
RESULTS = (DOCS.parent / "experiments" / "RESULTS.md").read_text()
BLUE, GREY = "#3f51b5", "#757575"
NAMES = {
    "scaled_oplora": "scaled OPLoRA",
    "lora_adamw": "LoRA, AdamW",
    "oplora": "OPLoRA",
    "scaled_adamw": "preconditioned AdamW",
    "lora_plus": "LoRA+",
    "altlora_plus": "AltLoRA+",
    "psi_lora": "scaled OPLoRA, the paper's",
    "full_adamw": "full AdamW",
}
# SmolLM2-135M: the kernels of a layer, (in, out), and how often each is there; 30 layers.
KERNELS = {(576, 576): 2, (576, 192): 2, (576, 1536): 2, (1536, 576): 1}


def rows(heading):
    """The table whose first cell is `heading`, as lists of cells."""
    table, *_ = re.findall(rf"^\| {re.escape(heading)} \|.*(?:\n\|.*)*", RESULTS, flags=re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def megabytes(state, r=8):
    """Of the state column, in float32: a multiple of LoRA's numbers, or of the kernels' ("n m")."""
    lora = sum(count * r * (n + m) for (n, m), count in KERNELS.items())
    full = sum(count * n * m for (n, m), count in KERNELS.items())
    numbers = 2 * full if "n m" in state else lora * (1 + 1 / r if "/ r" in state else float(state))
    return 30 * 4 * numbers / 1e6


def losses_by_method(ax):
    """Test loss of the language model at rank 8, at each method's best rate; median, range of three seeds."""
    found = [
        (*re.findall(r"\d\.\d+", cell), name.strip("`"), state) for name, _, cell, *_, state in rows("method")
    ]
    found = [(*map(float, row[:3]), *row[3:]) for row in sorted(found) if len(row) == 5]
    for y, (median, least, largest, name, state) in enumerate(found):
        color = BLUE if name == "scaled_oplora" else GREY
        ax.plot([least, largest], [y, y], color=color)
        ax.plot(median, y, "o", color=color)
        ax.text(3.75, y, f"{megabytes(state):.0f} MB", ha="right", va="center", color=color, clip_on=False)
    ax.set(xlim=(3.44, 3.71), xlabel="test loss")
    ax.set_yticks(range(len(found)), [NAMES[name] for *_, name, _ in found])
    ax.invert_yaxis()
    ax.set_title("rank 8: loss, and the optimizer's state in MB", fontsize=10)


def losses_by_rate(ax):
    """Validation loss of scaled OPLoRA by learning rate, 256 tokens a step, at three ranks."""
    heading, _, *table = rows("tokens a step | rank | 1e-5")
    rates = [float(z) for z in heading[2:]]
    for (tokens, rank, *cells), shade in zip(table[:3], (0.4, 0.7, 1.0), strict=True):
        assert tokens == "256"
        values = [float(z) for z in cells]
        ax.plot(rates, values, "o-", color=BLUE, alpha=shade, label=f"rank {rank}", markersize=4)
    ax.set(xscale="log", xlabel="learning rate", ylabel="validation loss", ylim=(3.48, 3.62))
    ax.set_title("scaled OPLoRA: one rate for all ranks", fontsize=10)
    ax.legend(frameon=False, fontsize=9)


def results():
    """What a user gains: the loss at a state, and a learning rate that stays."""
    fig, axes = plt.subplots(1, 2, figsize=(9.5, 3.4), layout="constrained")
    fig.suptitle("SmolLM2-135M, fine-tuned on WikiText-2 with LoRA", fontsize=11)
    losses_by_method(axes[0])
    losses_by_rate(axes[1])
    return fig


def box(ax, x, y, width, height, text, color, hatch=None, size=13):
    """A matrix."""
    ax.add_patch(
        Rectangle((x, y), width, height, facecolor=color, edgecolor="black", linewidth=0.8, hatch=hatch)
    )
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def half_step(ax, solved):
    """One of the two solves: the target's outline, the factor that is kept, the one that is solved for."""
    solved_color, kept = "#c5cae9", "#eeeeee"
    ax.add_patch(Rectangle((1.4, 0), 4, 3, fill=False, linestyle="--", edgecolor=GREY))
    target = "$S = P - \\eta\\, G$\n$n \\times m$, never formed"
    ax.text(3.4, 1.5, target, ha="center", va="center", color=GREY, fontsize=10)
    box(ax, 0.4, 0, 0.7, 3, "$a$", solved_color if solved == "a" else kept)
    box(ax, 1.4, 3.3, 4, 0.7, "$b$", solved_color if solved == "b" else kept)
    formula = {
        "a": "$a \\leftarrow S\\,b^\\top\\,(b\\,b^\\top)^{-1}$",
        "b": "$b \\leftarrow (a^\\top a)^{-1}\\,a^\\top S$",
    }[solved]
    ax.text(2.9, -0.45, formula, ha="center", va="center", fontsize=12)
    ax.set_title({"a": "1. hold b, solve for a", "b": "2. hold a, solve for b"}[solved], fontsize=11)
    ax.set(xlim=(0.2, 5.6), ylim=(-0.9, 4.1), aspect="equal")
    ax.axis("off")


def excess(size, counts, shape=(96, 64), rank=8):
    """How much farther from P - G LoRSum's result is than the best matrix of rank r, for |G| = size |P|."""
    keys = jax.random.split(jax.random.key(0), 3)
    a, b = jax.random.normal(keys[0], (shape[0], rank)), jax.random.normal(keys[1], (rank, shape[1]))
    weights, gradient = LowRank(a, b), jax.random.normal(keys[2], shape)
    gradient *= size * frobenius_norm(weights) / frobenius_norm(gradient)
    target = to_dense(weights) - gradient
    distance = lambda p: frobenius_norm(target - to_dense(p))
    best = distance(svd([(1.0, target)], rank=rank))
    step = lambda k: lorsum([(1.0, weights), (-1.0, gradient)], num_iters=k)
    return [float(distance(step(k)) / best - 1) for k in counts]


def errors(ax):
    """A step of a random gradient from random weights of rank 8, by its size and K."""
    counts = range(1, 5)
    for size, shade in zip((0.3, 0.1, 0.03), (1.0, 0.7, 0.4), strict=True):
        values = [100 * z for z in excess(size, counts)]
        ax.plot(counts, values, "o-", color=BLUE, alpha=shade, label=f"{100 * size:g} % of P's", markersize=4)
    ax.set(yscale="log", xlabel="alternating steps, K", ylabel="excess error over an SVD, %")
    ax.set(xticks=counts, ylim=(1e-8, 1))
    ax.set_title("how close K alternating steps come", fontsize=11)
    ax.legend(title="length of the step", frameon=False, fontsize=9)


def lorsum_steps():
    """The two solves, and how close they come."""
    fig, axes = plt.subplots(1, 3, figsize=(9.5, 3), width_ratios=(1.1, 1.1, 1), layout="constrained")
    half_step(axes[0], "a")
    half_step(axes[1], "b")
    errors(axes[2])
    return fig


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    plt.rcParams.update({"svg.hashsalt": "oplora-jax", "axes.spines.top": False, "axes.spines.right": False})
    for name, draw in {"results": results, "lorsum": lorsum_steps}.items():
        draw().savefig(DOCS / "figures" / f"{name}.svg", metadata={"Date": None})
