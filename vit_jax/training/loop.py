"""The training loop: restore, update, log, evaluate, save."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.errors import UserError
from vit_jax.evaluation.exact import Interrupted
from vit_jax.runtime.profiling import Profiler
from vit_jax.sharding import multihost
from vit_jax.training import describe, init_from, plan, run_directory, trackers
from vit_jax.training.log import Log, NonFiniteBurst
from vit_jax.training.metrics import MetricsWriter
from vit_jax.training.plan import Chunk, ChunkLength
from vit_jax.training.progress import Progress
from vit_jax.training.recovery import NonFinite, Recovery
from vit_jax.training.run import Run
from vit_jax.training.run_record import RunRecord
from vit_jax.training.saving import Saver
from vit_jax.training.setup import Experiment
from vit_jax.training.shutdown import StopRequest
from vit_jax.training.state import TrainState
from vit_jax.training.step import readout

Update = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


def train(
    experiment: Experiment,
    seed: int,
    workdir: Path,
    checkpoints: CheckpointManager,
    record: RunRecord,
    stop: StopRequest,
    progress: Progress,
    compile_update: Callable[[], Update],
) -> dict[str, Any] | None:
    """Trains one seed, from the newest checkpoint or from the start, to the last step.

    Args:
        experiment: what to train.
        seed: of the run.
        workdir: the run directory.
        checkpoints: of the run directory.
        record: writes the files that describe the run.
        stop: ends the run early; it is saved first.
        progress: shows lines in the terminal.
        compile_update: returns the compiled `step.make_update`.

    Returns:
        The content of summary.json; None if the run was stopped.

    Raises:
        UserError: the config has changed and no step is left, a checkpoint does not fit the model, losses stay
            non-finite, or the last save fails.
    """
    config, say = experiment.config, progress.say
    experiment.pipelines.make_all()  # before the state: what fits on the devices is decided while they are empty
    state, resumed = init_from.start(experiment, seed, checkpoints, progress.tell)
    logged, step = resumed.get("settled", True), int(state.step)
    changed = record.resume(step, resumed)
    if changed and step >= experiment.num_steps:
        raise run_directory.no_step_left(workdir, config, changed, step)
    progress.tell(describe.start(experiment, step, int(state.updates), workdir, changed))
    update = compile_update() if step < experiment.num_steps else None
    throughput = experiment.make_throughput(resumed.get("seconds", 0.0))
    recovery = Recovery(experiment, seed, checkpoints, workdir, say)
    first = step if logged else step - 1  # the line of a step that is not logged yet is written again
    tracker = trackers.start(config, workdir, record.environment, say)
    with MetricsWriter(workdir, first, config.log.tensorboard, multihost.is_rank_0(), tracker) as writer:
        multihost.on_rank_0(record.write)
        log = Log(experiment, writer, progress, throughput, resumed.get("rolled_back_from"))
        saver = Saver(checkpoints, experiment.objective.primary_metric, config.checkpoint.keep_best, say, log.flush)
        run = Run(experiment, seed, state, stop, progress, log, saver, recovery, record, logged)
        del state  # its arrays are donated to the first update
        stop.exit_on_signal = logged and update is None  # from here on there is something to save
        try:
            if update is None:
                recovery.check_steps(run.state)
            if not logged or update is not None:
                throughput.start(step)
            if not logged:
                chunk = plan.chunk(step, step, experiment.num_steps, config)
                finish_chunk(run, chunk, log.show(chunk, readout(run.state)))
            if update is not None:
                train_steps(run, update, Profiler(config.log.profile, workdir))
            results = run.results or run.evaluate(plan.evaluated(experiment.sources, at_end=True)[-1])
            recovery.check_end(run.state, run.evaluated)
        except Interrupted:
            return run.save_and_stop(workdir)
        except NonFinite:
            raise
        except (UserError, OSError):
            saver.rescue(run.state, run.metadata)
            raise
        saver.finish(run.state, run.metadata())
        totals = {"steps": experiment.num_steps, "seconds": throughput.seconds()}
        return writer.finish({**results, **totals, "parameters": experiment.num_parameters})


def train_steps(run: Run, update: Update, profiler: Profiler) -> None:
    """Trains until the last step.

    Raises:
        Interrupted: a stop was requested.
    """
    experiment, config = run.experiment, run.experiment.config
    length = ChunkLength(experiment.max_chunk_steps, adaptive=experiment.adapts_chunks)
    while run.step < experiment.num_steps:  # once, and again after each rollback
        chunks = plan.chunks(run.step, experiment.num_steps, length, config)
        feeds = experiment.feeds(chunks, run.seed, int(run.state.skipped_batches))
        try:
            for chunk, feed in feeds:
                if run.stop_requested():
                    raise Interrupted
                began = time.monotonic()
                profiler.before(chunk.start)
                run.state, sums = update(run.state, feed, np.int32(chunk.count), np.int32(run.seed))  # asynchronous
                profiler.after(chunk.end, sums)
                metrics = run.log.push(chunk, sums, wait=chunk.waits or experiment.platform == "cpu")
                length.adapt(chunk.count, time.monotonic() - began)
                if chunk.waits:
                    finish_chunk(run, chunk, metrics)
                if run.saver.needs_retry():
                    run.log.read_pending()
                    run.save({})
        except NonFiniteBurst:
            failed = run.step
            run.saver.wait()
            run.state, resumed = run.recovery.roll_back(run.state)
            run.log.rewind(run.step, failed)
            run.record.resume(run.step, resumed)
            multihost.on_rank_0(run.record.write)
        finally:
            feeds.close()


def finish_chunk(run: Run, chunk: Chunk, metrics: dict[str, float]) -> None:
    """Evaluates, logs and saves after a chunk, while the devices are idle."""
    run.log.throughput.pause()
    run.logged = False
    if chunk.evaluates:
        at_end = chunk.end == run.experiment.num_steps
        for role in plan.evaluated(run.experiment.sources, at_end):
            metrics |= run.evaluate(role)
    run.log.write(chunk.end, metrics)
    run.logged = True
    if chunk.saves or run.saver.is_best(metrics):
        run.save(metrics)
    run.log.throughput.start(chunk.end)
