"""The command line, from arguments to files, and what it says about wrong ones."""

import csv
import itertools
import re

import numpy as np
import pytest
from matplotlib.axes import Axes

from experiments import report, storage
from experiments.__main__ import main
from experiments.catalogue import markdown
from experiments.conditioned import Conditioned
from experiments.linear import Linear
from experiments.storage import Config

LINEAR = ["linear", "--epochs", "2"]


@pytest.fixture
def panels(monkeypatch):
    """The tables that are drawn as heat maps."""
    tables, imshow = [], Axes.imshow
    record = lambda axis, table, **options: tables.append(table) or imshow(axis, table, **options)
    monkeypatch.setattr(Axes, "imshow", record)
    return tables


def test_run(tmp_path, capsys):
    arguments = ["run", *LINEAR, "--method", "oplora_1", "--output", str(tmp_path)]
    assert main(arguments) == 0
    [folder] = (tmp_path / "linear_stochastic" / "oplora_1").iterdir()
    assert folder.name.startswith("lr0.1_seed0_")
    printed = capsys.readouterr().out
    assert "epoch 2" in printed and str(folder) in printed
    assert main(arguments) == 0


def test_compare_writes_a_table_and_figures(tmp_path, capsys):
    rates = ["--learning-rates", "0.001", "0.002"]
    arguments = ["compare", *LINEAR, "--methods", "lora_sgd", "oplora_2", "--seeds", "0", "1", "2", *rates]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    with open(tmp_path / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names = [(row["method"], float(row["learning_rate"])) for row in rows]
    assert names == [(m, lr) for m in ("lora_sgd", "oplora_2") for lr in (0.001, 0.002)]
    configs = [Config(Linear(epochs=2), "oplora_2", 0.002, seed, tmp_path) for seed in range(3)]
    finals = [storage.read_metrics(config.folder)[-1]["excess_loss"] for config in configs]
    assert float(rows[3]["excess_loss_median"]) == np.median(finals)
    assert float(rows[3]["excess_loss_min"]) == min(finals)
    assert float(rows[3]["excess_loss_max"]) == max(finals)
    printed = capsys.readouterr().out
    assert f"{np.median(finals):.3g} ({min(finals):.3g}, {max(finals):.3g})" in printed
    for name in ("curves.png", "sweep.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_compare_around_each_methods_own_rate(tmp_path, capsys):
    factors = ["--rate-factors", "0.5", "1", "--output", str(tmp_path)]
    arguments = ["compare", *LINEAR, "--methods", "oplora_1", "lora_sgd", "--seeds", "0", *factors]
    assert main(arguments) == 0
    with open(tmp_path / "summary.csv", newline="") as file:
        rows = [(row["method"], float(row["learning_rate"])) for row in csv.DictReader(file)]
    assert rows == [("oplora_1", 0.05), ("oplora_1", 0.1), ("lora_sgd", 0.001), ("lora_sgd", 0.002)]
    assert (tmp_path / "sweep.png").exists()
    assert main([*arguments, "--learning-rates", "0.1"]) == 1
    assert "learning-rates and rate-factors are given; give one" in capsys.readouterr().err


def test_ablation_writes_a_table_and_a_heat_map(tmp_path, panels):
    arguments = ["ablate", "conditioned", "--epochs", "1", "--learning-rates", "0.001", "1e4"]
    grid = ["--damping", "1e-6", "0.1", "--power", "0.5", "--structure", "diagonal", "--num-iters", "1"]
    assert main([*arguments, *grid, "--output", str(tmp_path)]) == 0
    names = [f"scaled_oplora_1_damping{damping}_power0.5" for damping in ("1e-06", "0.1")]
    configs = [Config(Conditioned(epochs=1), name, 0.001, 0, tmp_path) for name in names]
    finals = [storage.read_metrics(config.folder)[-1]["relative_test_loss"] for config in configs]
    with open(tmp_path / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    names_and_rates = [(row["method"], float(row["learning_rate"])) for row in rows]
    assert names_and_rates == [(name, rate) for name in names for rate in (0.001, 1e4)]
    assert [float(row["relative_test_loss_median"]) for row in rows[::2]] == finals
    assert [table.tolist() for table in panels] == [[[finals[0]], [finals[1]]]]  # at the better rate
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_heat_map(tmp_path, panels):
    grid = list(itertools.product(("diagonal", "dense"), (1, 2), (1e-6, 0.1), (0.25, 0.5)))
    values = np.append(np.linspace(0.2, 0.9, 15), np.nan)  # the last run failed
    groups = [report.Group(str(i), 0.1, {"x_accuracy": np.array([[x]])}, 0) for i, x in enumerate(1 - values)]
    variants = {str(i): variant for i, variant in enumerate(grid)}
    report.draw_ablation(groups, variants, "x_accuracy", tmp_path / "map.png")
    # Structures down, K across; in a panel dampings down, powers across.
    np.testing.assert_allclose(np.stack(panels), np.reshape(values, (4, 2, 2)))
    assert (tmp_path / "map.png").exists()


def test_protocol_is_the_default(tmp_path):
    assert main(["compare", *LINEAR, "--methods", "lora_sgd", "--output", str(tmp_path)]) == 0
    folders = sorted((tmp_path / "linear_stochastic" / "lora_sgd").iterdir())
    assert [folder.name.rsplit("_", 1)[0] for folder in folders] == [f"lr0.002_seed{i}" for i in range(5)]
    assert not (tmp_path / "sweep.png").exists()


def test_best_learning_rate():
    group = lambda rate, *values: report.Group("svdlora", rate, {"x_loss": np.array(values)[:, None]}, 0)
    groups = [group(0.1, 3.0, 4.0, 5.0), group(0.2, 1.0, 2.0, 9.0), group(0.3, np.nan, np.nan, np.nan)]
    assert report.best(groups, "x_loss") == [groups[1]]
    assert report.best(groups[::-1], "x_loss") == [groups[1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", *LINEAR, "--method", "adam"], "no method 'adam'; there are full_sgd, .*oplora_K"),
        (["run", "linear", "--method", "svdlora", "--epochs", "0"], "epochs is 0; expected 1 or more"),
        (["run", "mnist", "--method", "svdlora", "--batch-size", "5000"], "expected 1 to 4000"),
        (["compare", *LINEAR, "--methods"], "no methods to compare"),
        (["ablate", *LINEAR, "--power"], "no methods to compare"),
        (["ablate", "conditioned"], "no learning rate for conditioned"),
        (["compare", *LINEAR, "--methods", "svdlora", "--seeds", "-1"], "seed is -1"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--output", str(tmp_path)]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_output_that_is_no_folder(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["run", *LINEAR, "--method", "svdlora", "--output", str(tmp_path / "file")]) == 1
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["run"], ["run", "chess"], ["run", *LINEAR, "--metod", "x"]])
def test_unreadable_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


def test_help_says_what_there_is(capsys):
    with pytest.raises(SystemExit) as end:
        main(["compare", "mnist", "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "--learning-rates" in printed and "tfds" in printed


def test_keyboard_interrupt(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.__main__.train", interrupted)
    assert main(["run", *LINEAR, "--method", "svdlora", "--output", str(tmp_path)]) == 130
    assert "goes on from the last finished epoch" in capsys.readouterr().err


def test_the_table_of_optimizers(capsys):
    assert main(["optimizers"]) == 0
    assert capsys.readouterr().out == markdown() + "\n"
