"""metrics.jsonl and TensorBoard events of a run."""

import contextlib
import json
import os
from pathlib import Path

from vit_jax import atomic
from vit_jax.checkpoint import run_files
from vit_jax.training import tensorboard


class MetricsWriter:
    """Writes one line per step to metrics.jsonl, and the same metrics as TensorBoard events.

    Lines that cannot be written, because the disk is full for example, are kept and written later.
    """

    def __init__(self, workdir: Path, step: int, tensorboard: bool, enabled: bool = True):
        """Opens the files and drops the records of later steps, which the run will repeat.

        Args:
            workdir: the run directory.
            step: the last step whose metrics are kept.
            tensorboard: whether to write TensorBoard events too.
            enabled: False to write nothing.
        """
        self._path, self._enabled, self._tensorboard = workdir / run_files.METRICS, enabled, tensorboard
        self._file = self._events = None
        self._backlog: list[str] = []
        self._open(step)

    def _open(self, step: int) -> None:
        if not self._enabled:
            return
        truncate(self._path, step)
        self._file = open(self._path, "a")  # noqa: SIM115
        self._complete_size = self._file.seek(0, os.SEEK_END)
        if self._tensorboard:
            for path in self._path.parent.glob("events.out.tfevents.*"):
                tensorboard.truncate(path, step)
            self._events = tensorboard.EventFile(self._path.parent)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, metrics: dict[str, float]) -> str | None:
        """Appends the metrics of a step; returns None, or why they could not be written yet."""
        if self._file is None:
            return None
        self._backlog.append(json.dumps({"step": step, **metrics}) + "\n")
        if self._events is not None:
            with contextlib.suppress(OSError):  # metrics.jsonl is on the same disk and reports the error
                self._events.add(step, metrics)
        return self._write_backlog()

    def _write_backlog(self) -> str | None:
        text = "".join(self._backlog)
        try:
            self._file.truncate(self._complete_size)  # drops a partial line of an earlier attempt
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            self._reopen()
            return error.strerror
        self._complete_size += len(text.encode())
        self._backlog.clear()
        return None

    def _reopen(self) -> None:
        # The failed file's buffer would be written, in part, when it is closed: it goes to /dev/null.
        descriptor = os.open(os.devnull, os.O_WRONLY)
        os.dup2(descriptor, self._file.fileno())
        os.close(descriptor)
        self._file.close()
        self._file = open(self._path, "a")  # noqa: SIM115

    def truncate(self, step: int) -> None:
        """Drops everything after `step`, to which the run has been rolled back."""
        if self._file is None:
            return
        self.close()
        self._backlog.clear()
        self._open(step)

    def flush(self) -> None:
        """Writes everything to the disk, so that a checkpoint saved afterwards never has more than the metrics."""
        if self._file is not None:
            if self._backlog:
                self._write_backlog()
            with contextlib.suppress(OSError):  # saving the checkpoint reports the error
                os.fsync(self._file.fileno())
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.flush()

    def close(self) -> None:
        """Writes what is left, and closes the files."""
        if self._file is not None:
            if self._backlog:
                self._write_backlog()
            with contextlib.suppress(OSError):
                self._file.close()
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.flush()
            self._events.close()


def truncate(path: Path, step: int) -> None:
    """Drops the lines of metrics.jsonl after `step`, and a partial last line whose writer was killed."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines(keepends=True):
        try:
            is_later = json.loads(line)["step"] > step
        except (ValueError, TypeError, KeyError):
            break
        if is_later or not line.endswith("\n"):
            break
        kept.append(line)
    atomic.write_bytes(path, "".join(kept).encode())
