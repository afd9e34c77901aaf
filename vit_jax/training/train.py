"""Training of a config in a run directory: checks, lock, data, and the loop."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from vit_jax import atomic, objectives, terminal
from vit_jax.checkpoint import input_spec, proof, run_files
from vit_jax.checkpoint.input_spec import InputSpec
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.data import normalization
from vit_jax.errors import os_errors_of_run
from vit_jax.runtime import oom
from vit_jax.runtime.attention_choice import Choice
from vit_jax.sharding import multihost
from vit_jax.training import auto_batch_size, describe, loop, recovery, run_directory, setup, stored_features
from vit_jax.training.lock import Lock, release_all
from vit_jax.training.progress import Progress
from vit_jax.training.setup import Experiment
from vit_jax.training.shutdown import StopRequest
from vit_jax.training.step import make_update

WRITTEN = (
    run_files.SUMMARY,
    run_files.METRICS,
    run_files.CONFIG,
    run_files.ENVIRONMENT,
    "TensorBoard events",
    "checkpoints/",
)


def train(config: ConfigDict, workdir: Path, stop: StopRequest | None = None) -> dict[str, Any] | None:
    """Trains a config, or resumes the run of the run directory; returns the content of summary.json.

    None if it was stopped (SIGTERM, SIGINT, `train.max_minutes`); the run is saved.

    Args:
        config: a checked config.
        workdir: the run directory.
        stop: ends the run early; None for a command, which signals and `train.max_minutes` stop.

    Raises:
        UserError: before anything is compiled or overwritten, if data, devices or the run directory do not fit; later,
            if losses stay non-finite, memory is too small, or the last checkpoint cannot be saved.
    """
    multihost.initialize(config.mesh.distributed)
    config = auto_batch_size.recorded(config, workdir)
    finished = functools.partial(run_directory.finished, workdir, config)
    is_cluster = config.mesh.distributed
    summary = multihost.on_rank_0(finished) if is_cluster else finished()  # shown even if data or devices are gone
    say = _silent if is_cluster and not multihost.is_rank_0() else terminal.say
    if summary is not None:
        say(describe.finished(workdir, describe.result(objectives.make(config), summary)))
        return summary
    mesh = setup.check(config)
    config = auto_batch_size.resolve(config, workdir, mesh)
    multihost.on_rank_0(lambda: run_directory.claim(workdir, config))
    say(describe.versions(mesh))
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop or StopRequest(config.train.max_minutes))
        stop.on_exit, stop.exit_on_signal = release_all, True
        multihost.on_rank_0(lambda: stack.enter_context(Lock(workdir, stop.exit_without_saving)) and None)
        proof.prove(workdir)
        experiment = setup.assemble(config, mesh, setup.load_sources(config), attention=recorded_attention(workdir))
        with oom.explained(config, experiment.model, experiment.image_shape):
            say(describe.experiment(experiment))
            progress = Progress(experiment.num_steps, experiment.steps_per_epoch, enabled=multihost.is_rank_0())
            compile_update = functools.partial(compile_step, experiment, progress.say)
            return train_seed(experiment, config.train.seed, workdir, stop, progress, compile_update)


def train_seed(
    experiment: Experiment,
    seed: int,
    workdir: Path,
    stop: StopRequest,
    progress: Progress,
    compile_update: Callable[[], loop.Update],
) -> dict[str, Any] | None:
    """Trains one seed in a run directory that is locked, and writes summary.json; arguments as of `loop.train`."""
    config = experiment.config_of(seed)
    with os_errors_of_run(workdir):
        return _train_seed(experiment, config, workdir, stop, progress, compile_update)


def _train_seed(
    experiment: Experiment,
    config: ConfigDict,
    workdir: Path,
    stop: StopRequest,
    progress: Progress,
    compile_update: Callable[[], loop.Update],
) -> dict[str, Any] | None:
    # Checked again under the lock: another process may have finished the run in between.
    changes = multihost.on_rank_0(lambda: run_directory.claim(workdir, config))
    with CheckpointManager(
        workdir, config.checkpoint.keep, config.checkpoint.keep_best, say=progress.say
    ) as checkpoints:
        saved = multihost.on_rank_0(checkpoints.steps)
        run_directory.check_length(changes, experiment.num_steps, saved)
        if saved and experiment.objective.needs_labels:
            classes = experiment.sources["train"].class_names_by_label()
            multihost.on_rank_0(lambda: input_spec.check_classes(workdir, classes))
        if experiment.num_steps not in saved:
            leaves = jax.tree.leaves(experiment.abstract_state())
            size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
            multihost.on_rank_0(lambda: proof.check_room(workdir, size))
        multihost.on_rank_0(lambda: _write_inputs(experiment, config, workdir, changes, progress.say))
        try:
            summary = loop.train(experiment, config.train.seed, workdir, checkpoints, stop, progress, compile_update)
        finally:
            stop.exit_on_signal = True  # everything that can be saved is
    if summary is not None:
        if multihost.is_rank_0():
            atomic.write_json(workdir / run_files.SUMMARY, summary)
            (workdir / recovery.REPORT).unlink(missing_ok=True)  # of an earlier attempt
        progress.say(f"finished: {describe.result(experiment.objective, summary)}")
        progress.say(f"results are in {workdir}: {', '.join(WRITTEN)}")
    return summary


def compile_step(experiment: Experiment, say: Callable[[str], Any]) -> jax.stages.Compiled:
    """Returns the compiled `step.make_update`; it serves every seed."""
    began = time.monotonic()
    say("compiling the training step ...")
    feed = experiment.pipelines["train"].abstract_feed(experiment.max_chunk_steps, experiment.config.train.batch_size)
    scalar = jax.ShapeDtypeStruct((), "int32")
    compiled = make_update(experiment).lower(experiment.abstract_state(), feed, scalar, scalar).compile()
    say(f"compiled in {time.monotonic() - began:.1f} s")
    return compiled


def recorded_attention(workdir: Path) -> Choice | None:
    """Returns the attention backend recorded in a run directory; all processes of a cluster must call this together."""

    def read() -> dict[str, Any] | None:
        choice = run_directory.attention_choice(workdir)
        return None if choice is None else dataclasses.asdict(choice)

    found = multihost.on_rank_0(read)
    return None if found is None else Choice(**found)


def _write_inputs(
    experiment: Experiment, config: ConfigDict, workdir: Path, changes: list[str], say: Callable[[str], Any]
) -> None:
    """Writes config.json, environment.json and data.json."""
    run_directory.record(workdir, config, changes, say, experiment.attention)
    source = experiment.sources["train"]
    if not stored_features.in_use(experiment.sources):  # data.json describes images
        statistics = normalization.of_source(config.data.normalization, source)
        spec = InputSpec(source.name, experiment.image_shape, *statistics, source.class_names_by_label())
        input_spec.write(workdir, spec)


def _silent(*_: Any, **__: Any) -> None:
    """Prints nothing."""
