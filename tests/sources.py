"""What modules import, read from their source."""

import ast


def imports(path):
    """The pairs (module, name) that a file imports, or reads as an attribute of a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node.value), node.attr
