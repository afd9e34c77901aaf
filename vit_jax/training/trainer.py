"""One run, step by step: dispatch some, record, evaluate and save where it is due, go back behind bad numbers."""

import contextlib
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview

from vit_jax import atomic, optim, sharding, weights
from vit_jax.checkpoint import run_files
from vit_jax.checkpoint.manager import Checkpoints, SaveFailed, goodness
from vit_jax.data import pipeline
from vit_jax.errors import UserError
from vit_jax.evaluation import exact
from vit_jax.objectives.base import Objective
from vit_jax.optim import trainable
from vit_jax.runtime import hardware, profiling
from vit_jax.sharding import multihost
from vit_jax.training import nonfinite, progress, setup
from vit_jax.training.metrics import MetricsWriter
from vit_jax.training.program import Program
from vit_jax.training.setup import Run
from vit_jax.training.shutdown import Stop
from vit_jax.training.state import TrainState
from vit_jax.training.step import BURST, record
from vit_jax.training.throughput import Clock, Meter

WRITTEN = (
    run_files.SUMMARY,
    run_files.METRICS,
    run_files.CONFIG,
    run_files.ENVIRONMENT,
    "TensorBoard events",
    "checkpoints/",
)
DISPATCH = 0.4  # seconds that a dispatch may take, so that a run stops soon when it is asked to
RETRY = 30.0  # seconds until a save that did not land is tried again
ATTEMPTS = 3  # at the last save
ROLLBACKS = 3  # without a save in between, before a run gives up


class Asked(Exception):
    """The run has been asked to stop."""


class Burst(Exception):
    """So many steps in a row had bad numbers that the device has stopped."""


def describe(objective: Objective, summary: dict[str, Any]) -> str:
    """'test accuracy 97.50 % (351 of 360) after 4,490 steps, 1:11 of training'."""
    seconds = progress.clock(summary["seconds"])
    return f"{objective.summary_line(summary)} after {summary['steps']:,} steps, {seconds} of training"


class Trainer:
    """One run, from its newest checkpoint or its start to its end."""

    def __init__(
        self,
        run: Run,
        program: Program,
        folder: Path,
        checkpoints: Checkpoints,
        stop: Stop,
        name: str = "",
        beside: int = 1,
        clock: Clock | None = None,
    ):
        """Brings the state to the devices.

        Args:
            run: the parts.
            program: of a run that differs in its seed at most.
            folder: the workdir.
            checkpoints: of that workdir.
            stop: says when to stop.
            name: what lines that are shown begin with.
            beside: how many runs, this one among them, take their steps at once, in one program.
            clock: which these have in common; None for one of its own.
        """
        self.run, self.config, self.folder, self.checkpoints, self.stop = run, run.config, folder, checkpoints, stop
        self.program, self.beside = program, beside
        self.progress = progress.Progress(
            run.steps, run.steps_per_epoch, enabled=multihost.is_rank_0(), name=name, live=beside == 1
        )
        # Where all there were were damaged, nothing is begun anew without a word.
        resumed = multihost.on_rank_0(lambda: bool(checkpoints.steps() or checkpoints.set_aside()))
        self.state: TrainState = checkpoints.restore_newest(run.abstract_state()) if resumed else self._start()
        self.step, self.shift = int(self.state.step), int(self.state.shift)
        metadata = multihost.on_rank_0(lambda: checkpoints.metadata(self.step)) if resumed else {}
        # Whether the line of metrics of this step has been written: not where a stop came in between.
        self.settled = metadata.get("settled", True)
        self.rollbacks, self.rolled_back_from = 0, metadata.get("rolled_back_from")
        if resumed and self.config.data.features:
            setup.check_features(self.config, self.state.for_evaluation(), run.sources)
        self.pending: tuple[int, dict[str, jax.Array]] | None = None
        self.scores: dict[str, float] = {}
        self.retry_at: float | None = None
        self.given_up = False
        self.tested: dict[str, float | int] = {}
        self.schedule = optim.schedule(self.config.optimizer, run.steps)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.state.parameters))
        self.flops = run.objective.forward_flops(run.module, run.image_shape[:2], run.image_shape[2])
        self.metric = f"validation/{run.objective.primary_metric}"
        self.meter = self._make_meter(metadata.get("seconds", 0.0), clock or Clock())
        # Steps a dispatch. Found out by the clock, but in a cluster, whose processes must cut the run alike, and beside
        # other seeds, which wait for each other.
        self.by_clock = jax.process_count() == 1 and beside == 1
        self.pace = 1 if self.by_clock else self.config.train.steps_per_dispatch

    def _start(self) -> TrainState:
        """The state before the first step: at random, or from another run's or other people's parameters."""
        run, path = self.run, self.config.checkpoint.init_from
        if path is None:
            return run.initial_state()
        image, new = (run.image_shape[:2], run.image_shape[2]), self.config.checkpoint.init_head == "new"
        parameters, report = weights.load_into(path, run.model, *image, new_head=new)
        self.progress.say(str(report))
        if self.config.data.features:
            setup.check_features(self.config, parameters, run.sources)
        return run.initial_state(parameters)

    def _make_meter(self, seconds: float, clock: Clock) -> Meter:
        run = self.run
        peak = hardware.peak(run.mesh.devices.flat[0].device_kind)
        peak = peak * run.mesh.size if peak and run.applied is run.module else None
        # Forward and twice that backward; below a frozen backbone's heads there is no backward pass.
        passes = 1 if trainable.only_head(run.mask) else 3
        return Meter(self.beside * self.config.train.batch_size, passes * self.flops, peak, seconds, clock)

    def train(self) -> dict[str, Any] | None:
        """Runs to the end, and returns what it writes to summary.json; None where it was asked to stop before."""
        self.announce()
        update = self.program.compile(self.progress.say) if self.step < self.run.steps else None
        if update is not None:
            update = profiling.profiled(update, self.config.log.profile, self.folder, lambda: self.step)
        seed, sums = np.int32(self.config.train.seed), None
        with contextlib.closing(self.course()) as course:
            while True:
                try:
                    feed, count = course.send(sums)
                except StopIteration as end:
                    return end.value
                self.state, sums = update(self.state, feed, np.int32(count), seed)

    def course(self) -> Generator[tuple[pipeline.Feed, int], dict[str, jax.Array], dict[str, Any] | None]:
        """The run to its end, as `train`, but for the steps themselves: those are asked for.

        Each (feed, count) that it yields asks for so many updates of `state`, and is answered with their sums once
        `state` is what they have made of it.
        """
        log, start = self.config.log, self.step if self.settled else self.step - 1
        with MetricsWriter(self.folder, start, log.tensorboard, enabled=multihost.is_rank_0()) as self.records:
            try:
                if self.step < self.run.steps or not self.settled:
                    yield from self._loop()
                summary = self.tested or self._evaluate("test" if "test" in self.program.feeds else "validation")
            except (Asked, exact.Interrupted):
                self._stop()
                return None
            except (UserError, OSError):
                self._rescue()
                raise
            self._land()
        summary |= {"steps": self.run.steps, "seconds": self.meter.seconds(), "parameters": self.parameters}
        if multihost.is_rank_0():
            atomic.write_json(self.folder / run_files.SUMMARY, summary)
        self.progress.say(f"finished: {describe(self.run.objective, summary)}")
        self.progress.say(f"results are in {self.folder}: {', '.join(WRITTEN)}")
        return summary

    def introduce(self, say: Callable[[str], None]) -> None:
        """Says what the model is made of, what it learns from, and what of it is trained."""
        run, model = self.run, self.run.model
        say(parameter_overview.get_parameter_overview(self.state.parameters, include_stats=False))
        height, width, channels = run.image_shape
        sizes = ", ".join(f"{len(source):,} {role}" for role, source in run.sources.items())
        say(f"data: {self.config.data.name}, {sizes}, {height}x{width}x{channels}, {run.describe_classes()}")
        say(
            f"model: patch {model.patch_size}, width {model.width}, depth {model.depth}, heads {model.heads}, MLP "
            f"{model.mlp_width}; {self.parameters:,} parameters, {self.flops / 1e9:.3g} GFLOP an image forward; "
            f"arithmetic in {model.dtype.name}"
            + (f", large products in {model.matmul_dtype.name}" if model.matmul_dtype else "")
            + f"; attention: {run.attention.describe()}"
        )
        if run.mask is not None:
            flags = zip(jax.tree.leaves(run.mask), jax.tree.leaves(self.state.parameters), strict=True)
            count = sum(leaf.size for keep, leaf in flags if keep)
            say(f"trained: {count:,} of {self.parameters:,} parameters; the others are frozen")

    def announce(self) -> None:
        """Says where it begins."""
        run = self.run
        start = f"going on at step {self.step:,} of" if self.step else "training for"
        epochs = run.steps / run.steps_per_epoch
        size = self.config.train.batch_size
        self.progress.say(f"{start} {run.steps:,} steps of {size} ({epochs:.1f} epochs), in {self.folder}")

    def _dispatches(self) -> Iterator[tuple[int, pipeline.Feed]]:
        """Where each dispatch that is left ends, and what it reads: of a set that is sent, read ahead."""
        feeds = self.program.feeds["train"]
        if feeds.resident is not None:
            while self.step < self.run.steps:
                end = self._boundary(self.step, self.pace)
                yield end, feeds.feed(self._table(self.step, end))
            return
        ends, step = [], self.step
        while step < self.run.steps:
            step = self._boundary(step, self.program.rows)
            ends.append(step)
        spans = list(zip([self.step, *ends], ends, strict=False))
        yield from zip(ends, feeds.feeds((self._table(*span), span[1] - span[0]) for span in spans), strict=True)

    def _table(self, start: int, end: int) -> np.ndarray:
        """The examples of the steps start .. end, a row a step."""
        train, examples = self.config.train, len(self.run.sources["train"])
        places = (start + self.shift, end - start, self.program.rows, examples, self.config.augment.repeats)
        return pipeline.train_indices(train.seed, train.batch_size, *places)

    def _loop(self) -> Generator[tuple[pipeline.Feed, int], dict[str, jax.Array], None]:
        self.stop.nothing_to_save(False)
        self.meter.run(self.step)
        if not self.settled:
            self._settle((self.step, record(self.state)))
        while self.step < self.run.steps:
            try:
                with contextlib.closing(self._dispatches()) as dispatches:
                    for end, feed in dispatches:
                        yield from self._dispatch(end, feed)
            except Burst:
                self._roll_back()

    def _dispatch(
        self, end: int, feed: pipeline.Feed
    ) -> Generator[tuple[pipeline.Feed, int], dict[str, jax.Array], None]:
        if self._asked_to_stop():
            raise Asked
        began = time.monotonic()
        sums = yield feed, end - self.step
        count, self.step = end - self.step, end
        # The dispatch before is read while this one computes: the device never waits for the host.
        self._record()
        self.pending = (end, sums)
        due = self._is_due(self.config.train.evaluate_every) or self._is_due(self.config.checkpoint.every)
        # A CPU is host and device in one: there each dispatch is read at once, and each record's speed is its own.
        if not due and not self.program.overlaps:
            self._record()
        if self.by_clock:
            fitting = int(DISPATCH * count / max(time.monotonic() - began, 1e-6))
            self.pace = max(1, min(2 * self.pace, fitting))
        if due:
            pending, self.pending = self.pending, None
            self._settle(pending)
        self._watch_saves()

    def _boundary(self, step: int, most: int) -> int:
        """Where a dispatch of at most so many steps ends; no bit of a run depends on how it is cut."""
        train, log, checkpoint = self.config.train, self.config.log, self.config.checkpoint
        everies = (train.steps_per_dispatch, train.evaluate_every, log.every, checkpoint.every)
        nexts = [(step // every + 1) * every for every in everies if every]
        ends = (step + min(most, self.program.rows), *nexts, *profiling.cuts(log.profile, step))
        return min(self.run.steps, *ends)

    def _is_due(self, every: int) -> bool:
        return self.step == self.run.steps or bool(every and self.step % every == 0)

    def _asked_to_stop(self) -> bool:
        return multihost.any_of(self.stop.reason is not None)  # all processes of a cluster stop at the same step

    def _read(self, step: int, sums: dict[str, jax.Array]) -> dict[str, float]:
        """Waits for a dispatch and shows it; what is to be recorded of it, if anything."""
        sums = {name: value.item() for name, value in jax.device_get(sums).items()}
        if sums["streak"] >= BURST:
            raise Burst
        due = step == self.run.steps or step % self.config.log.every == 0
        names = self.run.objective.metrics if sums["count"] else ()
        metrics = {f"train/{name}": sums[name] / sums["count"] for name in names}
        metrics["train/learning_rate"] = optim.learning_rate(self.schedule, max(sums["updates"] - 1, 0))
        if sums["skipped"]:
            metrics["train/skipped"] = sums["skipped"]
        if due and self.rolled_back_from is not None:
            metrics["train/rolled_back_from"] = self.rolled_back_from
        metrics |= self.meter.speed(step, mark=due)
        self.progress.show(step, metrics, self.meter.left(step, self.run.steps), due)
        return metrics if due else {}

    def _record(self) -> None:
        pending, self.pending = self.pending, None
        if pending is not None:
            metrics = self._read(*pending)
            if metrics:
                self._write(pending[0], metrics)

    def _write(self, step: int, metrics: dict[str, float]) -> None:
        reason = self.records.write(step, metrics)
        if "train/rolled_back_from" in metrics:
            self.rolled_back_from = None
        if reason is not None:
            self.progress.say(f"warning: {run_files.METRICS} cannot be written ({reason}); it is tried again")

    def _settle(self, pending: tuple[int, dict[str, jax.Array]]) -> None:
        """Records, evaluates and saves while the device rests; one line of metrics a step."""
        metrics = self._read(*pending)
        self.meter.pause()
        self.settled = False
        if self._is_due(self.config.train.evaluate_every):
            # Without a validation split the test split is watched; nothing is chosen by it.
            roles = [role for role in ("validation", "test") if role in self.program.feeds]
            for role in roles if self.step == self.run.steps else roles[:1]:
                scores = self._evaluate(role)
                metrics |= scores
                if self.step == self.run.steps:
                    self.tested = scores
        if metrics:
            self._write(self.step, metrics)
        self.settled = True
        if self._is_due(self.config.checkpoint.every) or self._is_best(metrics):
            self._save(metrics)
        self.meter.run(self.step)

    def _is_best(self, metrics: dict[str, float]) -> bool:
        """Whether these hold a validation accuracy (or loss) better than that of every checkpoint so far."""
        if not self.config.checkpoint.keep_best or self.metric not in metrics:
            return False
        self._wait()
        best = multihost.on_rank_0(self.checkpoints.best)
        return best is None or goodness({self.metric: metrics[self.metric]}) > best[1]

    def _evaluate(self, role: str) -> dict[str, float | int]:
        batches, size = self.program.feeds[role], self.run.evaluation_batch_size()
        arguments = (batches, size, role, self._asked_to_stop, self.run.objective)
        metrics = exact.evaluate(self.program.scorer, self.state.for_evaluation(), *arguments)
        said = self.run.objective.describe(role, metrics)
        self.progress.say(f"step {self.step}/{self.run.steps}  {role}: {said}")
        return metrics

    def _save(self, metrics: dict[str, float]) -> None:
        """Starts a save; tells of the one before where that has failed."""
        self.records.flush()
        self.retry_at = None
        metadata = {
            "config": self.config.to_dict(),
            "seconds": self.meter.seconds(),
            "settled": self.settled,
            "rolled_back_from": self.rolled_back_from,
        }
        self.scores = {self.metric: metrics[self.metric]} if self.metric in metrics else {}
        try:
            self.checkpoints.save(self.state, metadata, self.scores)
        except SaveFailed as error:
            self._tell(error)
        if not int(self.state.streak):  # good steps lie behind the return
            self.rollbacks = 0

    def _tell(self, error: SaveFailed) -> None:
        self.progress.say(f"warning: a save did not land: {error}; training goes on, and it is tried again")
        self.retry_at = time.monotonic() + RETRY

    def _wait(self) -> None:
        try:
            self.checkpoints.wait()
        except SaveFailed as error:
            self._tell(error)

    def _watch_saves(self) -> None:
        """Hears of a save that has failed since, and tries again once some time has passed."""
        if not self.checkpoints.is_saving():
            self._wait()
        if self.retry_at is not None and multihost.on_rank_0(lambda: time.monotonic() > self.retry_at):
            self._record()
            self._save({})

    def _is_saved(self) -> bool:
        return multihost.on_rank_0(lambda: self.checkpoints.has(self.step))

    def _land(self) -> None:
        """Sees that the last save has reached the disk.

        Raises:
            UserError: it has not, in several attempts.
        """
        for attempt in range(ATTEMPTS):
            try:
                self.checkpoints.wait()
                if self._is_saved():
                    return
                reason = "it is not there"
            except SaveFailed as error:
                reason = str(error)
            if attempt:
                time.sleep(2**attempt)
            self._save(self.scores)
        with contextlib.suppress(SaveFailed):
            self.checkpoints.wait()
        if not self._is_saved():
            steps = [step for step in self.checkpoints.steps() if self.checkpoints.has(step)]
            newest = f"there is one of step {steps[-1]:,}" if steps else "there is none before it"
            raise UserError(
                f"the last save, of step {self.step:,}, did not land: {reason}\n"
                f"  {newest}; mend it (is the disk full?), and give the same command again"
            )

    def _stop(self) -> None:
        """Saves, and says how to go on."""
        self.meter.pause()
        # A burst is told of when the run goes on: the state before it is not the worse for it.
        with contextlib.suppress(Burst):
            self._record()
        self.step = int(self.state.step)
        if not self._is_saved():
            self._save({})
        self._land()
        reason = self.stop.reason or "another process was asked to"
        self.progress.say(
            f"stopped at step {self.step:,} of {self.run.steps:,} ({reason}); saved in {self.folder}: "
            "the same command goes on from here"
        )

    def _rescue(self) -> None:
        """Saves what there is before an error ends the run: the state has no part in it."""
        # Of a cluster, one process may be alone here.
        if self.given_up or jax.process_count() > 1 or self._is_saved() or not self.step:
            return
        with contextlib.suppress(Exception):
            self.pending = None
            self.step = int(self.state.step)
            self._save({})
            self.checkpoints.wait()
            self.progress.say(f"step {self.step:,} is saved")

    def _roll_back(self) -> None:
        """Goes back to the newest checkpoint, and on behind the batches on which numbers were bad.

        Raises:
            UserError: it has done so again and again.
        """
        self.pending = None
        bad, place = int(self.state.step), int(self.state.step) + int(self.state.shift)
        self.rollbacks += 1
        if self.rollbacks > ROLLBACKS:
            self._give_up(bad)
        self._wait()
        self.state = None  # two of them need not fit
        known = multihost.on_rank_0(lambda: bool(self.checkpoints.steps()))
        back = self.checkpoints.restore_newest(self.run.abstract_state()) if known else self._start()
        self.step = int(back.step)
        self.shift = place - self.step
        everywhere = sharding.replicated(self.run.mesh)
        counts = jax.device_put((jnp.int32(self.shift), jnp.int32(0)), everywhere)
        self.state = back.replace(shift=counts[0], streak=counts[1])
        self.records.cut_back(self.step)
        self.meter.go_back(self.step)
        self.rolled_back_from = bad
        self.progress.say(
            f"warning: {BURST} steps in a row with numbers that are not finite, up to step {bad:,}; back to step "
            f"{self.step:,}, and on with the batches behind them"
        )

    def _give_up(self, bad: int) -> None:
        self.given_up = True
        learning_rate = optim.learning_rate(self.schedule, int(optim.update_count(self.state.optimizer)))
        report = nonfinite.report(self.run, self.state, learning_rate)
        if multihost.is_rank_0():
            atomic.write_json(self.folder / nonfinite.REPORT, report)
        raise UserError(
            f"numbers are not finite at step {bad:,}, after {ROLLBACKS} returns to a checkpoint: first in "
            f"{report['first']}, learning rate {report['learning_rate']:.3g}, gradient norm {report['gradient_norm']}\n"
            f"  the batch is in {self.folder / nonfinite.REPORT}\n"
            "  lower config.optimizer.learning_rate, lengthen its warm-up, or set config.optimizer.gradient_clip"
        )
