"""What several test modules need stands in modules of its own, which hold no tests."""

import ast
import pathlib

TESTS = pathlib.Path(__file__).parent


def imported(path):
    """The full names of what a module imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.relative_to(TESTS.parent).parts[: -node.level] if node.level else ()
            module = ".".join([*package, *filter(None, [node.module])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_test(name):
    parts = name.split(".")
    return parts[0] == "tests" and any(part.startswith("test_") or part == "conftest" for part in parts)


def test_no_module_imports_from_a_test_module():
    paths = sorted(TESTS.rglob("*.py"))
    found = {(str(path.relative_to(TESTS)), name) for path in paths for name in imported(path)}
    assert ("test_lorsum.py", "tests.arrays.f64") in found  # imports are seen
    assert {(path, name) for path, name in found if is_test(name)} == set()
