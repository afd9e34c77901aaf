"""Saving and restoring the state: in the background, whole or not at all, the newest few and the best.

Orbax writes the arrays. What it leaves to its callers is done here: a checkpoint carries digests of all that is in it
and is verified when it is read; a damaged one is set aside and the next older one is taken; a save that fails costs
nothing but itself; the newest and the best are kept, whatever is measured in between; files and directory entries are
brought to the disk.
"""

import contextlib
import errno
import math
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_jax.checkpoint import integrity, orbax_io
from vit_jax.checkpoint.integrity import SHOWN, Damaged
from vit_jax.errors import UserError
from vit_jax.sharding import multihost
from vit_jax.training.state import TrainState

FOLDER = "checkpoints"
DAMAGED = "checkpoints-damaged"
METRIC = "validation/accuracy"
LOSS = "validation/loss"  # of a run that has no accuracy
_REMOVING = "removing-"


class SaveFailed(Exception):
    """A save did not land; says why."""


class Checkpoints:
    """The checkpoints of a workdir; a context manager that on leaving waits for the save under way."""

    def __init__(
        self,
        workdir: Path,
        keep: int = 2,
        keep_best: int = 1,
        read_only: bool = False,
        say: Callable[[str], None] = print,
    ):
        """Opens, or starts, WORKDIR/checkpoints.

        Args:
            workdir: the run's folder.
            keep: how many of the newest are kept.
            keep_best: how many of those with the best `score` are kept besides.
            read_only: leave alone what another process may be writing there.
            say: is told of damaged checkpoints.
        """
        self.folder = workdir.resolve() / FOLDER
        self._aside = workdir.resolve() / DAMAGED
        self._keep, self._keep_best, self._say = keep, keep_best, say
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._known: dict[int, dict[str, Any]] = {}  # what stands beside the arrays; it never changes
        if not read_only and jax.process_index() == 0:
            self._clean()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._join()

    def _clean(self) -> None:
        """Removes what a process that was killed in the middle of a save, or of a removal, left behind."""
        for pattern in ("*.orbax-checkpoint-tmp*", f"{_REMOVING}*"):
            for path in self.folder.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, oldest first."""
        entries = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(int(path.name) for path in entries if path.name.isdigit() and path.is_dir())

    def has(self, step: int) -> bool:
        """Whether there is a checkpoint of a step, whole as far as can be seen without reading its arrays."""
        try:
            return step in self.steps() and bool(self._read_beside(step))
        except Damaged:
            return False

    def set_aside(self) -> list[Path]:
        """The damaged ones that were moved out of the way."""
        return sorted(self._aside.iterdir()) if self._aside.is_dir() else []

    def existing(self, step: int | None) -> int:
        """The step, or the newest where None is given.

        Raises:
            UserError: there is no such checkpoint.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            known = ", ".join(map(str, steps)) or "none"
            wanted = "" if step is None else f" of step {step}"
            raise UserError(f"{self.folder} has no checkpoint{wanted}\n  there are: {known}")
        return steps[-1] if step is None else step

    def score(self, step: int) -> float | None:
        """The validation accuracy that was measured at a step; of a run that has none, minus the validation loss."""
        score = self._score(step)
        return None if score == -math.inf else score

    def best(self) -> tuple[int, float] | None:
        """The step with the best `score`, and that; None where none was measured. Of equals, the newest."""
        score, step = max(((self._score(step), step) for step in self.steps()), default=(-math.inf, 0))
        return (step, score) if score > -math.inf else None

    def _score(self, step: int) -> float:
        try:
            return goodness(self._read_beside(step)["metrics"])
        except Damaged:
            return -math.inf

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """What was saved beside the state of a step (by default the newest): `config`, `seconds` of training, ...

        Raises:
            UserError: there is no such checkpoint, or it is damaged.
        """
        try:
            return self._read_beside(self.existing(step))["metadata"]
        except Damaged as error:
            raise UserError(str(error)) from error

    def beside(self, step: int) -> dict[str, Any]:
        """All that was saved beside the arrays of a step: `metadata`, `metrics`, `digests`.

        Raises:
            UserError: it is damaged.
        """
        try:
            return self._read_beside(step)
        except Damaged as error:
            raise UserError(str(error)) from error

    def damage(self, step: int) -> str | None:
        """What is damaged of a checkpoint, in a line; None where it is whole. Reads every array."""
        path = self.folder / str(step)
        try:
            digests = self._read_beside(step)["digests"]
            found = integrity.digests_of(path, lambda: orbax_io.read(path))
            integrity.compare(path, digests, found)
        except Damaged as error:
            return str(error)
        return None

    def _read_beside(self, step: int) -> dict[str, Any]:
        """Metadata, metrics and digests of a checkpoint, as they were sealed."""
        if step not in self._known:
            path = self.folder / str(step)
            try:
                content = orbax_io.read_beside(path)
            except Exception as error:  # Orbax raises many kinds for files that it cannot understand
                raise Damaged(
                    f"{path} is damaged: its metadata cannot be read ({integrity.one_line(error)})"
                ) from error
            if not integrity.is_sealed(content):
                raise Damaged(f"{path} is damaged: its metadata are not those that were written")
            self._known[step] = content
        return self._known[step]

    def save(self, state: TrainState, metadata: dict, metrics: dict[str, float] | None = None) -> None:
        """Starts a save of the state and what `metadata` is to return; back once the state may be overwritten.

        Raises:
            SaveFailed: the save before this one did not land. This one is under way all the same.
        """
        self._join()
        before, self._error = self._error, None
        # A copy: the arrays are donated to the next step while this is written.
        arrays = jax.tree.map(lambda leaf: np.array(jax.device_get(leaf)), _without_none(state))
        metrics = {name: value for name, value in (metrics or {}).items() if not math.isnan(value)}
        if jax.process_count() > 1:
            self._save_together(arrays, metadata, metrics)
        else:
            self._thread = threading.Thread(target=self._save_alone, args=(arrays, metadata, metrics), name="save")
            self._thread.start()
        if before is not None:
            raise SaveFailed(integrity.one_line(before))

    def _save_alone(self, arrays: dict[str, Any], metadata: dict, metrics: dict[str, float]) -> None:
        try:
            path, content = self._content(arrays, metadata, metrics)
            if self._makes_room(path, content):
                orbax_io.write(path, arrays, content)
            self._written(path)
        except BaseException as error:
            self._failed(int(arrays["step"]), error)

    def _save_together(self, arrays: dict[str, Any], metadata: dict, metrics: dict[str, float]) -> None:
        """In a cluster: not behind training, so that all hear what becomes of it at the same step.

        Who cannot write would leave the others waiting inside Orbax: the main process looks before they go there.
        """
        try:
            path, content = self._content(arrays, metadata, metrics)
            write, reason = multihost.on_rank_0(lambda: self._prepare(path, arrays, content))
            if reason is not None:
                raise SaveFailed(reason)
            if write:
                orbax_io.write(path, arrays, content)
            if multihost.is_rank_0():
                self._written(path)
        except BaseException as error:
            self._failed(int(arrays["step"]), error)
        if multihost.any_of(self._error is not None) and self._error is None:
            self._error = SaveFailed("it has failed in another process")

    def _prepare(self, path: Path, arrays: dict[str, Any], content: dict[str, Any]) -> tuple[bool, str | None]:
        """Whether a checkpoint is to be written, and what stands in the way."""
        try:
            write = self._makes_room(path, content)
            size, free = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)), shutil.disk_usage(self.folder).free
            if free < size:
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {free:,} bytes for {size:,}")
        except OSError as error:
            return False, integrity.one_line(error)
        return write, None

    def _content(self, arrays: dict[str, Any], metadata: dict, metrics: dict[str, float]) -> tuple[Path, dict]:
        """Where a state is saved, and what stands beside it; ValueError where it is not finite."""
        broken = integrity.not_finite(arrays)
        if broken:
            raise ValueError(f"not saved, since not finite: {', '.join(broken[:SHOWN])}")
        digests = integrity.digests(arrays)
        content = integrity.seal({"metadata": metadata, "metrics": metrics, "digests": digests})
        return self.folder / str(int(arrays["step"])), content

    def _written(self, path: Path) -> None:
        integrity.to_disk(path)
        self._drop_old()

    def _failed(self, step: int, error: BaseException) -> None:
        self._error = error
        # Half of a checkpoint takes the room that the next attempt will need.
        for path in self.folder.glob(f"{step}.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)

    def _makes_room(self, path: Path, content: dict[str, Any]) -> bool:
        """Whether a checkpoint is to be written; one whose step was evaluated only later makes room for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return True
        with contextlib.suppress(Damaged):
            there = self._read_beside(int(path.name))
            settled = there["metadata"].get("settled", True) or not content["metadata"].get("settled", True)
            if settled and (there["metrics"] or not content["metrics"]):
                return False
        self._remove(path)
        return True

    def _remove(self, path: Path) -> None:
        # First out of sight, in one move: a kill in the middle must not leave half of one to be found.
        doomed = self.folder / f"{_REMOVING}{path.name}"
        self._known.pop(int(path.name), None)
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _drop_old(self) -> None:
        """Keeps the newest and the best."""
        steps = self.steps()
        ranked = sorted((step for step in steps if self._score(step) > -math.inf), key=lambda s: (self._score(s), s))
        kept = {*steps[-self._keep :], *ranked[max(0, len(ranked) - self._keep_best) :]}
        for step in set(steps) - kept:
            self._remove(self.folder / str(step))

    def is_saving(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Waits for the save under way.

        Raises:
            SaveFailed: it did not land.
        """
        self._join()
        error, self._error = self._error, None
        if error is not None:
            raise SaveFailed(integrity.one_line(error)) from error

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """The state of a step (by default the newest) with the shapes, types and shardings of `like`, verified.

        Args:
            like: arrays or jax.ShapeDtypeStruct.
            step: one of `steps()`.

        Raises:
            UserError: there is no such checkpoint, it is damaged, or it is that of another model.
        """
        try:
            return self._load(like, self.existing(step))
        except Damaged as error:
            raise UserError(f"{error}\n  verify all of them: python -m vit_jax.checkpoints verify DIR") from error

    def restore_newest(self, like: TrainState) -> TrainState:
        """The state of the newest checkpoint that is whole; damaged ones are set aside, and told of.

        Raises:
            UserError: there is none, or none is whole, or it is that of another model.
        """
        if not multihost.on_rank_0(lambda: bool(self.set_aside())):
            self.existing(None)
        # All processes of a cluster read alike, and take the next older one where one of them finds damage.
        for step in reversed(multihost.on_rank_0(self.steps)):
            state = damage = None
            try:
                state = self._load(like, step)
            except Damaged as error:
                damage = str(error)
            if not multihost.any_of(damage is not None):
                return state
            del state  # two of them need not fit
            self._known.pop(step, None)
            multihost.on_rank_0(lambda step=step, damage=damage: self._set_aside(step, damage or "damaged"))
        raise UserError(
            f"no checkpoint in {self.folder} is whole; the damaged ones are in {self._aside}\n"
            "  give another --workdir, or remove this one to train anew"
        )

    def _set_aside(self, step: int, damage: str) -> None:
        goal = self._aside / str(step)
        count = 0
        while goal.exists():
            count += 1
            goal = self._aside / f"{step}-{count}"
        self._aside.mkdir(exist_ok=True)
        os.rename(self.folder / str(step), goal)
        self._say(f"{damage}; set aside in {goal}")

    def _load(self, like: TrainState, step: int) -> TrainState:
        path, content = self.folder / str(step), self._read_beside(step)
        wanted = _without_none(like)
        integrity.check_kinds(path, {name: text.split(" ")[0] for name, text in content["digests"].items()}, wanted)
        loaded: dict[str, Any] = {}

        def read() -> dict[str, Any]:
            loaded.update(orbax_io.read(path, wanted))
            return loaded

        integrity.compare(path, content["digests"], integrity.digests_of(path, read))
        return like.replace(**loaded)


def goodness(metrics: dict[str, float]) -> float:
    """What checkpoints are ranked by: validation accuracy; without one, minus the loss; else minus infinity."""
    score = metrics.get(METRIC, -metrics.get(LOSS, math.inf))
    return -math.inf if math.isnan(score) else score


def _without_none(state: TrainState) -> dict[str, Any]:
    fields = ("step", "shift", "streak", "parameters", "optimizer", "averaged", "metrics")
    return {name: getattr(state, name) for name in fields if getattr(state, name) is not None}
