"""The content of environment.json: versions, devices, command, git revision."""

import dataclasses
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from vit_jax.errors import one_line
from vit_jax.runtime.attention_choice import Choice

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "tensorflow-datasets",
    "ml-collections",
    "clu",
)


def environment(attention: Choice | None = None) -> dict[str, Any]:
    """Returns versions, devices, command, git revision and attention backend of a run; an unknown value says why."""
    facts: dict[str, Callable[[], Any]] = {
        "command": lambda: " ".join([Path(sys.executable).name, *sys.orig_argv[1:]]),
        "python": platform.python_version,
        "platform": platform.platform,
        "packages": lambda: {name: _fact(lambda name=name: metadata.version(name)) for name in PACKAGES},
        "backend": jax.default_backend,
        "devices": lambda: [device.device_kind for device in jax.devices()],
        "cpus": os.cpu_count,
        "processes": jax.process_count,
        "git": git_revision,
        "attention": lambda: None if attention is None else dataclasses.asdict(attention),
    }
    return {name: _fact(f) for name, f in facts.items()}


def _fact(f: Callable[[], Any]) -> Any:
    """Returns what `f` returns, or the error if it raises: facts about the machine must never end a run."""
    try:
        return f()
    except Exception as error:
        return f"unknown: {one_line(f'{type(error).__name__}: {error}')}"


def git_revision() -> str | None:
    """Returns the git revision of this code, with '+changed' if files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return git("rev-parse", "HEAD") + ("+changed" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
