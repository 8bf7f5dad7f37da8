"""The site's API pages have every public name, and the docstrings every parameter."""

import ast
import importlib
import inspect
import pathlib
import re

import pytest

import oplora_jax

PACKAGE = pathlib.Path(oplora_jax.__file__).parent
PAGES = PACKAGE.parent / "docs" / "api"
PARTS = ("equinox", "linen", "nnx", "peft", "qwix", "reslora", "tunix")


def public_names():
    yield from (f"oplora_jax.{name}" for name in oplora_jax.__all__)
    for part in PARTS:
        path = PACKAGE / f"{part}.py"  # read, not imported: Tunix need not be there
        path = path if path.exists() else PACKAGE / part / "__init__.py"
        body = ast.parse(path.read_text()).body
        listed = [
            z.value for z in body if isinstance(z, ast.Assign) and ast.unparse(z.targets[0]) == "__all__"
        ]
        written = [z.name for z in body if isinstance(z, ast.FunctionDef | ast.ClassDef)]
        names = ast.literal_eval(listed[0]) if listed else [name for name in written if name[0] != "_"]
        yield from (f"oplora_jax.{part}.{name}" for name in names)


PUBLIC = sorted(public_names())


def test_every_public_name_is_on_the_pages_once_and_in_the_index():
    pages = "\n".join(page.read_text() for page in PAGES.glob("*.md"))
    assert sorted(re.findall(r"^::: (\S+)$", pages, re.MULTILINE)) == PUBLIC
    assert (
        sorted(re.findall(r"^\| \[`.+?`\]\[(\S+?)\]", (PAGES / "index.md").read_text(), re.MULTILINE))
        == PUBLIC
    )


@pytest.mark.parametrize("name", [name for name in PUBLIC if ".tunix." not in name])
def test_docstring_begins_with_one_line_and_has_all_parameters(name):
    module, _, last = name.rpartition(".")
    of = getattr(importlib.import_module(module), last)
    first, _, rest = inspect.getdoc(of).partition("\n")
    assert first.endswith(".") and len(first) <= 106 and rest[:1] in ("", "\n"), first
    assert rest.count("\nExamples:\n") <= 1 and "\nExample:" not in rest and ".. math" not in rest
    if inspect.isfunction(of):
        arguments = re.search(r"^Args:\n((?:  .*\n|\n)*)", rest + "\n", re.MULTILINE)
        described = re.findall(r"^  (\*{0,2}\w+): ", arguments[1], re.MULTILINE) if arguments else []
        kinds = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
        parameters = inspect.signature(of).parameters.values()
        assert described == [kinds.get(z.kind, "") + z.name for z in parameters]
