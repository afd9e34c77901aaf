"""metrics.jsonl and TensorBoard events of a run, and its tracker."""

import contextlib
import json
from pathlib import Path
from typing import Any

from vit_jax import atomic
from vit_jax.checkpoint import run_files
from vit_jax.training import tensorboard
from vit_jax.training.records import RecordFile
from vit_jax.training.trackers import FAILED, FINISHED, STOPPED, Tracker


class MetricsWriter:
    """Writes one line per step to metrics.jsonl, and the same metrics as TensorBoard events and to a tracker.

    Lines that cannot be written, because the disk is full for example, are kept and written later.
    """

    def __init__(
        self, workdir: Path, step: int, tensorboard: bool, enabled: bool = True, tracker: Tracker | None = None
    ):
        """Opens the files and drops the records of later steps, which the run will repeat.

        Args:
            workdir: the run directory.
            step: the last step whose metrics are kept.
            tensorboard: whether to write TensorBoard events too.
            enabled: False to write nothing.
            tracker: also gets the metrics; what it has of later steps stays.

        Raises:
            OSError: a file cannot be opened or written.
        """
        self._tracker, self._summary = tracker, None
        self._path, self._enabled, self._tensorboard = workdir / run_files.METRICS, enabled, tensorboard
        self._file = self._events = None
        self._open(step)

    def _open(self, step: int) -> None:
        if not self._enabled:
            return
        truncate(self._path, step)
        self._file = RecordFile(self._path)
        if self._tensorboard:
            for path in self._path.parent.glob("events.out.tfevents.*"):
                tensorboard.truncate(path, step)
            self._events = tensorboard.EventFile(self._path.parent)

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
        if self._tracker is not None:
            state = FAILED if kind is not None else STOPPED if self._summary is None else FINISHED
            self._tracker.finish(state, self._summary or {})

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Returns the summary of a finished run, which the tracker gets at the end."""
        self._summary = summary
        return summary

    def write(self, step: int, metrics: dict[str, float]) -> str | None:
        """Appends the metrics of a step; returns None, or why they could not be written yet."""
        if self._tracker is not None:
            self._tracker.log(step, metrics)
        if self._file is None:
            return None
        if self._events is not None:
            with contextlib.suppress(OSError):  # metrics.jsonl is on the same disk and reports the error
                self._events.add(step, metrics)
        try:
            self._file.append((atomic.to_json({"step": step, **metrics}) + "\n").encode())
        except OSError as error:
            return error.strerror
        return None

    def truncate(self, step: int) -> None:
        """Drops everything after `step`, to which the run has been rolled back.

        Raises:
            OSError: a file cannot be opened or written.
        """
        if self._file is not None:
            self.close()
            self._open(step)

    def flush(self) -> str | None:
        """Writes everything to the disk, so that a checkpoint saved afterwards never has more than the metrics.

        Returns None, or why that is not possible yet.
        """
        try:
            for file in (self._file, self._events):
                if file is not None:
                    file.sync()
        except OSError as error:
            return error.strerror
        return None

    def close(self) -> None:
        """Writes what is left, and closes the files."""
        self.flush()
        for file in (self._file, self._events):
            if file is not None:
                file.close()


def truncate(path: Path, step: int) -> None:
    """Drops the lines of metrics.jsonl after `step`, and lines that are no records, such as a partial last one.

    The file is always a new one: a process that was stopped, and wakes up after this one has taken its run over, still
    writes to the old one.
    """
    kept = []
    for line in path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else ():
        try:
            is_later = json.loads(line)["step"] > step
        except (ValueError, TypeError, KeyError):  # such as an empty line that an editor has left
            continue
        if not is_later and line.endswith("\n"):
            kept.append(line)
    atomic.write_bytes(path, "".join(kept).encode())
