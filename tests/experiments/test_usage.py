"""What the command line says to whom does not know it."""

import re
import shlex

import pytest

from experiments import ExperimentError, methods, usage
from experiments.__main__ import _configs, main, parse


def test_overview(capsys):
    """It names every command, task and method, and its examples can be pasted."""
    assert main([]) == 0
    printed = capsys.readouterr().out
    words = set(re.findall(r"[\w-]+", printed))
    assert words >= {"run", "compare", "report", "optimizers", "linear", "mnist", "cifar100", "text", "lm"}
    assert words >= {*methods.PRESETS}
    assert max(map(len, printed.splitlines())) <= 110
    examples = re.findall(r"  python -m experiments ((?:run|compare) [a-z].*)", printed.split("Examples")[1])
    assert examples == list(usage.EXAMPLES.values()) and len(examples) == 3
    for example in examples:
        command, choices = parse(shlex.split(example))
        assert _configs(command, choices, (0,))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("trian linear", "no command 'trian'; there are run, compare, report, optimizers"),
        ("comapre linear", "no command 'comapre'; .*; did you mean compare?"),
        ("--method oplora run linear", "no command is given; there are run, compare"),
        ("run", r"run needs a task:\n  linear +Fit .*\n(.*\n)+as in: .* run mnist --method oplora"),
        ("compare --method oplora", r"compare needs a task:\n  linear"),
        ("run --seed 1 --method oplora linear", r"run needs a task:\n(.*\n)+as in: .* run linear --method"),
        ("run mnits --method oplora", "no task 'mnits'; there are linear, .*, lm; did you mean mnist?"),
        ("run linear oplora", "'oplora' stands behind the task; methods stand behind --method"),
        ("run linear --mehtod oplora", "no option --mehtod; did you mean --method?"),
        ("run linear --method oplora --seeds 1", "no option --seeds; did you mean --seed?"),
        ("compare text --epoch=2 --method oplora", "no option --epoch; did you mean --epochs?\n"),
        ("run lm --method oplora --no-rmat", "no option --no-rmat.*\n.*\nall options: .* run lm --help"),
        ("run linear --method oplora --rank 9", "no option --rank\noplora has the settings"),
        ("report --outptu x", "no option --outptu; did you mean --output?\nall options: .* report --help"),
        (
            "run linear --method oplora --num-iter 2",
            "no option --num-iter; did you mean --num-iters?\noplora has the settings .*--num-iters",
        ),
        (
            "run linear --method svdlora --num-iters 2",
            "no option --num-iters\nsvdlora has the settings --momentum\n"
            "--num-iters is a setting of oplora, .*; it stands behind --method NAME",
        ),
        ("run linear --method adam", "no method 'adam'; .* mean full_adamw, lora_adamw or scaled_adamw?"),
        ("run linear --method oplra", "no method 'oplra'; there are .*; did you mean oplora or psi_lora?"),
    ],
)  # fmt: skip
def test_what_was_meant(arguments, message, capsys):
    assert main(shlex.split(arguments)) == 1
    assert re.match(f"error: {message.replace('?', '[?]')}", capsys.readouterr().err)


def test_nothing_near():
    with pytest.raises(ExperimentError, match=r"no method 'xyz'; there are .*, reflora$"):
        methods.method("xyz")


@pytest.mark.parametrize(
    "arguments",
    ["run --seed 1 lm --no-remat --method oplora", "compare linear --tensorboard --method all --seeds 0 1"],
)
def test_right_ones(arguments):
    command, _ = parse(shlex.split(arguments))
    assert command.task.name
