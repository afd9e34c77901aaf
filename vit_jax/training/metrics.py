"""metrics.jsonl and TensorBoard events of a run."""

import contextlib
import json
import os
from pathlib import Path

from vit_jax.checkpoint import run_files
from vit_jax.training import tensorboard


class MetricsWriter:
    """metrics.jsonl and, beside it, TensorBoard events: one line, one step. With enabled=False, nothing is written."""

    def __init__(self, workdir: Path, step: int, tensorboard: bool, enabled: bool = True):
        """Opens the records of a run that stands at `step`; lines of later steps, which it will repeat, are cut off."""
        self._path, self._enabled, self._tensorboard = workdir / run_files.METRICS, enabled, tensorboard
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
                tensorboard.cut_back(path, step)
            self._writer = tensorboard.EventFile(self._path.parent)

    def __enter__(self) -> "MetricsWriter":
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
