"""`python -m benchmarks matrix`: LoRSum of one matrix against truncated singular value decompositions."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from benchmarks import approximations, powers
from benchmarks.counts import count
from benchmarks.report import machine, write_settings
from benchmarks.steps import at_least
from experiments import ExperimentError, storage
from experiments.hooks import progress
from oplora_jax import LowRank, lorsum, svd
from oplora_jax.matrix import Terms

SLOW = 5.0  # seconds of a first run, from which on it is the only one
METHODS = ("lorsum", "randomized_svd", "thin_svd", "svd")  # in the order of their colors


@dataclasses.dataclass(frozen=True)
class Matrix:
    """LoRSum of one d x d matrix against truncated SVDs of the same sum.

    The sum is an optimizer's, P - lr G, with G an outer product of tokens or a product of factors of rank
    4 r, and singular values 1 / i. LoRSum takes one iteration from P, which is a step behind. The SVDs are
    that of the formed matrix, an exact one from the QR of the stacked factors ("thin"), and a randomized one
    from products of the sum with thin matrices.
    """

    sizes: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    """d, rows and columns."""
    ranks: tuple[int, ...] = (4, 8, 16, 32, 64, 128)
    """r, of the approximation."""
    tokens: int = 512
    """Of the outer product."""
    largest_svd: int = 4096
    """d above which the SVD of the formed matrix, which takes minutes, is left out."""
    repeats: int = 5
    """Measured runs of each, in turn."""
    output: Path = Path("outputs/benchmark")
    """Folder for matrix.csv, matrix_exponents.csv and matrix.png."""

    def run(self, console: Console) -> None:
        """Measures, prints the tables, and writes them and a figure."""
        _check(self)
        write_settings(self, "matrix")
        rows: list[dict[str, Any]] = []
        begin = progress(len(self.sizes) * len(self.ranks))
        for row in measure(self, begin):
            rows.append(row)
            storage.write_rows(self.output / "matrix.csv", rows)
        console.print(table(rows))
        written = ["matrix.csv", "matrix.png", "matrix.json"]
        if fits := exponents(rows):
            console.print(exponents_table(fits))
            written.append("matrix_exponents.csv")
            storage.write_rows(self.output / written[-1], fits)
        draw(rows, self.output / "matrix.png")
        console.print(f"in {self.output}: {', '.join(written)}", soft_wrap=True)


def _check(command: Matrix) -> None:
    least, largest = min(command.sizes, default=0), max(command.ranks, default=0)
    if not command.sizes or not command.ranks:
        raise ExperimentError("no sizes or no ranks to measure; give at least one of each")
    at_least(1, ranks=min(command.ranks), repeats=command.repeats)
    if least < largest:
        raise ExperimentError(f"sizes has {least} and ranks {largest}; expected sizes of the ranks or more")
    if command.tokens < 2 * largest:
        raise ExperimentError(
            f"tokens is {command.tokens}; expected at least twice the largest rank, {2 * largest}, so that "
            "the sum has that rank"
        )


class Case(NamedTuple):
    """One way to approximate one sum."""

    method: str
    terms: str  # "outer" or "low_rank"
    function: Callable[[Terms], LowRank]
    sum: Terms


def measure(command: Matrix, begin: Callable[[str], Callable[[int, int, dict], None]]) -> Iterator[dict]:
    """One row for each size, rank, kind of terms and method, in this order.

    The SVD of the formed matrix costs the same at every rank and with all terms: it is taken once a size, at
    the largest rank.
    """
    largest = max(command.ranks)
    for size in sorted(set(command.sizes)):
        bases = approximations.draw_bases(size, max(command.tokens, 3 * largest), largest)
        for rank in sorted(set(command.ranks)):
            notify = begin(f"size {size} rank {rank}")
            cases = list(_cases(command, bases, rank))
            programs = []
            for done, case in enumerate(cases):
                notify(done, len(cases) + 1, {})
                programs.append(count(lambda terms, case=case: case.function(terms), case.sum))
            runs = [partial(compiled, case.sum) for (_, compiled), case in zip(programs, cases, strict=True)]
            times = _seconds(runs, command.repeats)
            for case, (counts, _), run, seconds in zip(cases, programs, runs, times, strict=True):
                yield _row(size, rank, case.method, case.terms) | {
                    "milliseconds": 1e3 * float(np.median(seconds)),
                    "milliseconds_least": 1e3 * min(seconds),
                    "milliseconds_largest": 1e3 * max(seconds),
                    "flops": counts.flops,
                    "decomposition_flops": counts.decomposition_flops,
                    "captured_before": approximations.captured_energy(case.sum, case.sum[0][1]),
                    "captured": approximations.captured_energy(case.sum, run()),
                }
            if rank == largest and size > command.largest_svd:
                note = f"left out: larger than --largest-svd {command.largest_svd}"
                yield _row(size, rank, "svd", "outer") | {"note": note}
            notify(1, 1, {})


def _cases(command: Matrix, bases: approximations.Bases, rank: int) -> Iterator[Case]:
    size = len(bases.left)
    step = partial(lorsum, num_iters=1, regularization=1e-3 * approximations.RATE)  # as `oplora` takes it
    for kind, inner in (("outer", command.tokens), ("low_rank", 4 * rank)):
        terms = approximations.make_terms(bases, kind, rank, inner)
        yield Case("lorsum", kind, step, terms)
        yield Case("randomized_svd", kind, partial(approximations.randomized_svd, rank=rank), terms)
        if inner + rank < size:  # otherwise it is that of the formed matrix
            yield Case("thin_svd", kind, partial(svd, rank=rank), terms)
        if kind == "outer" and rank == max(command.ranks) and size <= command.largest_svd:
            yield Case("svd", kind, partial(approximations.formed_svd, rank=rank), terms)


def _seconds(runs: list[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """The seconds of each, measured in turn after a warm-up; those of the warm-up where it is slow."""

    def seconds(run):
        began = time.perf_counter()
        jax.block_until_ready(run())
        return time.perf_counter() - began

    found = [[seconds(run)] for run in runs]
    quick = [i for i, [first] in enumerate(found) if first < SLOW]
    for _ in range(repeats):
        for i in quick:
            found[i].append(seconds(runs[i]))
    return [times[1:] or times for times in found]


def _row(size: int, rank: int, method: str, terms: str) -> dict[str, Any]:
    row = {"size": size, "rank": rank, "method": method, "terms": terms}
    return row | dict.fromkeys(
        (
            *("milliseconds", "milliseconds_least", "milliseconds_largest"),
            *("flops", "decomposition_flops", "captured_before", "captured", "note"),
        )
    )


def exponents(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The exponents of d in time and in operations, for each method, kind of terms and rank."""
    found = []
    for method, terms, rank in dict.fromkeys((row["method"], row["terms"], row["rank"]) for row in rows):
        same = _measured(rows, method=method, terms=terms, rank=rank)
        if len(same) > 1:
            sizes = [row["size"] for row in same]
            row = {"method": method, "terms": terms, "rank": rank}
            row["time_exponent"] = powers.exponent(sizes, [z["milliseconds"] for z in same])
            row["flops_exponent"] = powers.exponent(sizes, [_operations(z) for z in same])
            found.append(row | {"least_size": min(sizes), "largest_size": max(sizes)})
    return found


def _measured(rows: list[dict[str, Any]], **values: Any) -> list[dict[str, Any]]:
    """The rows with these values that were not left out."""
    return [row for row in rows if row["note"] is None and all(row[k] == v for k, v in values.items())]


def _operations(row: dict[str, Any]) -> float:
    return row["flops"] + row["decomposition_flops"]


def table(rows: list[dict[str, Any]]) -> Table:
    """All rows, for the screen."""
    shown = Table(
        title=f"a sum of matrices, approximated; {machine()}", title_justify="left", box=SIMPLE_HEAD
    )
    names = ("size", "rank", "method", "terms", "ms (least, largest)", "Mflop", "and decompositions")
    for name in (*names, "captured", "and before"):
        shown.add_column(name, justify="left" if name in ("method", "terms") else "right")
    for row in rows:
        cells = [row["note"]]
        if row["note"] is None:
            times = (row[f"milliseconds{part}"] for part in ("", "_least", "_largest"))
            cells = ["{:.3g} ({:.3g}, {:.3g})".format(*times)]
            cells += [f"{row[name] / 1e6:.4g}" for name in ("flops", "decomposition_flops")]
            cells += [f"{row[name]:.6f}" for name in ("captured", "captured_before")]
        shown.add_row(*(str(row[name]) for name in ("size", "rank", "method", "terms")), *cells)
    return shown


def exponents_table(fits: list[dict[str, Any]]) -> Table:
    """The exponents, for the screen."""
    shown = Table(title="exponents of d", title_justify="left", box=SIMPLE_HEAD)
    for name in ("method", "terms", "rank", "of time", "of operations", "sizes"):
        shown.add_column(name)
    for fit in fits:
        cells = [f"{fit[name]:.2f}" for name in ("time_exponent", "flops_exponent")]
        sizes = f"{fit['least_size']} to {fit['largest_size']}"
        shown.add_row(fit["method"], fit["terms"], str(fit["rank"]), *cells, sizes)
    return shown


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws time, operations and the energy that is missed: against d at one rank, and against r at one d.

    That d is the largest with an SVD of the formed matrix, if there is one.
    """
    ranks, sizes = (sorted({row[name] for row in rows}) for name in ("rank", "size"))
    rank = ranks[len(ranks) // 2]
    size = max((row["size"] for row in _measured(rows, method="svd")), default=sizes[-1])
    panels = []
    for x, fixed in (("size", {"rank": rank}), ("rank", {"size": size})):
        [(name, value)] = fixed.items()
        chosen = _measured(rows, **fixed)
        if x == "size":  # of any rank
            chosen += [row for row in _measured(rows, method="svd") if row not in chosen]
        for title, quantity, shown in (
            ("milliseconds", lambda row: row["milliseconds"], METHODS),
            ("operations, 10^9", lambda row: _operations(row) / 1e9, METHODS),
            ("energy missed", lambda row: max(1e-8, 1 - row["captured"]), METHODS[:2]),  # the others none
        ):
            lines = _lines(chosen, x, quantity, shown)
            panels.append(powers.Panel(x, f"{title}, {name} {value}", lines, fitted=shown is METHODS))
    powers.draw(panels, 3, path)


def _lines(rows, x, quantity, methods):
    for_each = [(method, terms) for method in methods for terms in ("outer", "low_rank")]
    lines = []
    for method, terms in for_each:
        same = _measured(rows, method=method, terms=terms)
        if same:
            label = method if method == "svd" else f"{method}, {terms.replace('_', ' ')}"
            at, y = zip(*((row[x], quantity(row)) for row in same), strict=True)
            lines.append(powers.Line(label, at, y, METHODS.index(method), dashed=terms == "low_rank"))
    return lines
