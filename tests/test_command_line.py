"""The command vit-jax and its subcommands, names of configs, and what an installed package consists of."""

import contextlib
import importlib
import inspect
import json
import re
import signal
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, TINY, finish, flags, run_command, start_command, tiny_config

from vit_jax import __main__ as program
from vit_jax import __version__, commands, finetune, main, terminal
from vit_jax import config as options
from vit_jax.errors import UserError

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# What `pip install` writes, but for its first line.
SCRIPT = "import sys\nfrom vit_jax.__main__ import main\nif __name__ == '__main__':\n    sys.exit(main())\n"


def status_of(arguments: list[str]) -> int:
    """The exit status of `vit-jax ARGUMENTS`, also where argparse ends the command."""
    try:
        return program.main(arguments)
    except SystemExit as end:
        return end.code or 0


# --- the table ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", program.COMMANDS)
def test_a_command_has_a_module_a_line_of_help_and_a_page(name):
    module, line = program.COMMANDS[name]
    assert "arguments" in inspect.signature(importlib.import_module(module).main).parameters
    assert 10 < len(line) <= 80 and line[0].islower() and not line.endswith(".")
    assert any(re.search(rf"vit-jax {name}\b", page.read_text()) for page in PAGES)


def test_every_module_that_can_be_started_is_a_command():
    started = {
        ".".join(["vit_jax", *path.relative_to(ROOT / "vit_jax").with_suffix("").parts])
        for path in (ROOT / "vit_jax").rglob("*.py")
        if '__name__ == "__main__"' in path.read_text()
    }
    others = {"vit_jax.__main__", "vit_jax.config.document", "vit_jax.data.show"}  # data.show: a former name
    assert started - others == {module for module, _ in program.COMMANDS.values()}


def test_help_lists_every_command_in_one_line(capsys):
    for arguments in ([], ["--help"], ["-h"], ["help"]):
        assert program.main(arguments) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[lines.index("commands:") + 1 : -2]] == list(program.COMMANDS)
        assert max(map(len, lines)) <= 100


def test_the_version(capsys):
    assert program.main(["--version"]) == 0
    assert capsys.readouterr().out == f"vit_jax {__version__}\n"


@pytest.mark.parametrize("started", ["vit-jax", "python -m vit_jax", None])
@pytest.mark.parametrize("name", program.COMMANDS)
def test_help_shows_how_the_command_was_started(name, started, monkeypatch, capsys):
    script = {"vit-jax": "/a b/bin/vit-jax", "python -m vit_jax": "/a b/vit_jax/__main__.py"}.get(started, "program.py")
    monkeypatch.setattr(sys, "argv", [script, name, "--help"])
    monkeypatch.setattr(commands, "finish", terminal.finish)  # does not end this process
    spec = importlib.util.find_spec("vit_jax.__main__") if started == "python -m vit_jax" else None
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    shown = f"{started} {name}" if started else f"python -m {program.COMMANDS[name][0]}"
    assert status_of([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: {shown} ")
    assert text.count(f"  {shown} ") >= 2  # examples
    assert "%(" not in text and "%%" not in text and "--config=configs/" not in text
    assert max(map(len, text.splitlines())) <= 120


MISTAKES = {
    "pred": "nearest: predict",
    "eval": "nearest: evaluate",
    "test": "nearest: evaluate",
    "fit": "nearest: train",
    "Predict": "nearest: predict",
    "check-points": "nearest: checkpoints",
    "xyzzy": "allowed: train, finetune, ",
    "": "allowed: train, finetune, ",
    "--config=digits": "for example: vit-jax train --config=digits",
}


@pytest.mark.parametrize("name", MISTAKES)
def test_an_unknown_command_is_named_with_the_nearest(name, capsys):
    assert program.main([name, "--workdir=x"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and MISTAKES[name] in printed.err and printed.err.count("\n") <= 3


def test_synonyms_are_of_commands_and_no_commands():
    words = [word for synonyms in program.SYNONYMS.values() for word in synonyms]
    assert program.SYNONYMS.keys() <= program.COMMANDS.keys()
    assert not {*words} & program.COMMANDS.keys() and len({*words}) == len(words)


# --- configs by name ------------------------------------------------------------------------------------------------

SPECS = ["digits", "cifar10", "cifar10:cpu", "cifar100:S,long", "pretrain:mae-cpu", "finetune:cifar10,cpu", "photos"]


@pytest.mark.parametrize("spec", SPECS)
def test_a_name_a_path_and_the_file_are_the_same_config(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, colon, argument = spec.partition(":")
    loaded = [
        options.load(f"{path}{colon}{argument}")
        for path in (name, f"configs/{name}.py", f"./configs/{name}.py", f"{ROOT}/configs/{name}.py")
    ]
    assert all(one == loaded[0] for one in loaded)
    assert options.split(spec) == (name, argument)


def test_the_shipped_configs_are_those_of_the_repository():
    assert options.shipped() == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    assert {spec.partition(":")[0] for spec in SPECS} == {*options.shipped()} and finetune.PHOTOS in options.shipped()
    assert all(f"`{name}`" in (ROOT / "docs" / "training.md").read_text() for name in options.shipped())


def test_a_file_of_ones_own_wins_only_if_it_is_given_as_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "from vit_jax import config\ndef get_config(n='7'):\n    c = config.default()\n    c.train.seed = int(n)\n"
    (tmp_path / "configs").mkdir()
    for path in ("digits.py", "digits", "configs/cifar10.py"):
        (tmp_path / path).write_text(f"{text}    return c\n")
    seeds = {
        spec: options.load(spec).train.seed
        for spec in ("digits", "cifar10:cpu", "digits.py", "./digits", "digits.py:8", "configs/cifar10.py")
    }
    assert seeds == {"digits": 0, "cifar10:cpu": 0, "digits.py": 7, "./digits": 7, "digits.py:8": 8,
                     "configs/cifar10.py": 7}  # fmt: skip


UNKNOWN = {
    "cifr10": "no such config: cifr10\n  nearest: --config=cifar10\n  available: cifar10, cifar100, ",
    "cifr10:cpu": "nearest: --config=cifar10:cpu\n",
    "configs/digit.py": "no such file: configs/digit.py\n  nearest: --config=digits\n",
    "mine:a": "no such config: mine\n  nearest: --config=mine.py:a\n",
    "xyzzy": "no such config: xyzzy\n  available: cifar10, ",
    "elsewhere/cifar10.py": "no such file: elsewhere/cifar10.py\n  nearest: --config=cifar10\n",
    "runs/first": "runs/first is a directory\n  contains: runs/first/config.json",
}


@pytest.mark.parametrize("spec", UNKNOWN)
def test_a_wrong_name_is_refused_with_the_nearest(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").touch()
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "config.json").touch()
    with pytest.raises(UserError) as error:
        options.load(spec)
    assert UNKNOWN[spec] in str(error.value) and str(error.value).count("\n") <= 2


@pytest.mark.parametrize(
    "spec, workdir",
    [
        ("digits", "runs/digits"),
        ("cifar10:cpu", "runs/cifar10-cpu"),
        ("configs/cifar10.py:cpu", "runs/cifar10-cpu"),
        (f"{ROOT}/configs/cifar10.py:cpu", "runs/cifar10-cpu"),
        ("finetune:cifar10,cpu", "runs/finetune-cifar10-cpu"),
        ("configs/finetune.py:cifar10, cpu", "runs/finetune-cifar10-cpu"),
        ("v1.2.py", "runs/v1.2"),
        ("runs/first/config.json", "runs/first"),
        ("config.json", Path.cwd()),
        ("../config.json", Path.cwd().parent),
    ],
)
def test_the_default_run_directory(spec, workdir):
    """Of a config.json: its directory, with a name, to which `vit-jax sweep` appends."""
    assert commands.default_workdir(spec) == Path(workdir)


# --- the config of a run --------------------------------------------------------------------------------------------


def test_a_run_directory_alone_and_its_config_stand_for_the_config_of_the_run(tmp_path, monkeypatch):
    saved = tiny_config(log={"every": 3})
    (tmp_path / "config.json").write_text(json.dumps(saved.to_dict()))
    typed, overrides = main.parse([f"--workdir={tmp_path}", "--config.log.every=7"])
    assert Path(typed.config) == tmp_path / "config.json"
    made = commands.make_config(typed.config, overrides, tmp_path)
    assert made.log.every == 7
    made.log.every = 3
    assert made == saved
    monkeypatch.chdir(tmp_path)
    assert commands.make_config("config.json", []) == saved


def test_a_directory_without_a_run_needs_a_config(tmp_path, capsys):
    for directory in (tmp_path, tmp_path / "nowhere"):
        assert main.main([f"--workdir={directory}"]) == 2
        assert capsys.readouterr().err.startswith("error: --config is missing\n")
    assert not list(tmp_path.iterdir())


def test_a_config_json_that_is_no_run_is_named(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"architectures": ["ViT"]}')
    assert main.main([f"--config={tmp_path}/config.json"]) == 2
    assert "config.json cannot be read" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_resumed_and_shown_by_its_directory_alone(tmp_path):
    tiny = flags(model=TINY, train={"steps": 3, "epochs": None}, optimizer={"warmup_steps": 1})
    run_command("vit_jax", "train", "--config=digits", "--workdir=first", *tiny, cwd=tmp_path)
    assert "is finished" in run_command("vit_jax", "train", "--workdir=first", cwd=tmp_path)
    assert "is finished" in run_command("vit_jax", "train", "--config=first/config.json", cwd=tmp_path)
    longer = run_command("vit_jax.main", "--workdir=first", "--config.train.steps=5", cwd=tmp_path)
    assert "resuming at step 3" in longer and "after 5 steps" in longer
    assert [path.name for path in tmp_path.iterdir()] == ["first"]


# --- finetune -------------------------------------------------------------------------------------------------------


def test_finetune_is_a_short_form_of_train(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "cifar10"):
        (tmp_path / name).mkdir()
    own = [f"--config={finetune.PHOTOS}", "--config.data.dir="]
    for data, expected in {
        "cifar10": ["--config=finetune:cifar10"],
        "cifar100,cpu": ["--config=finetune:cifar100,cpu"],
        "photos": [own[0], f"{own[1]}photos"],
        "./cifar10": [own[0], f"{own[1]}./cifar10"],
        "/no/where": [own[0], f"{own[1]}/no/where"],
    }.items():
        made = finetune.training_arguments(
            ["--init=m.npz", f"--data={data}", "--workdir", "x", "--config.train.steps", "9"]
        )
        init = "--config.checkpoint.init_from=m.npz"
        assert made == [*expected, init, "--workdir", "x", "--config.train.steps=9"]
        assert main.parse(made)[0].workdir == "x"
    assert finetune.main(["--init=m.npz", "--data=fotos"]) == 2
    assert "--data=fotos: no such directory, and" in (error := capsys.readouterr().err) and "oxford_flowers" in error
    assert finetune.main(["--init=m.npz", "--data=cifar10", "--config=digits"]) == 2
    assert "--config is chosen by --data" in capsys.readouterr().err


# --- processes ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["script", "package", "module"])
def start(request, tmp_path):
    """A function that starts a command in one of three ways: vit-jax, python -m vit_jax, python -m vit_jax.MODULE."""
    (tmp_path / "vit-jax").write_text(SCRIPT)
    programs = {"script": tmp_path / "vit-jax", "package": "vit_jax"}

    def started(name: str, *arguments, **more) -> subprocess.Popen:
        if request.param == "module":
            return start_command(program.COMMANDS[name][0], *arguments, cwd=tmp_path, **more)
        return start_command(programs[request.param], name, *arguments, cwd=tmp_path, **more)

    return started


@pytest.mark.slow
def test_commands_end_in_the_same_way_however_they_are_started(start, tmp_path):
    """A mistake, an error in Python, Ctrl-C, a closed pipe, and threads that never end."""
    assert finish(start("evaluate", "--workdir=nowhere"), 2).startswith("error: nowhere holds no run\n")
    (tmp_path / "fails.py").write_text(
        "from vit_jax import config\nfrom vit_jax.config import document\ndel document.describe\n"
        "def get_config():\n    return config.default()\n"
    )
    assert "Traceback" in finish(start("train", "--config=fails.py", "--help"), 1)
    (tmp_path / "waits.py").write_text(
        "import threading, time\nthreading.Thread(target=time.sleep, args=[600]).start()\n"
        "print('ready', flush=True)\ntime.sleep(600)\n"
    )
    waiting = start("train", "--config=waits.py")
    assert waiting.stdout.readline() == "ready\n"
    waiting.send_signal(signal.SIGINT)
    assert finish(waiting, 130, timeout=30) == "stopped\n"
    closed = start("train", "--config=cifar10", "--help", stderr=subprocess.PIPE)
    closed.stdout.close()
    with contextlib.closing(closed.stderr) as errors:
        assert (errors.read(), closed.wait(30)) == ("", 1)


@pytest.mark.slow
def test_help_of_the_program_starts_without_the_libraries():
    script = """
import sys
sys.argv = ["vit-jax", *sys.argv[1:]]
from vit_jax.__main__ import main
assert main() == 0
assert not {"jax", "numpy", "ml_collections", "vit_jax.commands"} & sys.modules.keys()
"""
    for arguments in ([], ["--version"]):
        assert "vit" in run_command(script, *arguments)


# --- the package ----------------------------------------------------------------------------------------------------


def packages() -> dict[str, Path]:
    """The directories with Python files, by the name of the package as it is installed."""
    found = {path.parent for path in (ROOT / "vit_jax").rglob("*.py")}
    named = {".".join(path.relative_to(ROOT).parts): path for path in found}
    return named | {"vit_jax.configs": ROOT / "configs"}


def test_the_list_of_packages_is_complete():
    settings = PROJECT["tool"]["setuptools"]
    assert sorted(settings["packages"]) == sorted(packages())
    assert settings["package-dir"] == {"vit_jax.configs": "configs"}


def pinned(name: str) -> set[str]:
    return {line for line in (ROOT / name).read_text().splitlines() if "==" in line and not line.startswith("#")}


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in requirements}


def test_requirements_are_pinned_for_users_and_with_test_tools():
    user, both = pinned("requirements.txt"), pinned("requirements-dev.txt")
    direct, dev = PROJECT["project"]["dependencies"], PROJECT["project"]["optional-dependencies"]["dev"]
    assert user < both
    assert names(direct) <= names(user) and names(direct + dev) <= names(both)
    assert not names(dev) & names(user)
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = (ROOT / name).read_text().splitlines()
        assert lines[1].startswith("#    uv pip compile") and lines[1].endswith(f"-o {name}")


def test_extras_are_named_right_everywhere():
    known = PROJECT["project"]["optional-dependencies"].keys()
    texts = {path: path.read_text() for path in [*PAGES, *(ROOT / "vit_jax").rglob("*.py")]}
    used = {
        (path.name, extra)
        for path, text in texts.items()
        for extra in re.findall(r"(?:\.|vit[_-]jax)\[([a-z]+)\]['\"]", text)
    }
    assert {extra for _, extra in used} <= known and ("install.md", "cuda") in used
    assert not [path for path, text in texts.items() if re.search(r"pip install ['\"]?vit_jax", text)]  # not published


@pytest.mark.slow
def test_the_wheel_has_everything_and_works_elsewhere(tmp_path):
    setuptools = pytest.importorskip("setuptools", "77", reason="requirements-dev.txt is not installed")
    assert setuptools
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (tmp_path / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "source" / name).write_bytes((ROOT / name).read_bytes())
    build = "import sys\nfrom setuptools import build_meta\nbuild_meta.build_wheel(sys.argv[1])"
    run_command(build, tmp_path, cwd=tmp_path / "source")
    wheel = zipfile.ZipFile(next(tmp_path.glob("vit_jax-*.whl")))
    inside = {name for name in wheel.namelist() if not name.startswith(f"vit_jax-{__version__}.dist-info/")}
    kinds = (".py", ".npz", ".txt", ".css")
    files = {name: [file for file in path.iterdir() if file.suffix in kinds] for name, path in packages().items()}
    assert inside == {f"{name.replace('.', '/')}/{path.name}" for name, paths in files.items() for path in paths}
    entry = wheel.read(f"vit_jax-{__version__}.dist-info/entry_points.txt").decode()
    assert "vit-jax = vit_jax.__main__:main" in entry

    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    wheel.extractall(installed)
    elsewhere.mkdir()
    (elsewhere / "vit-jax").write_text(SCRIPT)
    for spec in ("cifar100:cpu", "configs/digits.py"):
        text = run_command(
            elsewhere / "vit-jax", "train", f"--config={spec}", "--help", cwd=elsewhere, PYTHONPATH=str(installed)
        )
        assert text.startswith(f"Options of {spec}.")
    read = "from vit_jax.data import digits\nprint(digits.__file__, digits.dataset_spec().sizes)"
    read_from = run_command(read, cwd=elsewhere, PYTHONPATH=str(installed))
    assert read_from.startswith(str(installed)) and "{'train': 1437, 'test': 360}" in read_from
