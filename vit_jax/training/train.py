"""The loop that ties the parts together: dispatch some steps; record, evaluate and save where it is due."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

import vit_jax
from vit_jax.data import pipeline
from vit_jax.models.summary import forward_flops
from vit_jax.training import evaluate, hardware, optimizer, parallel, records, workdir
from vit_jax.training import run as runs
from vit_jax.training.checkpoint import METRIC, Checkpoints
from vit_jax.training.meter import Meter
from vit_jax.training.run import Run
from vit_jax.training.state import METRICS, TrainState
from vit_jax.training.step import make_update

WRITTEN = (records.SUMMARY, records.METRICS, records.CONFIG, records.ENVIRONMENT, "TensorBoard events", "checkpoints/")


def train(config: ConfigDict, folder: Path) -> dict[str, Any]:
    """Trains as the config says, or goes on where the folder's run stopped; returns what summary.json holds.

    Args:
        config: a config that `vit_jax.config.check` has passed.
        folder: the workdir.

    Raises:
        UserError: before anything is compiled or written over, for data, devices or a workdir that do not do.
    """
    parallel.initialize(config.mesh.distributed)
    mesh = runs.check(config)
    workdir.claim(folder, config)
    summary = workdir.read_summary(folder)
    say = print if parallel.is_main() else lambda *_, **__: None
    if summary is not None:
        say(f"{folder} is finished: {describe(summary)}\nto train anew, give another --workdir, or remove this one")
        return summary
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind} ({jax.default_backend()})"
    say(f"vit_jax {vit_jax.__version__}, jax {jax.__version__}, {devices}", flush=True)
    run = runs.build(config, mesh)
    if parallel.is_main():
        records.write_json(folder / records.CONFIG, config.to_dict())
        records.write_json(folder / records.ENVIRONMENT, records.environment())
    with Checkpoints(folder, config.checkpoint.keep, config.checkpoint.keep_best) as checkpoints:
        return Trainer(run, folder, checkpoints).train()


def describe(summary: dict[str, Any]) -> str:
    """'test accuracy 97.50 % (351 of 360) after 4,490 steps, 1:11 of training'."""
    count = summary["test/examples"]
    correct = round(summary["test/accuracy"] * count)
    return (
        f"test accuracy {100 * summary['test/accuracy']:.2f} % ({correct:,} of {count:,}) after {summary['steps']:,} "
        f"steps, {records.clock(summary['seconds'])} of training"
    )


class Trainer:
    """One run, from its newest checkpoint or its start to its end."""

    def __init__(self, run: Run, folder: Path, checkpoints: Checkpoints):
        """Brings data and state to the devices.

        Args:
            run: the parts.
            folder: the workdir.
            checkpoints: of that workdir.
        """
        self.run, self.config, self.folder, self.checkpoints = run, run.config, folder, checkpoints
        resumed = bool(checkpoints.steps())
        self.state: TrainState = checkpoints.restore(run.abstract_state()) if resumed else run.initial_state()
        self.step = int(self.state.step)
        self.tested: dict[str, float | int] = {}
        self.schedule = optimizer.schedule(self.config.optimizer, run.steps)
        self.feeds = {role: run.feeds(role) for role in run.sources}
        train = self.config.train
        self.rows = self.feeds["train"].rows(train.batch_size, train.steps_per_dispatch)
        self.scorer = evaluate.make_scorer(run.model, run.augment, run.mesh)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.state.parameters))
        self.flops = forward_flops(run.model, run.image_shape[:2], run.image_shape[2])
        peak = hardware.peak(run.mesh.devices.flat[0].device_kind)
        peak = peak * run.mesh.size if peak else None
        seconds = checkpoints.metadata()["seconds"] if resumed else 0.0
        self.meter = Meter(self.config.train.batch_size, 3 * self.flops, peak, seconds)
        # A CPU is host and device in one: there each dispatch is read at once, and each record's speed is its own.
        self.overlaps = run.mesh.devices.flat[0].platform != "cpu"
        self.progress = records.Progress(run.steps, run.steps_an_epoch, enabled=parallel.is_main())

    def train(self) -> dict[str, Any]:
        """Runs to the end; returns what it writes to summary.json."""
        self._introduce()
        log = self.config.log
        with records.Records(self.folder, self.step, log.tensorboard, enabled=parallel.is_main()) as self.records:
            if self.step < self.run.steps:
                self._loop(self._compile())
        summary = self.tested or self._evaluate("test")
        summary |= {"steps": self.run.steps, "seconds": self.meter.seconds(), "parameters": self.parameters}
        self.checkpoints.wait()
        if parallel.is_main():
            records.write_json(self.folder / records.SUMMARY, summary)
        self.progress.say(f"finished: {describe(summary)}")
        self.progress.say(f"results are in {self.folder}: {', '.join(WRITTEN)}")
        return summary

    def _introduce(self) -> None:
        run, say = self.run, self.progress.say
        say(parameter_overview.get_parameter_overview(self.state.parameters, include_stats=False))
        height, width, channels = run.image_shape
        sizes = ", ".join(f"{len(source):,} {role}" for role, source in run.sources.items())
        say(f"data: {self.config.data.name}, {sizes}, {height}x{width}x{channels}, {run.model.classes} classes")
        model = run.model
        say(
            f"model: patch {model.patch_size}, width {model.width}, depth {model.depth}, heads {model.heads}, MLP "
            f"{model.mlp_width}; {self.parameters:,} parameters, {self.flops / 1e9:.3g} GFLOP an image forward; "
            f"arithmetic in {model.dtype.name}"
        )
        start = f"going on at step {self.step:,} of" if self.step else "training for"
        epochs = run.steps / run.steps_an_epoch
        say(f"{start} {run.steps:,} steps of {self.config.train.batch_size} ({epochs:.1f} epochs), in {self.folder}")

    def _compile(self) -> jax.stages.Compiled:
        run, began = self.run, time.monotonic()
        self.progress.say("compiling the training step ...")
        update = make_update(run.model, run.optimizer, run.augment, self.config, run.mesh)
        feed = self.feeds["train"].abstract_feed(self.rows, self.config.train.batch_size)
        compiled = update.lower(self.state, feed, np.int32(0)).compile()
        self.progress.say(f"compiled in {time.monotonic() - began:.1f} s")
        return compiled

    def _tables(self) -> Iterator[tuple[np.ndarray, int]]:
        """The batches of every dispatch that is left, and how many they are."""
        train, examples, step = self.config.train, len(self.run.sources["train"]), self.step
        while step < self.run.steps:
            count = self._boundary(step) - step
            places = (step, count, self.rows, examples, self.config.augment.repeats)
            yield pipeline.train_indices(train.seed, train.batch_size, *places), count
            step += count

    def _loop(self, update: jax.stages.Compiled) -> None:
        pending = None
        self.meter.run(self.step)
        for feed in self.feeds["train"].feeds(self._tables()):
            end = self._boundary(self.step)
            self.state, sums = update(self.state, feed, np.int32(end - self.step))
            self.step = end
            # The dispatch before is read while this one computes: the device never waits for the host.
            self._record(pending)
            pending = (end, sums)
            if self._is_due(self.config.train.evaluate_every) or self._is_due(self.config.checkpoint.every):
                self._settle(pending)
                pending = None
            elif not self.overlaps:
                self._record(pending)
                pending = None

    def _boundary(self, step: int) -> int:
        """Where a dispatch from a step on ends: of the step alone, so that a resumed run is cut as the first was."""
        train, log, checkpoint = self.config.train, self.config.log, self.config.checkpoint
        everies = (self.rows, train.evaluate_every, log.every, checkpoint.every)
        return min(self.run.steps, *((step // every + 1) * every for every in everies if every))

    def _is_due(self, every: int) -> bool:
        return self.step == self.run.steps or bool(every and self.step % every == 0)

    def _read(self, step: int, sums: dict[str, jax.Array]) -> dict[str, float]:
        """Waits for a dispatch and shows it; what is to be recorded of it, if anything."""
        sums = {name: value.item() for name, value in jax.device_get(sums).items()}
        due = step == self.run.steps or step % self.config.log.every == 0
        metrics = {f"train/{name}": sums[name] / sums["count"] for name in METRICS}
        metrics["train/learning_rate"] = float(self.schedule(step - 1))
        metrics |= self.meter.speed(step, mark=due)
        self.progress.show(step, metrics, self.meter.left(step, self.run.steps), due)
        return metrics if due else {}

    def _record(self, pending: tuple[int, dict[str, jax.Array]] | None) -> None:
        if pending is not None:
            metrics = self._read(*pending)
            if metrics:
                self.records.write(pending[0], metrics)

    def _settle(self, pending: tuple[int, dict[str, jax.Array]]) -> None:
        """Records, evaluates and saves while the device rests; one line of metrics a step."""
        metrics = self._read(*pending)
        self.meter.pause()
        if self._is_due(self.config.train.evaluate_every):
            # Without a validation split the test split is watched; nothing is chosen by it.
            roles = [role for role in ("validation", "test") if role in self.feeds]
            for role in roles if self.step == self.run.steps else roles[:1]:
                scores = self._evaluate(role)
                metrics |= scores
                if self.step == self.run.steps:
                    self.tested = scores
        if metrics:
            self.records.write(self.step, metrics)
        if self._is_due(self.config.checkpoint.every) or self._is_best(metrics):
            self.records.flush()
            scores = {METRIC: metrics[METRIC]} if METRIC in metrics else None
            metadata = {"config": self.config.to_dict(), "seconds": self.meter.seconds()}
            self.checkpoints.save(self.state, metadata, scores)
        self.meter.run(self.step)

    def _is_best(self, metrics: dict[str, float]) -> bool:
        """Whether these hold a validation accuracy above that of every checkpoint so far."""
        if not self.config.checkpoint.keep_best or METRIC not in metrics:
            return False
        self.checkpoints.wait()
        best = self.checkpoints.best()
        return best is None or metrics[METRIC] > best[1]

    def _evaluate(self, role: str) -> dict[str, float | int]:
        size = self.run.evaluation_batch_size()
        metrics = evaluate.evaluate(self.scorer, self.state.for_evaluation(), self.feeds[role], size, role)
        accuracy, top5, loss, count = (metrics[f"{role}/{name}"] for name in ("accuracy", "top5", "loss", "examples"))
        self.progress.say(
            f"step {self.step}/{self.run.steps}  {role}: accuracy {100 * accuracy:.2f} %, top-5 {100 * top5:.2f} %, "
            f"loss {loss:.4f} on {count:,} examples"
        )
        return metrics
