"""What the command line says to whom does not know it: an overview, and what was meant by a wrong word."""

import inspect
import itertools
import re
import textwrap
from collections.abc import Mapping, Sequence

from experiments import ExperimentError, did_you_mean, methods

PROGRAM = "python -m experiments"
EXAMPLES = {
    "one training, of a few seconds": "run linear --method oplora --num-iters 2",
    "three methods with two seeds: a table, and the curves as a figure": (
        "compare mnist --epochs 5 --seeds 0 1 --method lora_adamw oplora scaled_oplora"
    ),
    "the same at the best of five learning rates or more": (
        "compare mnist --epochs 5 --seeds 0 1 --method lora_adamw oplora scaled_oplora --sweep"
    ),
}
_USAGES = "run|compare TASK --method NAME ...", "report FOLDER ...", "optimizers"
_GROUPS = {
    "LoRA with the exact gradient of the full weight": ("exact", "outer"),
    "LoRA with the gradients of its factors": ("factors",),
    "full training of the same kernels, to compare with": ("full",),
}


def overview(commands: Mapping[str, type], tasks: Mapping[str, type]) -> str:
    """What there is to do, with examples."""
    gradients = {name: methods.method(name).gradient for name in methods.PRESETS}
    groups = [
        f"  {title}\n{_fill(', '.join(name for name in gradients if gradients[name] in kinds), 4)}"
        for title, kinds in _GROUPS.items()
    ]
    parts = [
        "Trains LoRA with many optimizers on five tasks, and compares them.",
        "\n".join(f"  {PROGRAM} {z}" for z in _USAGES),
        f"Commands\n{_list(commands)}",
        f"Tasks\n{_list(tasks)}",
        "\n".join(["Methods", *groups]),
        "\n".join(["Examples", *(f"  # {what}\n  {PROGRAM} {z}" for what, z in EXAMPLES.items())]),
        f"All options of a task, with their defaults: {PROGRAM} compare mnist --help\n"
        "Behind --method NAME come the settings of its optimizer, as in the first example.",
    ]
    return "\n\n".join(parts)


def check(
    words: Sequence[str],
    names: Sequence[str],
    commands: Mapping[str, type],
    tasks: Mapping[str, type],
) -> None:
    """Refuses wrong names of commands, tasks and options, with those that there are.

    Args:
      words: the arguments that are not a method's.
      names: the methods that are named.
      commands: by name.
      tasks: by name.
    """
    if "--help" in words or "-h" in words:
        return
    command, *places = [*itertools.takewhile(lambda word: not word.startswith("-"), words)] or [""]
    if command not in commands:
        raise ExperimentError(_unknown("command", command, commands))
    takers = [commands[command]]
    line = f"{PROGRAM} {command}"
    if "task" in inspect.signature(takers[0]).parameters:
        task = next((word for word in words if word in tasks), None)
        if places and places[0] != task:
            raise ExperimentError(_unknown("task", places[0], tasks))
        if task is None:
            like = next((name for name in names if name in tasks), "mnist")
            raise ExperimentError(
                f"{command} needs a task:\n{_list(tasks)}\nas in: {line} {like} --method oplora"
            )
        if places[1:]:
            raise ExperimentError(f"{places[1]!r} stands behind the task; methods stand behind --method")
        takers.append(tasks[task])
        line += f" {task}"
    parameters = [name for taker in takers for name in inspect.signature(taker).parameters]
    known = ["method", *(name for name in parameters if name != "task")]  # which stands by its name alone
    for word in words:
        name = word[2:].replace("-", "_").removeprefix("no_")
        if word.startswith("--") and name not in known:
            raise ExperimentError(f"{_no_option(word, name, names, known)}\nall options: {line} --help")


def _no_option(word: str, name: str, names: Sequence[str], known: Sequence[str]) -> str:
    settings = {preset: methods.method(preset).settings for preset in methods.PRESETS}
    option = lambda name: f"--{name.replace('_', '-')}"
    here = [z for preset in names for z in settings[preset]]
    lines = [f"no option {word}{did_you_mean(word, dict.fromkeys(map(option, [*known, *here])))}"]
    lines += [
        f"{preset} has the settings {' '.join(map(option, settings[preset])) or 'none'}"
        for preset in dict.fromkeys(names)
    ]
    if elsewhere := [preset for preset in settings if name in settings[preset]]:
        lines.append(f"{word} is a setting of {', '.join(elsewhere)}; it stands behind --method NAME")
    return "\n".join(lines)


def _unknown(kind: str, name: str, names: Mapping[str, type]) -> str:
    found = repr(name) if name else "is given"
    return f"no {kind} {found}; there are {', '.join(names)}{did_you_mean(name, names)}"


def _list(named: Mapping[str, type]) -> str:
    """A line for each, with the first sentence of its docstring."""
    width = max(map(len, named)) + 2
    return "\n".join(
        f"  {name:{width}}{re.split('[.;]', ' '.join(inspect.getdoc(z).split()))[0]}"
        for name, z in named.items()
    )


def _fill(text: str, indent: int) -> str:
    return textwrap.fill(text, 100, initial_indent=" " * indent, subsequent_indent=" " * indent)
