"""run.sh on machines that are set up in other ways: one clear line on standard error, and exit status 2."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import ROOT

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
