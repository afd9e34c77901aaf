"""What a run leaves behind and shows: metrics.jsonl, TensorBoard events, config.json, environment.json, progress."""

import contextlib
import dataclasses
import io
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from vit_jax.training import events
from vit_jax.training.attention_choice import Choice

METRICS = "metrics.jsonl"
CONFIG = "config.json"
ENVIRONMENT = "environment.json"
SUMMARY = "summary.json"
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


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file whole or not at all."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    with open(scratch, "w") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def environment(attention: Choice | None = None) -> dict[str, Any]:
    """Versions, devices, command, git revision and attention backend of a run; None for what cannot be found out."""
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
    return {name: _fact(find) for name, find in facts.items()}


def _fact(find: Callable[[], Any]) -> Any:
    """What `find` returns; None where it fails: facts about a machine must never end a run on it."""
    try:
        return find()
    except Exception:
        return None


def git_revision() -> str | None:
    """The revision of the code, '+changed' behind it where files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return None
        return git("rev-parse", "HEAD") + ("+changed" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


class Records:
    """metrics.jsonl and, beside it, TensorBoard events: one line, one step. With enabled=False, nothing is written."""

    def __init__(self, workdir: Path, step: int, tensorboard: bool, enabled: bool = True):
        """Opens the records of a run that stands at `step`; lines of later steps, which it will repeat, are cut off."""
        self._path, self._enabled, self._tensorboard = workdir / METRICS, enabled, tensorboard
        self._file = self._writer = None
        self._backlog: list[str] = []
        self._open(step)

    def _open(self, step: int) -> None:
        if not self._enabled:
            return
        cut_back(self._path, step)
        self._file = open(self._path, "a")  # noqa: SIM115
        self._whole = self._file.seek(0, os.SEEK_END)
        if self._tensorboard:
            for path in self._path.parent.glob("events.out.tfevents.*"):
                events.cut_back(path, step)
            self._writer = events.EventFile(self._path.parent)

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, metrics: dict[str, float]) -> str | None:
        """Appends one line; it is with the operating system when this returns None.

        Where the disk is full, the line is kept and written with a later one; why is returned.
        """
        if self._file is None:
            return None
        self._backlog.append(json.dumps({"step": step, **metrics}) + "\n")
        if self._writer is not None:
            with contextlib.suppress(OSError):  # the line, which meets the same disk, will tell
                self._writer.add(step, metrics)
        return self._write_backlog()

    def _write_backlog(self) -> str | None:
        text = "".join(self._backlog)
        try:
            self._file.truncate(self._whole)  # what an earlier attempt left of a line
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            # The buffer of the failed file would be written again, in part, at any later chance.
            self._reopen()
            return error.strerror
        self._whole += len(text.encode())
        self._backlog.clear()
        return None

    def _reopen(self) -> None:
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, self._file.fileno())
        os.close(descriptor)
        self._file.close()
        self._file = open(self._path, "a")  # noqa: SIM115

    def cut_back(self, step: int) -> None:
        """Drops all lines beyond `step`: the run has gone back to it."""
        if self._file is None:
            return
        self.close()
        self._backlog.clear()
        self._open(step)

    def flush(self) -> None:
        """Brings all lines to the disk: what stands before a checkpoint must not be lost with the machine."""
        if self._file is not None:
            if self._backlog:
                self._write_backlog()
            with contextlib.suppress(OSError):  # the checkpoint that follows will tell
                os.fsync(self._file.fileno())
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.flush()

    def close(self) -> None:
        """Flushes and closes both."""
        if self._file is not None:
            if self._backlog:
                self._write_backlog()
            with contextlib.suppress(OSError):
                self._file.close()
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.flush()
            self._writer.close()


def cut_back(path: Path, step: int) -> None:
    """Drops the lines of metrics.jsonl beyond `step`, and a last line that was cut short when its writer was killed."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        try:
            beyond = json.loads(line)["step"] > step
        except (ValueError, TypeError, KeyError):
            break
        if beyond or not line.endswith("\n"):
            break
        kept.append(line)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text("".join(kept))
    os.replace(scratch, path)


class Progress:
    """One line that is overwritten in a terminal; elsewhere a plain line for each record."""

    def __init__(
        self,
        steps: int,
        steps_an_epoch: float,
        stream: io.TextIOBase | None = None,
        enabled: bool = True,
        name: str = "",
        live: bool = True,
    ):
        """Of a run of so many steps.

        Args:
            steps: of the run.
            steps_an_epoch: of them.
            stream: where to; None for standard output.
            enabled: False to show nothing.
            name: of the run, which every line then begins with; '' for none.
            live: False for plain lines in a terminal too.
        """
        self._steps, self._steps_an_epoch = steps, steps_an_epoch
        self._stream, self._enabled = stream or sys.stdout, enabled
        self._live = live and self._stream.isatty()
        self._name = f"{name}: " if name else ""
        self._open = False

    def show(self, step: int, metrics: dict[str, float], seconds_left: float, recorded: bool) -> None:
        """Shows where the run stands. Off a terminal only what is `recorded` is shown."""
        if not self._enabled or not (recorded or self._live):
            return
        width = _terminal_width() - len(self._name) if self._live else None
        text = self._name + progress_line(step, self._steps, step / self._steps_an_epoch, metrics, seconds_left, width)
        self._print(f"\r\x1b[K{text}" if self._live else text + "\n")
        self._open = self._live

    def say(self, text: str) -> None:
        """Prints a line of its own, below the live one."""
        if self._enabled:
            self._print(("\n" if self._open else "") + self._name + text + "\n")
        self._open = False

    def _print(self, text: str) -> None:
        # A terminal that was closed, or a pipe that nobody reads any more, is no reason to stop training.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()


def _terminal_width() -> int:
    try:
        return os.get_terminal_size().columns
    except OSError:
        return 120


def progress_line(
    step: int, steps: int, epoch: float, metrics: dict[str, float], seconds_left: float, width: int | None = None
) -> str:
    """'step 200/4400  epoch 17.9  loss 0.5120  accuracy 91.2 %  rate 9.80e-04  1,234 images/s  left 1:05'.

    Where the terminal is narrower, the learning rate, then the epoch, then the MFU give way.
    """
    parts = {
        "step": f"step {step:>{len(str(steps))}}/{steps}",
        "epoch": f"epoch {epoch:.1f}",
        "loss": f"loss {metrics.get('train/loss', math.nan):.4f}",
        "accuracy": f"accuracy {100 * metrics.get('train/accuracy', math.nan):.1f} %",
        "rate": f"rate {metrics['train/learning_rate']:.2e}",
        "speed": f"{metrics.get('images_per_second', math.nan):,.0f} images/s",
    }
    if "train/loss" in metrics and "train/accuracy" not in metrics:  # not every run has one
        del parts["accuracy"]
    if "mfu" in metrics:
        parts["mfu"] = f"MFU {100 * metrics['mfu']:.1f} %"
    parts["left"] = f"left {clock(seconds_left)}"
    for name in ("rate", "epoch", "mfu"):
        if width is not None and len("  ".join(parts.values())) >= width:
            parts.pop(name, None)
    # A line as wide as the terminal would wrap, and could not be overwritten.
    return "  ".join(parts.values())[: width and width - 1]


def clock(seconds: float) -> str:
    """'1:05' or '2:03:20'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
