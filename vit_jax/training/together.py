"""Training of several seeds: each a run of its own in WORKDIR/seed-K, one after another or some at once in one program.

At once means that the seeds' arrays lie side by side in one vectorised program (`program.make_update_of_seeds`). All
else, records, evaluation, checkpoints, returns behind bad numbers, is each run's own: its `Trainer.course` asks for
steps, and here the asking of all is answered in one dispatch.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vit_jax import atomic
from vit_jax.checkpoint import run_files
from vit_jax.errors import UserError
from vit_jax.runtime import oom
from vit_jax.training import progress, run_directory, seeds, setup
from vit_jax.training.lock import Lock, release_all
from vit_jax.training.program import Program
from vit_jax.training.shutdown import Stop
from vit_jax.training.state import TrainState
from vit_jax.training.throughput import Clock
from vit_jax.training.train import greet, open_checkpoints
from vit_jax.training.trainer import Trainer

Outcome = dict[str, Any] | UserError | None  # a summary, why it failed, or None where it was asked to stop


def train(config: ConfigDict, folder: Path) -> dict[str, Any] | None:
    """Trains every seed that is not finished, or goes on with it; returns what summary.json holds (`seeds.summarise`).

    None where it was asked to stop and has saved. A seed that fails does not keep the others from their ends.

    Args:
        config: a config that `vit_jax.config.check` has passed, with `train.seeds`.
        folder: the workdir; each seed's own is folder/seed-K.

    Raises:
        UserError: as `train.train`; where some seeds have failed, for the first of them, once the others are finished.
    """
    mesh, wanted = setup.check(config), seeds.listed(config)
    _claim(folder, config)
    summary = run_directory.read_summary(folder)
    if summary is not None and summary["seeds"] == wanted and not _left(folder, config):
        print(f"{folder} is finished: {seeds.describe(summary)}\nto train anew, give another --workdir, or remove it")
        return summary
    greet(mesh, print)
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(Stop(config.train.max_minutes))
        stop.nothing_to_save(True)
        stop.leave = release_all
        stack.enter_context(Lock(folder, stop.without_saving))
        changes = _claim(folder, config)  # again: another command may have come to its end in between
        run_directory.record(folder, seeds.config_of_all(config), changes, print)
        (folder / run_files.SUMMARY).unlink(missing_ok=True)
        outcomes: dict[int, Outcome] = {}
        if left := _left(folder, config):
            groups = list(_groups(folder, config, left))
            run = setup.build(
                seeds.config_of(config, left[0], 1),
                mesh,
                attention=run_directory.attention_choice(seeds.folder_of(folder, seeds.listed(config)[0])),
                vectorized=any(at_once > 1 for _, at_once in groups),
            )
            with oom.explained(config, run.model, run.image_shape):
                program = Program(run)
            for members, at_once in groups:
                group = _Group(program, folder, config, members, at_once)
                outcomes |= _train_group(group, stop, introduce=not outcomes)
                if None in outcomes.values() or (stop.reason and len(outcomes) < len(left)):
                    done = len(wanted) - len(_left(folder, config))
                    print(f"{done} of {len(wanted)} seeds are finished ({stop.reason}): the same command goes on")
                    return None
    failed = {seed: error for seed, error in outcomes.items() if isinstance(error, UserError)}
    if failed:
        seed, error = next(iter(failed.items()))
        raise UserError(f"seed {seed}: {error}") from error
    return _finish(folder, wanted)


def _claim(folder: Path, config: ConfigDict) -> list[str]:
    """As `workdir.claim`, where another choice of seeds is no change."""
    every, before = seeds.config_of_all(config), run_directory.read_config(folder)
    if before is not None and before.get("train", {}).get("seeds") is not None:
        every.train.seeds = before["train"]["seeds"]
    return run_directory.claim(folder, every)


def _left(folder: Path, config: ConfigDict) -> list[int]:
    """The seeds that are not finished, or go on with a changed config."""

    def is_finished(seed: int) -> bool:
        own = seeds.folder_of(folder, seed)
        if not own.is_dir():
            return False
        changes = run_directory.claim(own, seeds.config_of(config, seed, 1))
        return run_directory.read_summary(own) is not None and not changes

    return [seed for seed in seeds.listed(config) if not is_finished(seed)]


def _groups(folder: Path, config: ConfigDict, left: list[int]) -> Iterator[tuple[list[int], int]]:
    """The seeds of each program, and for how many it is compiled.

    A seed that has begun goes on in a program of as many as it began with, also where some of those are finished: in
    another one its last bits would be others.
    """
    most = config.train.seeds_at_once
    begun: dict[int, list[int]] = {}
    for seed in left:
        if (before := _at_once(folder, seed)) is not None:
            begun.setdefault(min(before, most or before), []).append(seed)
    for at_once, members in begun.items():
        for first in range(0, len(members), at_once):
            yield members[first : first + at_once], at_once
    fresh = [seed for seed in left if not any(seed in members for members in begun.values())]
    if fresh:
        groups = -(-len(fresh) // min(len(fresh), most or 1))
        for members in np.array_split(fresh, groups):
            yield members.tolist(), len(members)


def _at_once(folder: Path, seed: int) -> int | None:
    """How many seeds a seed is, or was, trained with; None where it has not begun."""
    saved = run_directory.read_config(seeds.folder_of(folder, seed))
    return None if saved is None else saved.get("train", {}).get("seeds_at_once") or 1


@dataclasses.dataclass(frozen=True)
class _Group:
    """Seeds that are trained in one program, in the folder of all."""

    program: Program
    folder: Path
    config: ConfigDict
    members: list[int]
    at_once: int

    def open(self, stack: contextlib.ExitStack, stop: Stop) -> dict[int, Trainer]:
        """Their trainers, each in its own folder."""
        trainers, clock = {}, Clock()
        for seed in self.members:
            own = seeds.folder_of(self.folder, seed)
            run = dataclasses.replace(self.program.run, config=seeds.config_of(self.config, seed, self.at_once))
            run_directory.claim(own, run.config)
            stack.enter_context(Lock(own, stop.without_saving))
            changes = run_directory.claim(own, run.config)
            name = f"seed {seed}"
            checkpoints = stack.enter_context(open_checkpoints(run, own, changes, lambda *_: None))
            trainers[seed] = Trainer(run, self.program, own, checkpoints, stop, name, self.at_once, clock)
        return trainers


def _train_group(group: _Group, stop: Stop, introduce: bool) -> dict[int, Outcome]:
    program, run = group.program, group.program.run
    with contextlib.ExitStack() as stack, oom.explained(run.config, run.model, run.image_shape, group.at_once):
        trainers = group.open(stack, stop)
        if introduce:
            trainers[group.members[0]].introduce(print)
        if group.at_once > 1:
            outcomes = dict(zip(trainers, _train_at_once(program, [*trainers.values()], group.at_once), strict=True))
        else:
            ((seed, trainer),) = trainers.items()
            try:
                outcomes = {seed: trainer.train()}
            except UserError as error:
                outcomes = {seed: _told(trainer, error)}
        stop.nothing_to_save(True)
    return outcomes


def _told(trainer: Trainer, error: UserError) -> UserError:
    trainer.progress.say(f"failed: {error}")
    return error


def _train_at_once(program: Program, trainers: list[Trainer], places: int) -> list[Outcome]:
    """Trains some seeds in a program with that many places, each to its end, its failure or its stop."""
    for trainer in trainers:
        trainer.announce()
    update = program.compile(print, places)
    spare = [program.run.initial_state() for _ in range(places - len(trainers))]
    outcomes: dict[Trainer, Outcome] = {}
    sums: dict[Trainer, dict[str, jax.Array]] = {}
    with contextlib.ExitStack() as stack:
        courses = {trainer: stack.enter_context(contextlib.closing(trainer.course())) for trainer in trainers}
        while True:
            asked = {}
            for trainer in (trainer for trainer in trainers if trainer not in outcomes):
                try:
                    asked[trainer] = courses[trainer].send(sums.get(trainer))
                except StopIteration as end:
                    outcomes[trainer] = end.value
                except UserError as error:
                    outcomes[trainer] = _told(trainer, error)
            if not asked:
                return [outcomes[trainer] for trainer in trainers]
            sums = _advance(update, trainers, spare, asked)


def _advance(
    update: jax.stages.Compiled, trainers: list[Trainer], spare: list[TrainState], asked: dict[Trainer, tuple]
) -> dict[Trainer, dict[str, jax.Array]]:
    """Makes the steps that are asked for; whoever asks for none, and what fills the places left, stands still."""
    feed, _ = next(iter(asked.values()))
    feeds, counts = zip(*(asked.get(trainer, (feed, 0)) for trainer in trainers), strict=True)
    # One that has failed on its way back has no state.
    states = [trainer.run.initial_state() if trainer.state is None else trainer.state for trainer in trainers]
    still = len(spare)
    numbers = [trainer.config.train.seed for trainer in trainers] + [0] * still
    ends = update(
        (*states, *spare),
        (*feeds, *[feed] * still),
        tuple(map(np.int32, (*counts, *[0] * still))),
        tuple(map(np.int32, numbers)),
    )
    for trainer, (state, _) in zip(trainers, ends, strict=False):
        trainer.state = state
    spare[:] = [state for state, _ in ends[len(trainers) :]]
    return {trainer: sums for trainer, (_, sums) in zip(trainers, ends, strict=False)}


def _finish(folder: Path, wanted: list[int]) -> dict[str, Any]:
    """Writes and shows what the seeds come to."""
    summaries = [run_directory.read_summary(seeds.folder_of(folder, seed)) for seed in wanted]
    summary = seeds.summarise(wanted, summaries, [_at_once(folder, seed) or 1 for seed in wanted])
    atomic.write_json(folder / run_files.SUMMARY, summary)
    print("\n".join(seeds.describe_each(summary)))
    spent = f"{summary['steps']:,} steps each, {progress.clock(summary['seconds'])} of training"
    print(f"finished: {seeds.describe(summary)} after {spent}")
    print(f"results are in {folder}: {run_files.SUMMARY}, and each seed's in seed-K/")
    return summary
