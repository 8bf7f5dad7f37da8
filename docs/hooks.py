"""What the site shows besides docs/: files of the repository, at their own paths, and MathJax."""

import re
from importlib.metadata import distribution
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/PERFORMANCE.md", "experiments/RESULTS.md")
MATHJAX = "sphinx-mathjax-offline/static/mathjax/tex-svg.js"


def linked(page):
    """The files of the repository that one of its pages links to, figures and sources."""
    for target in re.findall(r"\]\(([^)#\s]+)", (ROOT / page).read_text()):
        path = (ROOT / page).parent / target
        if "://" not in target and not target.startswith("docs/") and path.is_file():
            yield path.resolve().relative_to(ROOT).as_posix()


def on_files(files, config):
    """Adds them, so that links among them hold and are checked."""
    for path in {*PAGES, *(path for page in PAGES for path in linked(page))}:
        if files.get_file_from_path(path) is None:
            files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    mathjax = distribution("sphinx-mathjax-offline").locate_file(MATHJAX)
    files.append(File.generated(config, "javascripts/tex-svg.js", abs_src_path=str(mathjax)))
    return files


def on_page_markdown(markdown, page, config, files):
    """On the site the pages of docs/ lie beside the repository's own."""
    return markdown.replace("](docs/", "](") if page.file.src_path in PAGES else markdown
