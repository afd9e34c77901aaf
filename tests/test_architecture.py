"""The structure of the source: layers, sizes of functions and files, and words that were replaced."""

import ast
import importlib.util
import re
import subprocess

import pytest
from helpers_imports import ALLOWED, LAYERS, ROOT, cycles, module_imports, modules, unit, unit_imports

MAX_FUNCTION, MAX_FILE, MIN_FILE = 75, 450, 30


@pytest.fixture(scope="module")
def imports():
    return module_imports()


def show(violations):
    return "\n  ".join(["", *violations])


# --- layers ---------------------------------------------------------------------------------------------------------


def test_every_package_is_in_a_layer(imports):
    listed = {name for layer in LAYERS for name in layer}
    assert {unit(module) for module in imports} <= listed, "list it in LAYERS of tests/helpers_imports.py"


def test_no_import_points_to_a_higher_layer(imports):
    level = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    upward = [
        f"{source} imports {target}"
        for source, targets in imports.items()
        for target in sorted(targets)
        if level[unit(target)] > level[unit(source)]
    ]
    assert not upward, show(upward)


def test_models_and_data_import_only_what_they_may(imports):
    wrong = [
        f"{source} imports {target}"
        for source, targets in imports.items()
        for target in sorted(targets)
        if unit(source) in ALLOWED and unit(target) not in ALLOWED[unit(source)] | {unit(source)}
    ]
    assert not wrong, show(wrong)


def test_modules_import_each_other_without_cycles(imports):
    assert cycles(imports) == []


def test_packages_import_each_other_without_cycles(imports):
    graph = {}
    for source, target in unit_imports(imports):
        graph.setdefault(source, set()).add(target)
    assert cycles(graph) == []


def test_cycles_are_found():
    graph = {"a": {"b", "d"}, "b": {"c"}, "c": {"a"}, "d": {"e"}, "e": {"f"}, "f": {"e"}, "g": {"a"}}
    assert cycles(graph) == [["a", "b", "c"], ["e", "f"]]


def test_the_picture_of_the_layers_shows_the_imports_as_they_are():
    spec = importlib.util.spec_from_file_location("layers", ROOT / "docs" / "layers.py")
    layers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(layers)
    assert (ROOT / "docs" / "layers.svg").read_text() == layers.draw(), "run python docs/layers.py"


# --- sizes ----------------------------------------------------------------------------------------------------------


def test_functions_fit_a_screen():
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path in modules().values()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno + 1 > MAX_FUNCTION
    ]
    assert not long, f"split functions of more than {MAX_FUNCTION} lines:" + show(long)


def test_files_are_neither_too_long_nor_too_short(imports):
    wrong = []
    for name, path in modules().items():
        text = path.read_text()
        lines, callers = len(text.splitlines()), [other for other in imports if name in imports[other]]
        if lines > MAX_FILE:
            wrong.append(f"{name} has {lines} lines (at most {MAX_FILE})")
        is_command = '__name__ == "__main__"' in text
        if lines < MIN_FILE and len(callers) <= 1 and path.name != "__init__.py" and not is_command:
            wrong.append(f"{name} has {lines} lines and is imported by {callers} alone: merge them")
    assert not wrong, show(wrong)


# --- words ----------------------------------------------------------------------------------------------------------

UNITS = "image|step|second|minute|epoch|dispatch|turn|side|seed|batch|device|process|example|class|call|value|token|day"
# Replaced words and how to write them: regular expressions on the lines of source, documentation and results.
WORDS = {
    rf"\b(?!test_)\w*s_an?_(?:{UNITS})\b|_at_one_an?_": "x_per_y",
    rf"\b(?:images|steps|batches|examples|epochs|updates|calls|bytes|lines?|G?FLOPs?|GFLOP|seconds|min|MB|GB|\d s|times"
    rf"|tokens|values|pixels|:\d\d) an? (?:{UNITS})\b": "per",
    r"\bbehind\b": "after",
    r"\bin front\b": "before",
    r"\b(?:did not|does not|do not|has|have|to) land(?:ed)?\b|\blanded\b": "saved",
    r"\b(?:go|goes|going|went|gone) on\b": "resume, continue",
    r"\btold\b|\btells? of\b": "say what is meant: labels, targets, options",
    r"(?<!floating-point )(?<!integer )\barithmetic\b(?! mean| intensity)": "compute dtype",
    r"\b(?:rounded|large|big) products\b|\bproducts in (?:bfloat16|float32)": "matmuls",
    r"\bdoors?\b": "attention backend, entry point",
    r"(?<!of )\bcourses?\b": "learning-rate schedule",
    r"\bbad[ _]numbers?\b": "non-finite loss or gradient",
    r"\btroubles?\b": "say what went wrong",
    r"\bbeside (?:others?\b|peers?\b|whom\b|timm\b|PyTorch\b|NumPy\b|plain\b|torch\b|each other\b|host\b|it (?:PyTorch|"
    r"others))": "compared with",
    r"\.beside\(": "metadata",
    r"\bask(?:s|ed)?[ _]to[ _]stop\b|\btaken by another\b": "stop requested, locked by another process",
    r"\bthe main (?:process|one)\b|\b(?:on|by|is)_main\b": "rank 0",
    r"\b(?!(?:crop|erasing)_area_|test_)\w+_(?:least|most)\b(?<!at_least)(?<!at_most)|\b(?:LEAST|MOST)\b": "min, max",
    r"\b(?:noqa: )E731\b": "def instead of a lambda with a name",
}
# Names that nothing in the source may be given.
NAMES = {
    *("told", "said", "given", "taken", "asked", "been", "least", "most", "place", "places", "numbers"),
    *("beside", "behind", "door", "course", "trouble"),
}
SKIPPED = ("tests/test_architecture.py", "CHANGELOG.md", "LICENSE", "requirements.txt", "docs/layers.svg")
SUFFIXES = (".py", ".md", ".sh", ".json", ".toml", "run")


def texts():
    """The tracked text files that people read, by their path in the repository."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = [name for name in listed.stdout.splitlines() if name.endswith(SUFFIXES) and name not in SKIPPED]
    return {
        name: (ROOT / name).read_text()
        for name in names
        if (ROOT / name).is_file() and not name.startswith(("tests/goldens/", "tests/recorded/"))
    }


def test_replaced_words_do_not_come_back():
    patterns = {re.compile(pattern): instead for pattern, instead in WORDS.items()}
    found = [
        f"{name}:{number}: {match.group()!r}: write {instead}"
        for name, text in texts().items()
        for number, line in enumerate(text.splitlines(), 1)
        for pattern, instead in patterns.items()
        for match in pattern.finditer(line)
    ]
    assert not found, f"{len(found)} occurrences:" + show(found)


def defined_names(tree):
    """The names that a file gives to variables, arguments, attributes, functions and classes, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname, node.lineno


def test_nothing_has_a_replaced_name():
    found = sorted(
        f"{path}:{line}: {name}"
        for path, text in texts().items()
        if path.endswith(".py")
        for name, line in defined_names(ast.parse(text))
        if name.strip("_").lower() in NAMES
    )
    assert not found, f"{len(found)} occurrences:" + show(found)


@pytest.mark.parametrize(
    "line, is_replaced",
    [
        ("steps_an_epoch = 5", True),
        ("def test_what_runs_a_step_does(): ...", False),
        ("2.6 GFLOP an image", True),
        ("the loss gives an image a weight", False),
        ("images a second", True),
        ("behind the last block", True),
        ("of course", False),
        ("its course after warm-up", True),
        ("floating-point arithmetic", False),
        ("speed beside timm", True),
        ("a file beside the checkpoint", False),
        ("at_least, at_most", False),
        ("ratio_least", True),
        ("crop_area_least", False),
        ("a map of the landscape", False),
    ],
)
def test_patterns_hit_what_they_should(line, is_replaced):
    assert any(re.search(pattern, line) for pattern in WORDS) == is_replaced
