"""What the README and the pages in docs/ name exists: linked pages and headings, files, commands, options, imports."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest
from helpers_imports import LAYERS

from vit_jax import config
from vit_jax.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    *sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md")),
]

LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"python -m (vit_jax(?:\.[a-z_]+)*)")  # not vit_jax.NAME
OPTION = re.compile(r"--config\.(\w+)\.(\w+)")
OPTION_IN_TEXT = re.compile(rf"`({'|'.join(config.OPTIONS)})\.(?!py`)(\w+)[`=]")
NOT_OPTIONS = {"data.json", "train.npz", "model.apply"}
SUBCOMMAND = re.compile(r"(?:^ {4}|`)(?:vit-jax|python -m vit_jax|\./run\.sh) ([a-z][\w-]*)", re.MULTILINE)
RECIPE = re.compile(rf"--config=((?:configs/[\w.]+|{'|'.join(config.shipped())})(?::[\w,-]+)?)\b")
REPOSITORY_PATH = re.compile(r"(?<![\w/.~-])((?:\.ci|benchmarks|configs|docs|results|tests|vit_jax)/[\w./-]*[\w/])")
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)


def text_of(page: str) -> str:
    return (ROOT / page).read_text()


def prose_of(page: str) -> str:
    """The text of a page; of docs/extending.md without its code, which adds files and options (test_extending.py)."""
    text = text_of(page)
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE) if page == "docs/extending.md" else text


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page; the second one of a name would end in -1."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def missing_link(page: str, target: str) -> bool:
    path, _, anchor = target.partition("#")
    linked = ((ROOT / page).parent / path).resolve() if path else ROOT / page
    if not linked.exists():
        return True
    return bool(anchor) and anchor not in anchors(linked.read_text())


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    targets = [target for target in LINK.findall(text_of(page)) if "://" not in target]
    assert [target for target in targets if missing_link(page, target)] == []


@pytest.mark.parametrize("page", PAGES)
def test_named_files_exist(page):
    named = set(REPOSITORY_PATH.findall(prose_of(page)))
    assert sorted(path for path in named if not (ROOT / path).exists()) == []


@pytest.mark.parametrize("page", PAGES)
def test_commands_exist(page):
    modules = set(COMMAND.findall(text_of(page)))
    assert sorted(module for module in modules if importlib.util.find_spec(module) is None) == []
    subcommands = set(SUBCOMMAND.findall(text_of(page))) - {"test"}  # ./run.sh test
    assert sorted(subcommands - COMMANDS.keys()) == []


@pytest.mark.parametrize("page", [page for page in PAGES if page not in ("CHANGELOG.md", "docs/options.md")])
def test_options_exist(page):
    """Except in the two pages that also list former names."""
    text = prose_of(page)
    named = {".".join(found) for pattern in (OPTION, OPTION_IN_TEXT) for found in pattern.findall(text)} - NOT_OPTIONS
    known = {f"{section}.{key}" for section, options in config.OPTIONS.items() for key in options}
    assert sorted(named - known - {"section.key"}) == []


@pytest.mark.parametrize("recipe", sorted({spec for page in PAGES for spec in RECIPE.findall(text_of(page))}))
def test_recipes_load(recipe):
    config.load(recipe)


@pytest.mark.parametrize("page", PAGES)
def test_python_snippets_parse_and_import(page):
    for snippet in PYTHON.findall(text_of(page)):
        for node in ast.walk(ast.parse(snippet)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("vit_jax"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    assert hasattr(module, alias.name) or importlib.util.find_spec(submodule), submodule


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_whole(page):
    """Every row follows a header and its line of dashes: a blank line inside a table ends it."""
    lines = text_of(page).splitlines()
    for number, line in enumerate(lines):
        if line.lstrip().startswith("|") and not lines[number - 1].lstrip().startswith("|"):
            assert re.fullmatch(r"\s*\|(\s*:?-+:?\s*\|)+", lines[number + 1]), f"line {number + 1}: {line}"


def test_pictures_have_a_description():
    undescribed = [page for page in PAGES if "![](" in text_of(page)]
    assert undescribed == []


def test_the_table_of_packages_lists_the_layers_from_top_to_bottom():
    rows = re.findall(r"^\| (`[^|]*) \|", text_of("docs/architecture.md").partition("\n## From")[0], re.MULTILINE)
    assert [tuple(re.findall("`(.+?)`", row)) for row in rows] == list(reversed(LAYERS))
