"""What the API pages show: types in the place of `Any`, links at the names in docstrings."""

import ast
import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import griffe

PAGES = "\n".join(page.read_text() for page in Path(__file__).parent.glob("api/*.md"))
ALIASES = ("Alpha", "Kind", "Matrix", "Names", "Rank", "Structure", "Targets", "Terms", "XMode")  # of types
NAMES = re.findall(r"^::: (\S+)", PAGES, re.MULTILINE)


class Readable(griffe.Extension):
    """A griffe extension, which `mkdocs.yml` names."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        modules = [*modules_of(pkg)]
        written = {name: z.members[name].value for z in modules for name in ALIASES if name in z.members}
        for module in modules:
            read(module, {name: str(value) for name, value in written.items()})
        # `from oplora_jax.svd import svd` is the function, as in Python, and not the module of that name.
        functions = {z.path: z.members[z.name] for z in modules if z.name in z.members}
        for member in [member for module in modules for member in module.members.values()]:
            with contextlib.suppress(griffe.AliasResolutionError, griffe.CyclicAliasError):
                found = functions.get((member.final_target if member.is_alias else member).path)
                if found is not None and not found.is_alias:
                    alias = griffe.Alias(member.name, found, parent=member.parent)
                    member.parent.members[member.name] = alias


def modules_of(module: griffe.Module) -> Iterator[griffe.Module]:
    """A module and all below it."""
    yield module
    for member in module.members.values():
        if not member.is_alias and member.is_module:
            yield from modules_of(member)


def read(parent: griffe.Object, aliases: dict[str, str]) -> None:
    """Changes the functions and classes in a module, and those within them."""

    def unfolded(annotation: Any) -> Any:
        text = re.sub(r"\w+", lambda match: aliases.get(match[0], match[0]), str(annotation))
        return annotation if text == str(annotation) else text

    for z in parent.members.values():
        if z.is_alias or z.is_module:
            continue
        if z.docstring is not None:
            z.docstring.value = linked(z.docstring.value, z.path)
        if z.is_function:
            for parameter in z.parameters:
                is_any = str(parameter.annotation) == "Any"
                parameter.annotation = type_of(parameter) if is_any else unfolded(parameter.annotation)
        if z.is_attribute:  # fields of classes: those that may be anything are arrays
            z.annotation = "Array" if str(z.annotation) == "Any" else unfolded(z.annotation)
        read(z, aliases)


def type_of(parameter: griffe.Parameter) -> str | None:
    """The type of a parameter's default, if it has one that is not None."""
    with contextlib.suppress(ValueError, SyntaxError):
        default = ast.literal_eval(str(parameter.default))
        known = default is not None and "variadic" not in parameter.kind.value
        return type(default).__name__ if known else None
    return None


def linked(docstring: str, path: str) -> str:
    """A docstring with links at the names that have a place in the API pages, first at its own module's."""
    *parents, own = path.split(".")

    def link(match: re.Match) -> str:
        name = match[1].removeprefix("oplora_jax.")
        within = [f"oplora_jax.{part}.{name}" for part in parents]
        found = next((z for z in (*within, f"oplora_jax.{name}") if z in NAMES), None)
        return match[0] if found is None or match[1] == own else f"[{match[0]}][{found}]"

    return re.sub(r"(?<!`)`(oplora_jax\.[\w.]+|\w+)`(?!`)", link, docstring)
