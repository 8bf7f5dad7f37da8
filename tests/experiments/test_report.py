"""What is gathered of runs, and drawn."""

import itertools

import numpy as np
import pandas as pd
import pytest
import seaborn as sns

from experiments import report


def runs(metric, finals):
    """A table with two epochs of runs: finals has values by (method, learning rate, seed)."""
    rows = []
    for (name, rate, seed), value in finals.items():
        fields = {"method": name, "learning_rate": rate, "seed": seed, "seconds_per_step": 0.25}
        fields |= {"peak_memory_mib": 3.0 + seed, "lora_state_kib": 2.0, "optimizer_state_kib": 2.5}
        rows += [fields | {"epoch": epoch, metric: value * (3 - epoch)} for epoch in (1.0, 2.0)]
    return pd.DataFrame(rows)


def test_summary():
    table = runs(
        "x_loss",
        {
            ("b", 0.1, 0): 4.0,
            ("b", 0.1, 1): 1.0,
            ("b", 0.1, 2): 2.0,
            ("a", 0.1, 0): 5.0,
            ("a", 0.2, 0): np.nan,
            ("a", 0.2, 1): 1.0,
        },
    )
    summary = report.summary(table, ["x_loss"])
    assert summary[["method", "learning_rate"]].to_numpy().tolist() == [["b", 0.1], ["a", 0.1], ["a", 0.2]]
    assert summary.iloc[0, 2:].to_list() == [2.0, 1.0, 4.0, 250.0, 5.0, 2.0, 2.5]
    assert summary["x_loss_median"].to_list()[:2] == [2.0, 5.0]
    # A seed that fails is not left out.
    assert summary.filter(like="x_loss").iloc[2].isna().all()
    lines = report.markdown(summary, ["x_loss"]).splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["b", "0.1", "2 (1, 4)", "250.00", "5", "2.0"]
    assert "| 5 " in lines[3] and "nan (nan, nan)" in lines[4]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("metric", "sign"), [("x_loss", 1), ("x_accuracy", -1)])
def test_best_learning_rate(metric, sign, reverse):
    values = {0.1: (3, 4, 5), 0.2: (1, 2, 9), 0.3: (np.nan, np.nan, np.nan), 0.4: (0, np.nan, 0)}
    finals = {("svdlora", rate, i): sign * z for rate, seeds in values.items() for i, z in enumerate(seeds)}
    table = runs(metric, dict(reversed(finals.items())) if reverse else finals)
    assert set(report.best(table, metric)["learning_rate"]) == {0.2}


def test_heat_map(tmp_path, monkeypatch):
    """Dampings down, powers across, in panels of structure and K; at the better learning rate."""
    drawn = []
    heatmap = sns.heatmap
    monkeypatch.setattr(
        sns, "heatmap", lambda table, **options: drawn.append(table) or heatmap(table, **options)
    )
    grid = {
        "structure": ["diagonal", "dense"],
        "num_iters": [1, 2],
        "damping": [1e-6, 0.1],
        "power": [0.25, 0.5],
    }
    values = np.append(np.linspace(0.2, 0.9, 15), np.nan)  # the last run failed
    tables = []
    for value, setting in zip(values, itertools.product(*grid.values()), strict=True):
        finals = {(str(setting), 0.1, 0): 1 - value, (str(setting), 0.2, 0): 0.05}
        tables.append(runs("x_accuracy", finals).assign(**dict(zip(grid, setting, strict=True))))
    report.draw_heat_map(
        report.best(pd.concat(tables), "x_accuracy"), list(grid), "x_accuracy", tmp_path / "map.png"
    )
    found = {tuple(table.stack().round(6)) for table in drawn}
    expected = np.append(np.reshape(values, (4, 4))[:3].ravel(), [*values[12:15], 0.95]).reshape(4, 4)
    assert found == {tuple(row) for row in expected.round(6).tolist()}
    assert (tmp_path / "map.png").exists()


def test_what_is_drawn(tmp_path):
    """Medians of all seeds or none, and nothing beyond the axes."""
    finals = {
        ("a", 0.1, 0): 1.0,
        ("a", 0.1, 1): 3.0,
        ("b", 0.1, 0): np.nan,
        ("b", 0.1, 1): 1.0,
        ("c", 0.1, 0): 1e9,
        ("full", 0.1, 0): -5.0,
    }
    grid = report._lines(runs("x_loss", finals), "epoch", ["x_loss"])
    [axis] = grid.axes.flat
    lines = [line.get_ydata().tolist() for line in axis.get_lines() if len(line.get_ydata())]
    assert lines == [[4.0, 2.0], [1e5, 1e5]]
    assert axis.get_yscale() == "log" and axis.get_title() == "x loss"
