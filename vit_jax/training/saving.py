"""When a run saves a checkpoint: on schedule, at a new best, after a failed save, and at its end."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import jax

from vit_jax.checkpoint.manager import CheckpointManager, SaveFailed, ranking_score
from vit_jax.errors import UserError, one_line
from vit_jax.objectives.base import PrimaryMetric
from vit_jax.progress import Counter
from vit_jax.sharding import multihost
from vit_jax.training.state import TrainState

RETRY_SECONDS = 30.0
FINAL_ATTEMPTS = 3


class Saver:
    """Saves states in the background, and retries saves that failed."""

    def __init__(
        self,
        checkpoints: CheckpointManager,
        primary: PrimaryMetric,
        keep_best: int,
        say: Callable[[str], Any],
        before_save: Callable[[], str | None],
    ):
        """Saves to `checkpoints`.

        Args:
            checkpoints: of the run.
            primary: metric of the validation split by which checkpoints are ranked.
            keep_best: number of best checkpoints that are kept.
            say: prints a line.
            before_save: is called before each save, to bring to the disk what must be there first; returns None, or why
                that is not possible, and then there is no save.
        """
        self._checkpoints, self._primary, self._keep_best, self._say = checkpoints, primary, keep_best, say
        self._before_save = before_save
        self._metric = f"validation/{primary.name}"
        self._scores: dict[str, float] = {}  # what the newest checkpoint is ranked by
        self._retry_at: float | None = None
        self._reason = "the checkpoint is missing"  # why the last save failed

    def is_best(self, metrics: dict[str, float]) -> bool:
        """Returns whether these metrics hold a better value of the primary metric than every checkpoint."""
        if not self._keep_best or self._metric not in metrics:
            return False
        self.wait()
        best = multihost.on_rank_0(self._checkpoints.best)
        score = ranking_score({self._metric: metrics[self._metric]}, self._primary.higher_is_better)
        return score is not None and (best is None or score > best[1])

    def save(self, state: TrainState, metadata: dict[str, Any], metrics: dict[str, float]) -> None:
        """Starts a save; if the one before it failed, says so and schedules a retry."""
        if (reason := multihost.on_rank_0(self._before_save)) is not None:
            self._warn(SaveFailed(reason))
            return
        self._retry_at = None
        self._scores = {self._metric: metrics[self._metric]} if self._metric in metrics else {}
        try:
            arrays = state.to_arrays()
            self._checkpoints.save(arrays, metadata, self._scores, self._primary.higher_is_better)
        except SaveFailed as error:
            self._warn(error)

    def needs_retry(self) -> bool:
        """Returns whether a save has failed and it is time to try again."""
        if not self._checkpoints.is_saving():
            self.wait()
        return self._retry_at is not None and multihost.on_rank_0(lambda: time.monotonic() > self._retry_at)

    def has(self, step: int) -> bool:
        """Returns whether a step's checkpoint is on disk."""
        return multihost.on_rank_0(lambda: self._checkpoints.has(step))

    def finish(self, state: TrainState, metadata: dict[str, Any]) -> None:
        """Returns once the checkpoint of `state` is on disk.

        Raises:
            UserError: it is not after several attempts.
        """
        step = int(state.step)
        for attempt in range(FINAL_ATTEMPTS):
            try:
                with Counter(f"saving the checkpoint of step {step:,}", enabled=multihost.is_rank_0()):
                    self._checkpoints.wait()
                if self.has(step):
                    return
                reason = self._reason
            except SaveFailed as error:
                reason = str(error)
            if attempt:
                time.sleep(2**attempt)
            self.save(state, metadata, self._scores)
        with contextlib.suppress(SaveFailed):
            self._checkpoints.wait()
        if not self.has(step):
            steps = [step for step in self._checkpoints.steps() if self._checkpoints.has(step)]
            newest = (
                f"the newest checkpoint is that of step {steps[-1]:,}" if steps else "there is no earlier checkpoint"
            )
            raise UserError(
                f"the last checkpoint, of step {step:,}, could not be saved: {reason}\n"
                f"  {newest}; fix the cause (disk full?) and run the same command again"
            )

    def rescue(self, state: TrainState, metadata: Callable[[], dict[str, Any]]) -> None:
        """Saves the state before an unrelated error ends the run, with what `metadata` returns; best effort."""
        # In a cluster the other processes, which must take part in a save, may not have failed.
        if jax.process_count() > 1:
            return
        try:
            step = int(state.step)
            if step and not self.has(step):
                self.save(state, metadata(), {})
                self._checkpoints.wait()
                if self.has(step):
                    self._say(f"step {step:,} is saved")
        except Exception as error:  # the error that ends the run is the one to report
            self._say(f"warning: the state at this error could not be saved: {one_line(error)}")

    def wait(self) -> None:
        """Waits for the save in progress; if it failed, says so and schedules a retry."""
        try:
            self._checkpoints.wait()
        except SaveFailed as error:
            self._warn(error)

    def _warn(self, error: SaveFailed) -> None:
        self._say(f"warning: checkpoint save failed, will retry: {error}")
        self._reason, self._retry_at = str(error), time.monotonic() + RETRY_SECONDS
