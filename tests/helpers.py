"""What many tests use: a tiny config, commands in separate processes, and the files of a run directory."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vit_jax import config as options

ROOT = Path(__file__).resolve().parents[1]
# With VIT_JAX_TEST_THOROUGH=1 tests that repeat themselves run all their cases; otherwise a few, to save time.
THOROUGH = bool(os.environ.get("VIT_JAX_TEST_THOROUGH"))
NO_REPORT = "--config.log.report=False"  # of runs in other processes; in this one, see conftest.py
TINY = {"variant": "Ti/4", "width": 16, "depth": 1, "heads": 2, "mlp_width": 16}


def mostly_slow(values, every: int) -> list:
    """The values as parameters of a test: every so many-th is quick, the others are marked slow."""
    return [value if i % every == 0 else pytest.param(value, marks=pytest.mark.slow) for i, value in enumerate(values)]


def tiny_config(*defaults: dict, **sections):
    """A config of a model that compiles in a second or two, with the options of `defaults` and `sections` set.

    Each is a dictionary of options by section, `defaults` those of a test file; the later one wins.
    """
    config = options.default()
    config.model.update(TINY)
    config.train.update(batch_size=64, steps=20)
    config.mesh.devices, config.log.tensorboard, config.log.report = 1, False, False
    for options_by_section in (*defaults, sections):
        for section, values in options_by_section.items():
            config[section].update(values)
    return config


def flags(**sections) -> list[str]:
    """The same options as arguments of a command: `flags(train={"steps": 3})` is ["--config.train.steps=3"]."""
    return [
        f"--config.{section}.{key}={value}" for section, values in sections.items() for key, value in values.items()
    ]


def start_command(
    program: str | Path,
    *arguments,
    cwd: Path = ROOT,
    python: str = sys.executable,
    stdin: int | None = subprocess.DEVNULL,
    stderr: int | None = subprocess.STDOUT,
    **variables,
) -> subprocess.Popen:
    """Starts a module (by name), a script (by path) or code (what contains a newline) with one CPU device.

    All processes of a session share a compilation cache, unless `variables` (of the environment) give XDG_CACHE_HOME.
    The output has what goes to stderr as well, unless `stderr` is another one of the constants of `subprocess`.
    Training writes no report at its end.
    """
    environment = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "PYTHONPATH")}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    if "XDG_CACHE_HOME" in variables:
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    else:
        environment["XDG_CACHE_HOME"] = f"{environment['JAX_COMPILATION_CACHE_DIR']}/home"
    how = [] if isinstance(program, Path) else ["-c"] if "\n" in program else ["-m"]
    if program == "vit_jax.main" or (program == "vit_jax" and arguments[0] == "train"):
        arguments = (*arguments, NO_REPORT)
    command = [python, *how, program, *arguments]
    pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": stderr, "text": True}
    return subprocess.Popen([str(part) for part in command], cwd=cwd, env=environment | variables, **pipes)


def finish(process: subprocess.Popen, status: int | tuple[int, ...] = 0, timeout: float = 300) -> str:
    """Waits for a process and checks its exit status; its output."""
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    assert process.returncode in (status if isinstance(status, tuple) else (status,)), f"{output}{errors or ''}"
    return output


def run_command(program: str | Path, *arguments, status: int = 0, timeout: float = 300, **more) -> str:
    """Runs a command as `start_command` starts it; its output. The exit status must be `status`."""
    return finish(start_command(program, *arguments, **more), status, timeout)


def wait_until(process: subprocess.Popen, condition: Callable[[], bool], timeout: float = 300) -> None:
    """Waits until a condition holds or the process has ended."""
    end = time.monotonic() + timeout
    while process.poll() is None and not condition():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.001)


def kill(process: subprocess.Popen) -> None:
    """Kills a process (SIGKILL) and waits for its end."""
    process.kill()
    process.communicate()


def num_records(workdir: Path) -> int:
    """Number of lines of metrics.jsonl; 0 before there is such a file."""
    try:
        return (workdir / "metrics.jsonl").read_text().count("\n")
    except FileNotFoundError:
        return 0


def read_metrics(workdir: Path) -> list[dict]:
    """The records of metrics.jsonl without the speed, which depends on the machine and not on the seed."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("images_per_second", "mfu")} for line in lines]


def saved_state(workdir: Path, step: int) -> dict:
    """The arrays of a checkpoint, as nested dictionaries."""
    from orbax.checkpoint import v1 as ocp

    return ocp.load_checkpointables(workdir / "checkpoints" / str(step))["state"]


def read_json_lines(text: str) -> list[dict]:
    """The JSON objects in the output of a command, one per line; other lines are skipped."""
    return [json.loads(line) for line in text.splitlines() if line.startswith('{"')]
