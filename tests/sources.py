"""What modules import and read, from their source; the programs of the README."""

import ast
import pathlib
import re


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


README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()


def programs(text=README):
    """The programs of a document, those of the README if none is given."""
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
