"""What modules import and read, from their source; the programs of the README and of the site."""

import ast
import pathlib
import re
import textwrap


def imports(path):
    """The pairs (module, name) that a file imports, wherever in it; no name where that is a whole module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def uses(path):
    """The same, and the pairs (object, name) of the attributes that it reads."""
    yield from imports(path)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node.value), node.attr


ROOT = pathlib.Path(__file__).parents[1]
# The pages whose programs run: the README and the site's, by their paths.
FILES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in FILES}


def programs(page):
    """The programs of a page in their order, each with what it prints, if that is shown right behind it."""
    fence = r"^(?P<indent> *)```"
    close = r"^(?P=indent)```$"
    block = rf"{fence}python.*?\n(?P<program>.*?){close}(?:\s*^(?P=indent)```text\n(?P<output>.*?){close})?"
    for match in re.finditer(block, PAGES[page], flags=re.DOTALL | re.MULTILINE):
        output = match["output"]
        yield textwrap.dedent(match["program"]), None if output is None else textwrap.dedent(output)
