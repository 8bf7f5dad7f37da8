"""What is read of runs' folders, and told in tables."""

import json

import numpy as np
import pandas as pd
import pytest

from experiments import ExperimentError, methods, report, storage


def runs(metric, finals):
    """A table with two epochs of runs: finals has values by (method, learning rate, seed)."""
    rows = []
    for (name, rate, seed), value in finals.items():
        fields = {"setting": "", "method": name, "learning_rate": rate, "seed": seed}
        fields |= {
            "seconds_per_step": 0.25,
            "peak_memory_mib": 3.0 + seed,
            "lora_state_kib": 2.0,
            "optimizer_state_kib": 2.5,
        }
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
    assert summary.iloc[0, 3:].to_list() == [3, 2.0, 1.0, 4.0, 250.0, 5.0, 2.0, 2.5]
    assert summary["x_loss_median"].to_list()[:2] == [2.0, 5.0]
    # A seed that fails is not left out.
    assert summary.filter(like="x_loss").iloc[2].isna().all()
    lines = report.markdown(summary, ["x_loss"]).splitlines()
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert cells == ["b", "0.1", "3", "2 (1, 4)", "250.00", "5", "2.0"]
    assert "| 5 " in lines[3] and "nan (nan, nan)" in lines[4]
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("metric", "sign"), [("x_loss", 1), ("x_accuracy", -1)])
def test_best_learning_rate(metric, sign, reverse):
    values = {0.1: (3, 4, 5), 0.2: (1, 2, 9), 0.3: (np.nan, np.nan, np.nan), 0.4: (0, np.nan, 0)}
    finals = {("svdlora", rate, i): sign * z for rate, seeds in values.items() for i, z in enumerate(seeds)}
    table = runs(metric, dict(reversed(finals.items())) if reverse else finals)
    assert set(report.best(table, metric)["learning_rate"]) == {0.2}


def test_best_learning_rate_of_the_seeds_that_all_rates_have():
    """Two more seeds at one rate, worse ones, do not make it lose against the luck of one seed."""
    finals = {("a", 0.1, 0): 2.0, ("a", 0.2, 0): 1.0, ("a", 0.2, 1): 3.0, ("a", 0.2, 2): 3.0}
    table = runs("x_loss", finals)
    assert set(report.best(table, "x_loss")["learning_rate"]) == {0.2}
    assert len(report.best(table, "x_loss")) == 6
    # Where there is none, all count.
    finals = {("a", 0.1, 0): 2.0, ("a", 0.2, 1): 3.0, ("b", 0.1, 0): 5.0}
    chosen = report.best(runs("x_loss", finals), "x_loss")
    assert set(zip(chosen["method"], chosen["learning_rate"], strict=True)) == {("a", 0.1), ("b", 0.1)}


def test_best_learning_rate_of_each_setting():
    tables = [
        runs("x_loss", {("a", rate, 0): abs(rate - best) for rate in (1.0, 2.0, 3.0)}).assign(setting=name)
        for name, best in (("rank 2", 3.0), ("rank 8", 1.0))
    ]
    chosen = report.best(pd.concat(tables), "x_loss")
    assert dict(zip(chosen["setting"], chosen["learning_rate"], strict=True)) == {
        "rank 2": 3.0,
        "rank 8": 1.0,
    }


def write_run(folder, final, evaluations=4, name="oplora", rate=0.1, seed=0, settings=None, **task):
    """A run's two files."""
    folder.mkdir(parents=True)
    settings = methods.method(name).settings | (settings or {})
    config = {"task": "lm", "method": name, "settings": settings, "learning_rate": rate, "seed": seed}
    (folder / "config.json").write_text(json.dumps(config | task))
    rows = []
    for i in range(1, evaluations + 1):
        row = {"epoch": i / 4, "train_loss": 9.0, "validation_loss": final, "validation_perplexity": 8.0}
        row |= {"seconds_per_step": 0.1, "peak_memory_mib": 1, "lora_state_kib": 4 if name == "oplora" else 8}
        rows.append(row | {"optimizer_state_kib": 9})
    if evaluations == 4:
        rows[-1] |= {"test_loss": final + 0.5, "test_perplexity": 8.0}
    storage.write_rows(folder / "metrics.csv", rows)


def test_read(tmp_path):
    """Settings are the fields in which runs differ, in the order of their numbers; methods name changes."""
    for i, rank in enumerate((32, 8, 2)):
        write_run(tmp_path / "a" / str(i), 3.0 + i, rank=rank, length=128, weights="x")
    write_run(tmp_path / "b" / "3", 2.0, settings={"num_iters": 2}, rank=8, length=128, weights="x")
    (tmp_path / "b" / "begun").mkdir()
    (tmp_path / "b" / "begun" / "config.json").write_text("{}")
    [(task, table)] = report.read([tmp_path / "a", tmp_path / "b"]).items()
    assert task == "lm"
    assert list(table["setting"].unique()) == ["rank 2", "rank 8", "rank 32"]
    assert set(table.loc[table["validation_loss"] == 2.0, "method"]) == {"oplora(num_iters=2)"}
    assert table.groupby("setting")["validation_loss"].min().to_dict() == {
        "rank 2": 5.0,
        "rank 8": 2.0,
        "rank 32": 3.0,
    }
    assert report.main_metric(table, "validation") == "validation_loss"
    assert report.main_metric(table, "test") == "test_loss"
    scores = pd.DataFrame(columns=["train_loss", "test_loss", "test_accuracy", "test_f1"])
    assert report.main_metric(scores, "test") == "test_accuracy"
    exact = pd.DataFrame(columns=["epoch", "train_loss", "excess_loss"])
    assert report.main_metric(exact, "test") == report.main_metric(exact, "validation") == "excess_loss"


def test_what_is_not_read(tmp_path):
    with pytest.raises(ExperimentError, match="no run in"):
        report.read([tmp_path])
    write_run(tmp_path / "a", 3.0)
    assert len(report.read([tmp_path, tmp_path / "a"])["lm"]) == 4  # a folder twice is no run twice
    write_run(tmp_path / "b", 3.1)
    with pytest.raises(ExperimentError, match=r"b and .*a are the same run; expected each once"):
        report.read([tmp_path])
    write_run(tmp_path / "c", 3.0, settings={"gone": 1})
    with pytest.raises(ExperimentError, match=r"c.config.json: oplora has no setting 'gone'"):
        report.read([tmp_path / "c"])


def test_report_of_ranks(tmp_path, capsys):
    """Rates are chosen on validation data, each task's best is bold, and an unfinished run is left out."""
    for rank in (2, 8):
        for rate, loss in ((0.1, 3.5), (0.3, 3.4), (1.0, np.nan)):
            write_run(tmp_path / f"o{rank}{rate}", loss + rank / 100, rate=rate, rank=rank)
        for seed in (0, 1):
            name = tmp_path / f"l{rank}{seed}"
            write_run(name, 3.45 + seed / 100, name="lora_adamw", rate=1e-3, seed=seed, rank=rank)
    write_run(tmp_path / "unfinished", 1.0, evaluations=3, rate=0.01, rank=8)
    report.write([tmp_path], tmp_path / "report")
    printed = capsys.readouterr()
    assert "not finished" in printed.err and "0.01" in printed.err
    lines = [[z.strip() for z in line.strip("|").split("|")] for line in printed.out.splitlines()]
    tasks = ["lm, rank 2: test loss", "lm, rank 8: test loss"]
    top = lines.index(["method", *tasks, "state / lora_adamw's", "time / lora_adamw's"])
    assert lines[top + 2] == ["`lora_adamw`", "3.955 (3.95, 3.96)", "**3.955 (3.95, 3.96)**", "1", "1"]
    assert lines[top + 3] == ["`oplora`", "**3.92**", "3.98", "0.5", "1"]
    assert ["`oplora`", "0.3", "1", "**3.92**", "100.00", "1", "4.0"] in lines
    table = pd.read_csv(tmp_path / "report" / "overview.csv")
    assert table["learning_rate"].to_list() == [0.3, 1e-3, 1e-3, 0.3]
    assert table["seeds"].to_list() == [1, 2, 2, 1]
    assert {z.name for z in (tmp_path / "report").iterdir()} == {
        "overview.csv",
        "lm_curves.png",
        "lm_sweep.png",
    }


def test_report_of_what_is_not_finished(tmp_path, capsys):
    """A setting that no run has finished is left out; where nothing is, that is said."""
    write_run(tmp_path / "a", 3.0, evaluations=3, rank=2)
    with pytest.raises(ExperimentError, match="no run is finished in"):
        report.write([tmp_path], tmp_path / "report")
    write_run(tmp_path / "b", 3.0, rank=8)
    report.write([tmp_path], tmp_path / "report")
    printed = capsys.readouterr()
    assert "rank 8" in printed.out and "rank 2" not in printed.out and "rank 2" in printed.err


def test_report_of_many_settings(tmp_path, monkeypatch):
    """Where neither methods nor settings are few enough for colours, each setting has its figures."""
    drawn = []
    write = lambda figure, path: drawn.append((path.name, figure.get_supylabel()))
    monkeypatch.setattr("experiments.figures.write_figure", write)
    for i, name in enumerate(list(methods.PRESETS)[:7]):
        for rank in range(7):
            write_run(tmp_path / f"{i}{rank}", 1.0 + i, name=name, rank=rank)
    report.write([tmp_path], tmp_path / "report")
    expected = [f"lm_rank_{rank}_{kind}.png" for rank in range(7) for kind in ("sweep", "curves")]
    assert drawn == [(name, "validation loss") for name in expected]
