"""The examples of docs/extending.md: applied to a copy of the repository, they train and pass the tests they name."""

import ast
import json
import math
import re
import shlex
import shutil

import pytest
from helpers import ROOT, flags, read_metrics, run_command

PAGE = (ROOT / "docs" / "extending.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
COPIED = ("vit_jax", "configs", "tests", "docs")
UNUSED = ("__pycache__", "goldens", "references", "fixtures", "augment")  # large files that these tests do not read
# The commands train a run of this size instead of the config's.
TINY = {
    "model": {"variant": "Ti/4", "width": 16, "depth": 1, "heads": 2, "mlp_width": 16},
    "optimizer": {"warmup_steps": 2},
    "train": {"epochs": "None", "steps": 12, "evaluate_every": 0},
    "checkpoint": {"every": 0},
    "mesh": {"devices": 1},
    "log": {"every": 4, "tensorboard": False},
}


def sections():
    """The blocks of each section: (language, text), by the section's title."""
    parts = re.split(r"^## (.+)$", PAGE, flags=re.MULTILINE)
    return {title: BLOCK.findall(text) for title, text in zip(parts[1::2], parts[2::2], strict=True)}


SECTIONS = sections()


def changed(text, diff):
    """A file's text after the hunks of a diff without line numbers, each of which must fit at exactly one place."""
    for hunk in re.split(r"^@@\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        assert all(line[0] in " +-" for line in lines), hunk
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        starts = [match.start() for match in re.finditer(f"^{re.escape(before)}", text, re.MULTILINE)]
        assert len(starts) == 1, f"{len(starts)} places for\n{before}"
        text = text[: starts[0]] + after + text[starts[0] + len(before) :]
    return text


def files_of(blocks, read):
    """The new text of every file that the blocks change or add, by path; `read` gives the present text of a path."""
    files = {}
    for language, text in blocks:
        first, _, rest = text.partition("\n")
        if language == "diff":
            path = first.removeprefix("--- ")
            files[path] = changed(files.get(path) or read(path), rest)
        elif language == "python":
            assert first.startswith("# ") and first.endswith(".py"), first
            files[first.removeprefix("# ")] = rest
    return files


def read(path):
    return (ROOT / path).read_text()


def commands_of(blocks):
    return [line for language, text in blocks if language == "sh" for line in text.splitlines()]


def test_every_block_is_applied_or_run():
    assert len(SECTIONS) == 6
    assert {language for blocks in SECTIONS.values() for language, _ in blocks} == {"diff", "python", "sh"}
    assert sum(map(len, SECTIONS.values())) == PAGE.count("\n```") // 2


@pytest.mark.parametrize("title", SECTIONS)
def test_changes_fit_the_source_as_it_is(title):
    blocks = SECTIONS[title]
    for path, text in files_of(blocks, read).items():
        ast.parse(text)
        assert all(len(line) <= 120 for line in text.splitlines()), path
    assert any("-m vit_jax.main" in command for command in commands_of(blocks))
    assert any("-m pytest" in command for command in commands_of(blocks))


def test_all_changes_fit_together():
    files_of([block for blocks in SECTIONS.values() for block in blocks], read)


@pytest.mark.slow
def test_images_in_memory_are_trained_on(capsys):
    program = files_of(SECTIONS["A data source"], read)["in_memory.py"]
    found = {}
    exec(compile(program, "in_memory.py", "exec"), found)
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", capsys.readouterr().out)]
    assert losses[-1] < losses[0]
    assert found["metrics"]["test/examples"] == 128 and found["metrics"]["test/accuracy"] > 0.9


@pytest.fixture
def copy(tmp_path):
    """A copy of the repository, without large files."""
    for name in COPIED:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns(*UNUSED))
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """The records of the default config at the size of `TINY`."""
    return train(ROOT, ["-m", "vit_jax.main", "--config=configs/digits.py"], tmp_path_factory.mktemp("usual"))


def train(directory, arguments, workdir):
    """Runs a documented command at the size of `TINY`; its own options come last."""
    _, module, config, *options = arguments
    run_command(
        module, config, f"--workdir={workdir}", *flags(**TINY), *options, cwd=directory, PYTHONPATH=str(directory)
    )
    assert (workdir / "summary.json").is_file()
    return read_metrics(workdir)


@pytest.mark.slow
@pytest.mark.parametrize("title", SECTIONS)
def test_the_example_trains_and_passes_its_tests(title, copy, usual):
    for path, text in files_of(SECTIONS[title], read).items():
        (copy / path).write_text(text)
    for command in commands_of(SECTIONS[title]):
        program, *arguments = shlex.split(command)
        assert program == "python"
        if "vit_jax.main" in arguments:
            records = train(copy, arguments, copy / "run")
            assert all(math.isfinite(value) for record in records for value in record.values())
            assert records[-1] != usual[-1]
            written = json.loads((copy / "run" / "config.json").read_text())
            for option, value in re.findall(r"--config\.(\S+?)=(\S+)", command):
                section, key = option.split(".")
                assert str(written[section][key]) == value or float(written[section][key]) == float(value)
        elif arguments[0] == "-m":
            output = run_command(*arguments[1:], cwd=copy, PYTHONPATH=str(copy))
            assert "passed" in output or arguments[1] != "pytest"
        else:
            run_command(copy / arguments[0], cwd=copy, PYTHONPATH=str(copy))
