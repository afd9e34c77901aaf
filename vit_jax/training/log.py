"""From what the devices return to lines of metrics.jsonl and of progress."""

import jax

from vit_jax import optim
from vit_jax.checkpoint import run_files
from vit_jax.training.metrics import MetricsWriter
from vit_jax.training.plan import Chunk
from vit_jax.training.progress import Progress
from vit_jax.training.setup import Experiment
from vit_jax.training.step import BURST
from vit_jax.training.throughput import Throughput


class NonFiniteBurst(Exception):
    """`BURST` steps in a row, or the last steps of the run, had a non-finite loss or gradient."""


class Log:
    """Reads the metrics of each chunk of steps, shows the progress and writes what is to be logged.

    Attributes:
        throughput: counts the seconds of training.
        rolled_back_from: the step from which the run has returned to a checkpoint, until that is logged; else None.
    """

    def __init__(
        self,
        experiment: Experiment,
        writer: MetricsWriter,
        progress: Progress,
        throughput: Throughput,
        rolled_back_from: int | None = None,
    ):
        """Logs to `writer` and `progress`."""
        self.throughput, self.rolled_back_from = throughput, rolled_back_from
        self._experiment, self._writer, self._progress = experiment, writer, progress
        self._unread: tuple[Chunk, dict[str, jax.Array]] | None = None

    def push(self, chunk: Chunk, sums: dict[str, jax.Array], wait: bool) -> dict[str, float]:
        """Logs the chunk before this one, so that the devices never wait for the host; with `wait` this one as well.

        Args:
            chunk: the chunk that has just been dispatched.
            sums: what it returns; of `step.readout`.
            wait: whether to wait for it.

        Returns:
            The metrics of a chunk after which the devices wait, not yet written; {} otherwise.

        Raises:
            NonFiniteBurst: a burst of non-finite steps has ended a chunk.
        """
        self.read_pending()
        self._unread = (chunk, sums)
        return self.read_pending() if wait else {}

    def read_pending(self) -> dict[str, float]:
        """Logs the chunk that has not been read yet, if any; returns and raises as `push`."""
        if self._unread is None:
            return {}
        (chunk, sums), self._unread = self._unread, None
        metrics = self.show(chunk, sums)
        if chunk.waits:
            return metrics
        self.write(chunk.end, metrics)
        return {}

    def show(self, chunk: Chunk, sums: dict[str, jax.Array]) -> dict[str, float]:
        """Waits for a chunk and shows the progress; returns its metrics, {} if it does not end at a log step."""
        sums = {name: value.item() for name, value in jax.device_get(sums).items()}
        if sums["nonfinite_streak"] >= (1 if chunk.end == self._experiment.num_steps else BURST):
            raise NonFiniteBurst
        names = self._experiment.objective.metrics if sums["count"] else ()
        metrics = {f"train/{name}": sums[name] / sums["count"] for name in names}
        metrics["train/learning_rate"] = optim.learning_rate(self._experiment.schedule, max(sums["updates"] - 1, 0))
        if sums["skipped"]:
            metrics["train/skipped"] = sums["skipped"]
        if chunk.logs and self.rolled_back_from is not None:
            metrics["train/rolled_back_from"] = self.rolled_back_from
        metrics |= self.throughput.speed(chunk.end, mark=chunk.logs)
        seconds_left = self.throughput.time_left(chunk.end, self._experiment.num_steps)
        self._progress.show(chunk.end, metrics, seconds_left, chunk.logs)
        return metrics if chunk.logs else {}

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Appends the metrics of a step to metrics.jsonl as one line; nothing if there are none."""
        if not metrics:
            return
        reason = self._writer.write(step, metrics)
        if "train/rolled_back_from" in metrics:
            self.rolled_back_from = None
        if reason is not None:
            self._progress.say(f"warning: {run_files.METRICS} cannot be written, will retry: {reason}")

    def rewind(self, step: int, failed: int) -> None:
        """Drops the lines after `step`, to which the run was rolled back from step `failed`."""
        self._unread, self.rolled_back_from = None, failed
        self._writer.truncate(step)
        self.throughput.rewind(step)

    def flush(self) -> str | None:
        """Writes all lines to the disk; returns None, or why that is not possible yet."""
        reason = self._writer.flush()
        return None if reason is None else f"{run_files.METRICS} cannot be written: {reason}"
