"""The run of one seed in progress: its state, and where it reports and saves."""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from vit_jax.sharding import multihost
from vit_jax.training import describe
from vit_jax.training.log import Log, NonFiniteBurst
from vit_jax.training.progress import Progress
from vit_jax.training.recovery import Recovery
from vit_jax.training.run_record import RunRecord
from vit_jax.training.saving import Saver
from vit_jax.training.setup import Experiment
from vit_jax.training.shutdown import StopRequest
from vit_jax.training.state import TrainState


@dataclasses.dataclass
class Run:
    """The run of one seed.

    Attributes:
        experiment: what is trained.
        seed: of the run.
        state: after the last dispatched step.
        stop: says whether a stop was requested.
        progress: prints lines.
        log: writes metrics.
        saver: saves checkpoints.
        recovery: returns to a checkpoint after non-finite steps.
        record: writes the files that describe the run.
        logged: False between a step after which the run evaluates and that step's line in metrics.jsonl.
        results: metrics of the last evaluation.
        evaluated: metrics of the last evaluation of every split.
    """

    experiment: Experiment
    seed: int
    state: TrainState
    stop: StopRequest
    progress: Progress
    log: Log
    saver: Saver
    recovery: Recovery
    record: RunRecord
    logged: bool = True
    results: dict[str, float | int] = dataclasses.field(default_factory=dict)
    evaluated: dict[str, float | int] = dataclasses.field(default_factory=dict)

    @property
    def step(self) -> int:
        """Number of steps taken; waits for the devices."""
        return int(self.state.step)

    def stop_requested(self) -> bool:
        """Returns whether to stop; all processes of a cluster must call this after the same step."""
        return multihost.any_of(self.stop.reason is not None)

    def evaluate(self, role: str) -> dict[str, float | int]:
        """Evaluates a whole split, prints and returns its metrics.

        Raises:
            Interrupted: a stop was requested.
        """
        self.results, predictions = self.experiment.evaluate(self.state.for_evaluation(), role, self.stop_requested)
        self.evaluated |= self.results
        line = self.experiment.objective.describe(role, self.results, self.experiment.module)
        self.progress.tell(f"step {self.step}/{self.experiment.num_steps}  {role}: {line}")
        if self.step == self.experiment.num_steps and self.experiment.config.data.name == "folder":
            for head in predictions.values():
                self.progress.tell(describe.classes(head))
        return self.results

    def metadata(self) -> dict[str, Any]:
        """Returns the metadata of a checkpoint: config and changes, seconds of training, and the state of the log."""
        of_log = {"settled": self.logged, "rolled_back_from": self.log.rolled_back_from}
        return {**self.record.at(self.step), "seconds": self.log.throughput.seconds(), **of_log}

    def save(self, metrics: dict[str, float]) -> None:
        """Starts to save the state, ranked by the primary metric if it is among the metrics."""
        self.saver.save(self.state, self.metadata(), metrics)
        if not int(self.state.nonfinite_streak):
            self.recovery.rollbacks = 0

    def save_and_stop(self, workdir: Path) -> None:
        """Saves, and says how to resume."""
        self.log.throughput.pause()
        with contextlib.suppress(NonFiniteBurst):  # the resumed run finds it again
            self.log.read_pending()
        if not self.saver.has(self.step):
            self.save({})
        self.saver.finish(self.state, self.metadata())
        reason = self.stop.reason or "requested in another process"
        self.progress.say(
            f"stopped at step {self.step:,} of {self.experiment.num_steps:,} ({reason}); saved in {workdir}: run the "
            "same command again to resume"
        )
