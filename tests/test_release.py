"""What a release says of itself in several places is the same everywhere."""

import pathlib
import re
import tomllib

import oplora_jax

ROOT = pathlib.Path(__file__).parents[1]
MAKEFILE = (ROOT / "Makefile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_one_version():
    cited = re.findall(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    [latest, *_] = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert cited == [oplora_jax.__version__] == [latest]


def test_one_license():
    cited = re.findall(r"^license: (.+)$", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)
    assert cited == [PROJECT["project"]["license"]]


def test_what_is_packed_is_there():
    """Of the wheel `make dist` checks that it has what is in the package."""
    assert (ROOT / "oplora_jax" / "py.typed").exists()
    packed = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["only-include"]
    assert [name for name in packed if not (ROOT / name).exists()] == []


def test_help_names_every_target():
    [targets] = re.findall(r"^\.PHONY: (.+)$", MAKEFILE, flags=re.MULTILINE)
    helped = re.findall(r'@echo "make (\S+) ', MAKEFILE)
    assert sorted(helped) == sorted(set(targets.split()) - {"help"})
    for target in targets.split():
        assert re.search(rf"^{target}:", MAKEFILE, flags=re.MULTILINE), target


def test_the_workflow_makes_what_there_is():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    [targets] = re.findall(r"target: \[(.+)\]", workflow)
    assert {"test", "docs", "dist"} <= set(targets.split(", ")) <= set(re.findall(r"(?m)^(\S+):", MAKEFILE))
