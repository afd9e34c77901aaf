"""run.sh on machines that are set up in other ways: one clear line on standard error, and exit status 2."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

from vit_jax import __version__

# A directory for the clone, the environment, and what the message must name.
REFUSED = {
    "nonsense": ("clone", {"PYTHON": "/no/such/python"}, "PYTHON=/no/such/python is not Python 3.11 or newer"),
    "not_python": ("clone", {"PYTHON": "true_"}, "PYTHON=true_ is not Python 3.11 or newer"),
    "old_python": ("clone", {"PATH": "{bin}"}, "Python 3.11 or newer was not found"),
    "old_python_by_name": ("clone", {"PYTHON": "{bin}/python3"}, "is not Python 3.11 or newer"),
    "no_home": ("clone", {"HOME": None, "PATH": "{bin}"}, "Python 3.11 or newer was not found"),
    "spaces": ("a clone", {"PATH": "{bin}"}, "Python 3.11 or newer was not found"),
    "colon": ("a:clone", {}, "has a colon in its name"),
    "no_venv": ("clone", {"PATH": "{bin}", "FAKE": "venv"}, "cannot make virtual environments"),
}
# Knows its version as an old Python does, or the present one (FAKE), but cannot make environments.
FAKE = """#!/bin/sh
case "$*" in *version_info*) [ -n "$FAKE" ]; exit ;; --version) echo Python 3.12 ; exit ;; esac
exit 1
"""


def run(folder: Path, environment: dict, after: str = "") -> subprocess.CompletedProcess:
    environment = {key: value for key, value in {**os.environ, **environment}.items() if value is not None}
    command = ["/bin/bash", "-c", f'exec /bin/bash "$0" {after}', str(folder / "run.sh")]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def fake(tmp_path):
    """A directory with commands, among them a Python that does not do."""
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name in ("bash", "dirname", "cmp", "cat", "rm", "flock"):
        if found := shutil.which(name):
            (bin_ / name).symlink_to(found)
    (bin_ / "python3").write_text(FAKE)
    (bin_ / "python3").chmod(0o755)
    return bin_


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_missing_is_named(kind, tmp_path, fake):
    name, environment, expected = REFUSED[kind]
    (tmp_path / name).mkdir()
    for file in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / file, tmp_path / name / file)
    environment = {key: value and value.format(bin=fake) for key, value in environment.items()}
    done = run(tmp_path / name, environment)
    assert done.returncode == 2 and expected in done.stderr, done.stderr
    lines = [line for line in done.stderr.splitlines() if "setting up" not in line]
    assert len(lines) == 1 and lines[0].startswith("run.sh: ")
    assert run(tmp_path / name, environment, "2>&-").returncode == 2


def test_a_clone_that_cannot_be_written_to_is_named(tmp_path):
    shutil.copy(ROOT / "run.sh", tmp_path / "run.sh")
    tmp_path.chmod(0o555)
    if os.access(tmp_path, os.W_OK):
        pytest.skip("root may write to it")
    done = run(tmp_path, {})
    tmp_path.chmod(0o755)
    assert done.returncode == 2 and "cannot be written to" in done.stderr


# --- set-up, with a pip that only records what it is called with ---------------------------------------------------

MAKES_VENV = """#!/bin/sh
case "$*" in "-m venv "*) exec {python} -m venv --without-pip "$3" ;; *) exec {python} "$@" ;; esac
"""
PIP = "import os, sys\nprint(*sys.argv[1:], file=open(os.environ['CALLS'], 'a'))\nsys.exit(int(os.environ['STATUS']))\n"


@pytest.fixture
def clone(tmp_path):
    """A function that runs run.sh of a clone, whose path has unusual characters; the names of files that pip was given.

    The clone is a copy, with the package and the configs as links.
    """
    folder, calls = tmp_path / "a b [é] (c)", tmp_path / "calls"
    folder.mkdir()
    for file in ("run.sh", "requirements.txt", "requirements-dev.txt", "pyproject.toml"):
        shutil.copy(ROOT / file, folder / file)
    for directory in ("vit_jax", "configs"):
        (folder / directory).symlink_to(ROOT / directory)
    (tmp_path / "python3").write_text(MAKES_VENV.format(python=shlex.quote(sys.executable)))
    (tmp_path / "python3").chmod(0o755)
    # Where a new environment finds pip: a directory on PYTHONPATH.
    (tmp_path / "pip").mkdir()
    (tmp_path / "pip" / "__main__.py").write_text(PIP)
    environment = {"PYTHON": str(tmp_path / "python3"), "PYTHONPATH": str(tmp_path), "CALLS": str(calls)}

    def call(*arguments: str, expected: int = 0, pip_status: int = 0) -> tuple[str, str, list[str]]:
        calls.write_text("")
        command = ["bash", str(folder / "run.sh"), *arguments]
        done = subprocess.run(
            command, env={**os.environ, **environment, "STATUS": str(pip_status)}, capture_output=True, text=True
        )
        assert done.returncode == expected, done.stderr
        return done.stdout, done.stderr, [Path(line.split()[-1]).name for line in calls.read_text().splitlines()]

    call.folder, call.environment = folder, {**os.environ, **environment, "STATUS": "0"}
    return call


@pytest.mark.slow
def test_the_environment_is_set_up_once_and_again_when_what_it_is_made_from_changes(clone):
    version = f"vit_jax {__version__}\n"
    output, messages, installed = clone("--version")
    assert (output, installed) == (version, ["requirements.txt"]) and "setting up" in messages
    assert clone("--version") == (version, "", [])
    for file in ("pyproject.toml", "requirements.txt", "run.sh"):
        with (clone.folder / file).open("a") as opened:
            opened.write("# changed\n")
        output, messages, installed = clone("--version")  # updated
        assert (output, installed) == (version, ["requirements.txt"]) and "setting up" not in messages
    (clone.folder / ".venv" / "requirements.txt").write_text("of an earlier version")
    (clone.folder / ".venv" / "bin" / "vit-jax").unlink()
    assert clone("--version")[::2] == (version, ["requirements.txt"])
    (clone.folder / ".venv" / "installing").touch()
    (clone.folder / ".venv" / "requirements.txt").write_text("of an earlier version")
    assert "setting up" in clone("--version")[1]  # interrupted: made anew
    with (clone.folder / "requirements.txt").open("a") as opened:
        opened.write("# changed\n")
    assert "installing the packages failed" in clone("--version", expected=2, pip_status=1)[1]
    assert "setting up" not in clone("--version")[1]  # and tried again


@pytest.mark.slow
def test_test_tools_are_installed_when_they_are_first_needed(clone):
    assert clone("--version")[2] == ["requirements.txt"]
    assert clone("test", expected=1)[2] == ["requirements-dev.txt"]  # the environment of this test has no pytest
    assert clone("test", expected=1)[2] == clone("--version")[2] == []
    shutil.rmtree(clone.folder / ".venv")
    assert clone("test", expected=1)[2] == ["requirements-dev.txt"]
    assert clone("--version")[2] == []


@pytest.mark.slow
def test_the_command_works_everywhere_also_by_a_link_and_after_the_clone_is_moved(clone, tmp_path):
    clone("--version")
    moved = tmp_path / "moved"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for folder in (clone.folder, moved):
        if folder == moved:
            clone.folder.rename(moved)
        script, link = folder / ".venv" / "bin" / "vit-jax", tmp_path / folder.name / "vit-jax"
        link.symlink_to(script)
        python = script.with_name("python")
        for command in ([python, "-m", "vit_jax"], [script], [link]):
            done = subprocess.run([*command, "--version"], cwd="/", capture_output=True, text=True, env=environment)
            assert (done.stdout, done.stderr) == (f"vit_jax {__version__}\n", "")
        link.unlink()
        found = [python, "-c", "import vit_jax; print(vit_jax.__file__)"]
        done = subprocess.run(found, cwd="/", capture_output=True, text=True, env=environment)
        assert done.stdout == f"{folder}/vit_jax/__init__.py\n"


@pytest.mark.slow
def test_two_first_calls_at_once_install_once(clone):
    command = ["bash", str(clone.folder / "run.sh"), "--version"]
    Path(clone.environment["CALLS"]).write_text("")
    both = [subprocess.Popen(command, env=clone.environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [one.communicate(timeout=60)[0] for one in both] == [f"vit_jax {__version__}\n"] * 2
    assert Path(clone.environment["CALLS"]).read_text().count("\n") == 1


@pytest.mark.slow
def test_arguments_are_those_of_vit_jax_and_options_those_of_training(clone):
    assert clone("help")[0].startswith("Vision Transformers in JAX and Flax.\n")
    assert "nearest: predict" in clone("pred", "--workdir=x", expected=2)[1]
    text, _, installed = clone("--help")
    assert "./run.sh COMMAND ..." in text and installed == []
    # Training needs packages that the environment of this test does not have.
    assert "No module named" in clone("--config=digits", expected=1)[1]
    assert "vit_jax/main.py" in clone("--workdir=x", expected=1)[1]
