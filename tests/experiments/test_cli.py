"""The command line, from arguments to files, and what it says about wrong ones."""

import inspect
import re
import shutil

import numpy as np
import pandas as pd
import pytest

from benchmarks.catalogue import markdown
from experiments import methods, storage
from experiments.__main__ import Task, main, split
from experiments.linear import Linear
from experiments.methods import method
from experiments.storage import Config

LINEAR = ["linear", "--epochs", "2"]
PNG = b"\x89PNG"


def rows(path):
    return pd.read_csv(path / "summary.csv")


def names_and_rates(path):
    return list(rows(path)[["method", "learning_rate"]].itertuples(index=False, name=None))


def test_run(tmp_path, capsys):
    arguments = ["run", *LINEAR, "--method", "oplora", "--num-iters", "2", "--output", str(tmp_path)]
    assert main(arguments) == 0
    [folder] = (tmp_path / "linear_stochastic" / "oplora").iterdir()
    assert folder.name.startswith("num_iters=2_lr0.1_seed0_")
    printed = capsys.readouterr().out
    assert "oplora(num_iters=2) lr 0.1 seed 0: epoch 2" in printed and str(folder) in printed
    assert main(arguments) == 0
    assert "epoch 2" in capsys.readouterr().out


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboardX")
    output = ["--output", str(tmp_path)]
    for expected in (True, False):  # nothing is written of a finished run
        assert main(["run", *LINEAR, "--method", "oplora", "--tensorboard", *output]) == 0
        [written] = tmp_path.rglob("tensorboard/*")
        content = written.read_bytes()
        assert b"excess_loss" in content and b"train_loss" in content
        if expected:
            size = len(content)
    assert len(content) == size


def test_compare_writes_a_table_and_figures(tmp_path, capsys):
    several = ["--method", "lora_sgd", "--method", "oplora", "--num-iters", "1", "2"]
    arguments = ["compare", *LINEAR, *several, "--seeds", "0", "1", "2", "--learning-rates", "0.001", "0.002"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    tried = pd.read_csv(tmp_path / "sweep.csv")
    names = "lora_sgd", "oplora", "oplora(num_iters=2)"
    expected = [(m, lr) for m in names for lr in (0.001, 0.002)]
    assert list(tried[["method", "learning_rate"]].itertuples(index=False, name=None)) == expected
    assert names_and_rates(tmp_path) == [(m, 0.002) for m in names]  # the best ones
    config = lambda seed: Config(Linear(epochs=2), method("oplora", num_iters=2), 0.002, seed, tmp_path)
    finals = [storage.read_metrics(config(seed).folder)["excess_loss"].iloc[-1] for seed in range(3)]
    row = rows(tmp_path).iloc[2]
    spread = [np.median(finals), min(finals), max(finals)]
    assert [row[f"excess_loss_{part}"] for part in ("median", "min", "max")] == pytest.approx(
        spread, rel=1e-12
    )
    printed = capsys.readouterr().out
    assert "{:.4g} ({:.4g}, {:.4g})".format(*spread) in printed
    assert "of 3 seeds, at the rates with the best excess loss" in printed
    assert "oplora: the best rate, 0.002, is at an end of those tried" in printed
    for name in ("curves.png", "sweep.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
    assert not (tmp_path / "heat_map.png").exists()


def test_compare_around_each_methods_own_rate(tmp_path, capsys):
    factors = ["--rate-factors", "0.5", "1", "--output", str(tmp_path)]
    arguments = ["compare", *LINEAR, "--method", "oplora", "lora_sgd", "--seeds", "0", *factors]
    assert main(arguments) == 0
    tried = pd.read_csv(tmp_path / "sweep.csv")
    expected = [("oplora", 0.05), ("oplora", 0.1), ("lora_sgd", 0.001), ("lora_sgd", 0.002)]
    assert list(tried[["method", "learning_rate"]].itertuples(index=False, name=None)) == expected
    assert main([*arguments, "--learning-rates", "0.1"]) == 1
    assert "both learning rates and rate-factors are given; give one" in capsys.readouterr().err


def rates_and_seeds(path, name):
    found = [re.match(r"lr(.*)_seed(\d+)_", z.name).groups() for z in path.glob(f"*/{name}/*")]
    return sorted((float(rate), int(seed)) for rate, seed in found)


def test_sweep(tmp_path, capsys, monkeypatch):
    """One seed over rates, further where the best is at an end, and all seeds at the best alone."""
    finals = {"oplora": 0.3, "lora_sgd": 3.0, "scaled_gd": 1e9}  # the best rates
    trained = []

    def fake(config, *hooks):
        trained.append(config)
        best = finals[config.method.preset]
        loss = abs(np.log(config.learning_rate / best)) if best < 1e9 else np.nan  # which diverges
        row = {"epoch": 2.0, "excess_loss": loss, "train_loss": loss + config.seed, "seconds_per_step": 0.1}
        row |= {"peak_memory_mib": 1, "lora_state_kib": 1, "optimizer_state_kib": 1}
        storage.write(config.folder / "config.json", config.to_json().encode())
        storage.write_rows(config.folder / "metrics.csv", [row])

    monkeypatch.setattr("experiments.__main__.train", fake)
    monkeypatch.setattr("experiments.figures.write_figure", lambda figure, path: path.touch())
    rates = ["--learning-rates", "0.1", "0.3", "1", "--output", str(tmp_path)]
    methods = ["--method", "oplora", "lora_sgd", "--method", "scaled_gd"]
    assert main(["compare", *LINEAR, *methods, "--sweep", "--seeds", "4", "5", *rates]) == 0
    assert rates_and_seeds(tmp_path, "oplora") == [(0.1, 4), (0.3, 4), (0.3, 5), (1, 4)]
    # At its upper end: one rate more, which is better than the next.
    assert rates_and_seeds(tmp_path, "lora_sgd") == [
        (0.1, 4),
        (0.3, 4),
        (1, 4),
        (3.33, 4),
        (3.33, 5),
        (11.1, 4),
    ]
    # All diverge: the smallest, twice.
    found = rates_and_seeds(tmp_path, "scaled_gd")
    assert found == [(0.0111, 4), (0.0111, 5), (0.0333, 4), (0.1, 4), (0.3, 4), (1, 4)]
    assert names_and_rates(tmp_path) == [("oplora", 0.3), ("lora_sgd", 3.33), ("scaled_gd", 0.0111)]
    printed = capsys.readouterr().out
    assert "scaled_gd: the best rate, 0.0111, is at an end of those tried" in printed
    assert "lora_sgd:" not in printed
    assert len(pd.read_csv(tmp_path / "sweep.csv")) == 3 + 5 + 5


def test_sweep_by_default_half_a_decade_apart(tmp_path, monkeypatch):
    tried = []
    monkeypatch.setattr(
        "experiments.__main__._train", lambda command, configs, *_: tried.extend(configs) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        main(["compare", *LINEAR, "--method", "oplora", "--sweep", "--output", str(tmp_path)])
    assert [config.learning_rate for config in tried] == [0.01, 0.0316, 0.1, 0.316, 1.0]
    assert {config.seed for config in tried} == {0}


def test_report(tmp_path, capsys):
    """Of the runs of two commands, whatever the current folder is, without what trained them."""
    for epochs in ("2", "3"):
        arguments = ["linear", "--epochs", epochs, "--method", "oplora", "lora_adamw", "--seeds", "0", "1"]
        assert main(["compare", *arguments, "--output", str(tmp_path / "runs" / epochs)]) == 0
    printed = capsys.readouterr().out
    for folder in (tmp_path / "runs").rglob("parameters"):
        shutil.rmtree(folder)
    runs = [str(tmp_path / "runs" / epochs) for epochs in ("2", "3")]
    assert main(["report", *runs, "--output", str(tmp_path / "report")]) == 0
    overview = pd.read_csv(tmp_path / "report" / "overview.csv")
    titles = ["linear_stochastic, epochs 2", "linear_stochastic, epochs 3"]
    assert sorted(overview["task"]) == sorted(2 * titles)
    found = capsys.readouterr().out
    assert "| linear_stochastic, epochs 2: excess loss |" in found
    for epochs, title in zip(("2", "3"), titles, strict=True):
        rows_of = pd.read_csv(tmp_path / "runs" / epochs / "summary.csv").set_index("method")
        for _, row in overview[overview["task"] == title].iterrows():
            same = rows_of.loc[row["method"]]
            assert [row[z] for z in ("seeds", "learning_rate", "lora_state_kib")] == [
                same[z] for z in ("seeds", "learning_rate", "lora_state_kib")
            ]
            assert row["median"] == same["excess_loss_median"]
            assert f"{row['median']:.4g} (" in found and f"{row['median']:.4g} (" in printed
    for kind in ("sweep", "curves"):
        path = tmp_path / "report" / f"linear_stochastic_{kind}.png"
        assert path.read_bytes().startswith(PNG)
    assert main(["report", str(tmp_path / "nothing")]) == 1
    assert "no run in" in capsys.readouterr().err


def test_each_method_has_its_own_rates(tmp_path):
    own = ["--method", "oplora", "--learning-rate", "0.3", "--method", "lora_sgd", "--method", "scaled_gd"]
    assert (
        main(
            ["compare", *LINEAR, *own, "--learning-rates", "0.01", "--seeds", "0", "--output", str(tmp_path)]
        )
        == 0
    )
    assert names_and_rates(tmp_path) == [("oplora", 0.3), ("lora_sgd", 0.01), ("scaled_gd", 0.01)]


def test_a_grid_of_settings_is_a_heat_map(tmp_path):
    grid = ["--method", "scaled_oplora", "--damping", "1e-6", "0.1", "--power", "0.5", "1"]
    arguments = [
        "compare",
        *LINEAR,
        *grid,
        "--learning-rate",
        "0.1",
        "--seeds",
        "0",
        "--output",
        str(tmp_path),
    ]
    assert main(arguments) == 0
    named = [
        f"scaled_oplora({z})"
        for z in ("damping=1e-06", "damping=1e-06, power=1.0", "damping=0.1", "damping=0.1, power=1.0")
    ]
    assert rows(tmp_path)["method"].to_list() == named
    assert (tmp_path / "heat_map.png").read_bytes().startswith(PNG)


def test_protocol_is_the_default(tmp_path):
    assert main(["compare", *LINEAR, "--method", "lora_sgd", "--output", str(tmp_path)]) == 0
    folders = sorted((tmp_path / "linear_stochastic" / "lora_sgd").iterdir())
    assert [folder.name.rsplit("_", 1)[0] for folder in folders] == [f"lr0.002_seed{i}" for i in range(5)]
    assert not (tmp_path / "sweep.png").exists()


def test_a_method_takes_its_settings():
    """What follows --method and is no argument of the optimizer is the task's, wherever it stands."""
    rest, choices = split(
        [
            "compare",
            "mnist",
            "--seeds",
            "0",
            "--methods",
            "svdlora",
            "lora_adamw",
            "--epochs",
            "3",
            "--method",
            "oplora",
            "--num-iters=2",
            "--output",
            "x",
            "--momentum-rank",
            "4",
            "8",
            "--learning-rate",
            "0.1",
            "--method",
            "all",
        ]
    )
    assert rest == ["compare", "mnist", "--seeds", "0", "--epochs", "3", "--output", "x"]
    assert [choice.methods() for choice in choices] == [
        [method("svdlora"), method("lora_adamw")],
        [method("oplora", num_iters=2, momentum_rank=rank) for rank in (4, 8)],
        [method(name) for name in methods.PRESETS],
    ]
    assert [choice.learning_rates for choice in choices] == [(), (0.1,), ()]


def test_no_option_has_two_meanings():
    options = {name for task in Task.__args__ for name in inspect.signature(task).parameters}
    options |= {"seed", "seeds", "output", "learning_rates", "rate_factors", "tensorboard"}
    assert not options & {name for preset in methods.PRESETS for name in method(preset).settings}


def test_one_run_is_trained_once(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(
        "experiments.__main__._train", lambda command, configs, *_: trained.extend(configs) or 1 / 0
    )
    same = ["--method", "oplora", "all", "--method", "oplora", "--num-iters", "1", "2", "--seeds", "0"]
    with pytest.raises(ZeroDivisionError):
        main(["compare", *LINEAR, *same])
    assert len(trained) == len(set(trained)) == len(methods.PRESETS) + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", *LINEAR, "--method", "adam"], "no method 'adam'; there are full_sgd, .*oplora"),
        (["run", *LINEAR, "--method", "oplora", "svdlora"], "2 runs; run takes one, and compare several"),
        (["run", *LINEAR, "--method", "oplora", "--num-iters", "1", "2"], "2 runs; run takes one"),
        (["run", "linear", "--method", "svdlora", "--epochs", "0"], "epochs is 0; expected 1 or more"),
        (["run", "mnist", "--method", "svdlora", "--batch-size", "5000"], "expected 1 to 3000"),
        (["run", *LINEAR], "no method is given; behind --method there may be full_sgd"),
        (["compare", *LINEAR, "--method"], "no method is given"),
        (["compare", *LINEAR, "--method", "svdlora", "oplora", "--num-iters", "2"], "no setting"),
        (["compare", *LINEAR, "--method", "oplora", "--num-iters"], "num-iters has no value"),
        (["run", *LINEAR, "--learning-rate", "1", "--method", "oplora"], "learning-rate stands before"),
        (["run", *LINEAR, "--method", "oplora", "--momentum", "0.5x"], "momentum is '0.5x'; expected"),
        (["run", *LINEAR, "--method", "oplora", "--momentum-rank", "many"], "momentum_rank=many"),
        (["run", *LINEAR, "--method", "oplora", "--learning-rate", "big"], "rate is 'big'"),
        (["compare", "cifar100", "--method", "altlora"], "altlora has no learning rate for cifar100"),
        (["report", "outputs", "--method", "oplora"], "report takes no --method"),
        (["compare", *LINEAR, "--method", "svdlora", "--seeds", "-1"], "seed is -1"),
    ],
)  # fmt: skip
def test_bad_arguments(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--output", str(tmp_path)]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_output_that_is_no_folder(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["run", *LINEAR, "--method", "svdlora", "--output", str(tmp_path / "file")]) == 1
    assert "error: " in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit) as end:
        main(["compare", "mnist", "--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert "--learning-rates" in printed and "tfds" in printed
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "--method" in capsys.readouterr().out


def test_keyboard_interrupt(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.__main__.train", interrupted)
    assert main(["run", *LINEAR, "--method", "svdlora", "--output", str(tmp_path)]) == 130
    assert "goes on from the last checkpoint" in capsys.readouterr().err


def test_the_table_of_optimizers(capsys):
    assert main(["optimizers"]) == 0
    assert capsys.readouterr().out == markdown() + "\n"
