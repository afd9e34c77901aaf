"""Training as a whole: what must hold before it begins, the lock, the parts, and the trainer that uses them."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

import vit_jax
from vit_jax import objectives
from vit_jax.checkpoint.manager import Checkpoints
from vit_jax.data import normalization
from vit_jax.runtime import oom
from vit_jax.runtime.attention_choice import Choice
from vit_jax.sharding import multihost
from vit_jax.training import auto_batch_size, input_spec, run_directory, setup
from vit_jax.training.lock import Lock, release_all
from vit_jax.training.program import Program
from vit_jax.training.setup import Run
from vit_jax.training.shutdown import Stop
from vit_jax.training.trainer import Trainer, describe


def train(config: ConfigDict, folder: Path) -> dict[str, Any] | None:
    """Trains as the config says, or goes on where the folder's run stopped; returns what summary.json holds.

    None where it was asked to stop (SIGTERM, SIGINT, `train.max_minutes`) and has saved.

    Args:
        config: a config that `vit_jax.config.check` has passed.
        folder: the workdir.

    Raises:
        UserError: before anything is compiled or written over, for data, devices or a workdir that do not do; later,
            where numbers are bad for good, memory is too small, or the last save does not land.
    """
    multihost.initialize(config.mesh.distributed)
    mesh = setup.check(config)
    config = auto_batch_size.resolve(config, folder, mesh)
    changes = multihost.on_rank_0(lambda: run_directory.claim(folder, config))
    summary = multihost.on_rank_0(lambda: run_directory.read_summary(folder))
    say = print if multihost.is_rank_0() else lambda *_, **__: None
    if summary is not None and not changes:
        say(f"{folder} is finished: {describe(objectives.make(config), summary)}")
        say("to train anew, give another --workdir, or remove this one")
        return summary
    greet(mesh, say)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(Stop(config.train.max_minutes))
        stop.leave = release_all
        stop.nothing_to_save(True)

        def lock() -> list[str]:
            stack.enter_context(Lock(folder, stop.without_saving))
            return run_directory.claim(folder, config)  # again: another run may have come to its end in between

        changes = multihost.on_rank_0(lock)
        run = setup.build(config, mesh, attention=recorded_attention(folder))
        checkpoints = stack.enter_context(open_checkpoints(run, folder, changes, say))
        with oom.explained(config, run.model, run.image_shape):
            trainer = Trainer(run, Program(run), folder, checkpoints, stop)
            trainer.introduce(say)
            return trainer.train()


def recorded_attention(folder: Path) -> Choice | None:
    """The choice of an attention backend with which a workdir's run began, in all processes of a cluster."""

    def read() -> dict[str, Any] | None:
        choice = run_directory.attention_choice(folder)
        return None if choice is None else dataclasses.asdict(choice)

    found = multihost.on_rank_0(read)
    return None if found is None else Choice(**found)


def greet(mesh: jax.sharding.Mesh, say: Callable[..., None]) -> None:
    """Says which versions compute on what."""
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind} ({jax.default_backend()})"
    say(f"vit_jax {vit_jax.__version__}, jax {jax.__version__}, {devices}", flush=True)


def open_checkpoints(run: Run, folder: Path, changes: list[str], say: Callable[[str], None]) -> Checkpoints:
    """The checkpoints of a workdir that has been claimed with these changes; its config is written.

    Raises:
        UserError: the run is to be shorter than it is already, or the folder cannot be written to.
    """
    checkpoints = Checkpoints(folder, run.config.checkpoint.keep, run.config.checkpoint.keep_best, say=say)
    run_directory.check_length(changes, run.steps, multihost.on_rank_0(checkpoints.steps))
    multihost.on_rank_0(lambda: run_directory.record(folder, run.config, changes, say, run.attention))
    source = run.sources["train"]
    statistics = normalization.of_source(run.config.data.normalization, source)
    multihost.on_rank_0(lambda: input_spec.write(folder, source, *statistics))
    return checkpoints
