"""Saves and restores checkpoints: in the background, atomically, verified; keeps the newest and the best.

Orbax writes the arrays. This module adds what Orbax leaves to its callers: each checkpoint has digests of its content
and is verified when it is read; a save counts once its metadata was read back; a corrupt checkpoint is moved out of the
way and the next older one is used; a failed save does not stop training; the newest and the best checkpoints are kept;
files and directory entries are synced to the disk.

A checkpoint is corrupt if its bytes show it (`inventory.explain`). Whatever else keeps it from being read, such as
missing memory or permission, is raised as a `UserError` with that reason, and nothing is moved.

A checkpoint is a mapping from names to trees of arrays, one of them 'step' (an integer scalar), and a sealed JSON
object with `metadata` (any JSON), `metrics`, `higher_is_better` and `digests`.
"""

import contextlib
import errno
import math
import os
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_jax import arguments, atomic, terminal
from vit_jax.checkpoint import integrity, inventory, orbax_io, proof, run_files
from vit_jax.checkpoint.integrity import CorruptCheckpoint
from vit_jax.checkpoint.inventory import Unreadable
from vit_jax.errors import UserError, few
from vit_jax.sharding import multihost

_REMOVING = "removing-"
_INCOMPLETE = (f"*{orbax_io.SUFFIX}*", f"{_REMOVING}*", f"{proof.NAME}*")


class SaveFailed(Exception):
    """A checkpoint could not be saved; the message is the reason."""


def ranking_score(metrics: Mapping[str, float], higher_is_better: bool | None = None) -> float | None:
    """Returns the score by which checkpoints are ranked, larger is better; None without a finite metric.

    Args:
        metrics: of the checkpoint; the first one ranks it.
        higher_is_better: of that metric. None, as in older checkpoints: true unless its name ends in 'loss'.
    """
    name, value = next(iter(metrics.items()), ("", math.nan))
    if not math.isfinite(value):
        return None
    if higher_is_better is None:
        higher_is_better = not name.endswith("loss")
    return value if higher_is_better else -value


class CheckpointManager:
    """The checkpoints of a run directory; a context manager that waits for the save in progress on exit."""

    def __init__(
        self,
        workdir: str | bytes | os.PathLike,
        keep: int = 2,
        keep_best: int = 1,
        read_only: bool = False,
        say: Callable[[str], None] = terminal.say,
        on_save: Callable[[int, dict[str, Any]], None] | None = None,
    ):
        """Opens WORKDIR/checkpoints, which need not exist yet.

        Args:
            workdir: the run directory.
            keep: number of newest checkpoints to keep.
            keep_best: number of checkpoints with the highest `ranking_score` to keep in addition.
            read_only: do not remove incomplete checkpoints, which another process may be writing.
            say: prints a line about a corrupt checkpoint.
            on_save: is called with step and metadata of each new checkpoint, which counts as saved once it returns.
        """
        workdir = Path(arguments.path("workdir", workdir))
        self.directory = workdir.resolve() / run_files.CHECKPOINTS
        self._corrupt_directory = workdir.resolve() / run_files.DAMAGED
        self._keep, self._keep_best, self._say, self._on_save = keep, keep_best, say, on_save
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._contents: dict[int, dict[str, Any]] = {}  # a checkpoint's sealed content never changes
        self._unproved: set[int] = set()  # steps that were written and not yet read back
        if not read_only and jax.process_index() == 0:
            self._remove_incomplete()

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, *_: object) -> None:
        self._join()

    def _remove_incomplete(self) -> None:
        """Removes the incomplete files of a killed process or a failed save."""
        with contextlib.suppress(OSError):  # the next save tries again
            for path in [path for pattern in _INCOMPLETE for path in self.directory.glob(pattern)]:
                # Renamed first: a stopped process that wakes up must not rename what is left of it.
                doomed = path.with_name(f"{_REMOVING}{path.name.removeprefix(_REMOVING)}")
                os.rename(path, doomed)
                atomic.remove_tree(doomed)

    # --- what there is ----------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Returns the steps of all checkpoints, ascending; UserError if the directory cannot be read."""
        try:
            entries = self.directory.iterdir() if self.directory.is_dir() else ()
            return sorted(int(path.name) for path in entries if run_files.is_step(path.name) and path.is_dir())
        except OSError as error:
            raise Unreadable(self.directory, error) from error

    def has(self, step: int) -> bool:
        """Returns whether a step's checkpoint has intact metadata, and was read back if this process has saved it."""
        try:
            return step in self.steps() and step not in self._unproved and bool(self._read_content(step))
        except CorruptCheckpoint:
            return False

    def corrupt(self) -> list[Path]:
        """Returns the corrupt checkpoints that were moved out of the way."""
        entries = self._corrupt_directory.iterdir() if self._corrupt_directory.is_dir() else ()
        return sorted(path for path in entries if run_files.is_step(path.name.split("-")[0]))

    def find(self, step: int | np.integer | str | None) -> int:
        """Returns the step of an existing checkpoint.

        Args:
            step: a step, 'best' for the one with the highest `ranking_score`, or None for the newest.

        Raises:
            UserError: there is no such checkpoint.
        """
        steps, step = self.steps(), arguments.integer("step", step, minimum=None, words=("best", None))
        if step is None and steps:
            return steps[-1]
        if step == "best" and steps:
            best = self.best()
            if best is None:
                raise UserError(f"{self.directory} has no evaluated checkpoint\n  omit 'best' to use the newest")
            return best[0]
        if step not in steps:
            which = f" of step {step}" if isinstance(step, int) else ""
            raise UserError(
                f"{self.directory} has no checkpoint{which}\n  available steps: {few(map(str, steps), 8) or 'none'}"
            )
        return step

    def score(self, step: int) -> float | None:
        """Returns the `ranking_score` of a checkpoint; None also if it is corrupt."""
        try:
            content = self._read_content(step)
        except CorruptCheckpoint:
            return None
        return ranking_score(content["metrics"], content.get("higher_is_better"))

    def best(self) -> tuple[int, float] | None:
        """Returns the step with the highest `ranking_score`, and the score; None if no checkpoint has one.

        Of equal scores the newest wins.
        """
        ranked = self._ranked()
        return (ranked[-1][1], ranked[-1][0]) if ranked else None

    def _ranked(self) -> list[tuple[float, int]]:
        """Returns (score, step) of the checkpoints that have a score, the best last."""
        scores = {step: self.score(step) for step in self.steps()}
        return sorted((score, step) for step, score in scores.items() if score is not None)

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """Returns the metadata that was saved with a step, by default the newest.

        Raises:
            UserError: there is no such checkpoint, or it is corrupt.
        """
        return self.content(self.find(step))["metadata"]

    def content(self, step: int) -> dict[str, Any]:
        """Returns the JSON object that was saved with a step: `metadata`, `metrics`, `higher_is_better`, `digests`.

        `higher_is_better` is missing in older checkpoints.

        Raises:
            UserError: it is corrupt.
        """
        try:
            return self._read_content(step)
        except CorruptCheckpoint as error:
            raise UserError(str(error)) from error

    def verify(self, step: int) -> str | None:
        """Returns what is corrupt in a checkpoint, None if it is intact; UserError if it cannot be read otherwise."""
        path = self.directory / str(step)
        try:
            inventory.verified(path, self._read_content(step)["digests"], lambda: orbax_io.read(path))
        except CorruptCheckpoint as error:
            return str(error)
        return None

    def _read_content(self, step: int) -> dict[str, Any]:
        if step not in self._contents:
            self._contents[step] = inventory.read_content(self.directory / str(step))
        return self._contents[step]

    # --- saving -----------------------------------------------------------------------------------------------------

    def save(
        self,
        arrays: Mapping[str, Any],
        metadata: dict,
        metrics: dict[str, float] | None = None,
        higher_is_better: bool = True,
    ) -> None:
        """Starts to save a checkpoint; returns once the arrays are copied and may be overwritten.

        Args:
            arrays: trees of arrays by name; 'step' is the step.
            metadata: JSON values, returned by `metadata`.
            metrics: by name; the first one ranks the checkpoint. Values that are not finite are left out.
            higher_is_better: whether a larger value of that metric is better.

        Raises:
            SaveFailed: the previous save failed; this one has been started nevertheless.
        """
        self._join()
        previous, self._error = self._error, None
        # A copy, since the arrays are donated to the next step while this save is in progress.
        copied = jax.tree.map(lambda leaf: np.array(jax.device_get(leaf)), dict(arrays))
        finite = {name: value for name, value in (metrics or {}).items() if math.isfinite(value)}
        content = {"metadata": metadata, "metrics": finite, "higher_is_better": higher_is_better}
        if jax.process_count() > 1:
            self._save_in_cluster(copied, content)
        else:
            self._thread = threading.Thread(target=self._save_alone, args=(copied, content), name="save")
            try:
                self._thread.start()
            except RuntimeError:  # no further thread can be started
                self._thread = None
                self._save_alone(copied, content)
        if previous is not None:
            raise SaveFailed(integrity.root_cause(previous))

    def _save_alone(self, arrays: dict[str, Any], content: dict[str, Any]) -> None:
        try:
            path, content = self._seal(arrays, content)
            is_new = self._make_room(path, content)
            if is_new:
                orbax_io.write(path, arrays, content)
            self._finish_save(path, content if is_new else None)
        except BaseException as error:
            self._fail(error)

    def _save_in_cluster(self, arrays: dict[str, Any], content: dict[str, Any]) -> None:
        """Saves in the foreground, so that all processes learn of a failure at the same step.

        A process that fails to write would leave the others waiting inside Orbax; so rank 0 checks the disk first.
        """
        try:
            path, content = self._seal(arrays, content)
            write, reason = multihost.on_rank_0(lambda: self._check_disk(path, arrays, content))
            if reason is not None:
                raise SaveFailed(reason)
            if write:
                orbax_io.write(path, arrays, content)
            if multihost.is_rank_0():
                self._finish_save(path, content if write else None)
        except BaseException as error:
            self._fail(error)
        if multihost.any_of(self._error is not None) and self._error is None:
            self._error = SaveFailed("it failed in another process")

    def _check_disk(self, path: Path, arrays: dict[str, Any], content: dict[str, Any]) -> tuple[bool, str | None]:
        """Returns whether the checkpoint must be written, and why it cannot be."""
        try:
            write = self._make_room(path, content)
            size, free = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays)), shutil.disk_usage(self.directory).free
            if free < size:
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {size:,} bytes needed, {free:,} free")
        except OSError as error:
            return False, integrity.root_cause(error)
        return write, None

    def _seal(self, arrays: dict[str, Any], content: dict[str, Any]) -> tuple[Path, dict[str, Any]]:
        """Returns the path of a checkpoint, and its content with digests; ValueError if the arrays are not finite."""
        bad = integrity.not_finite(arrays)
        if bad:
            raise ValueError(f"not saved: non-finite values in {few(bad)}")
        return self.directory / str(int(arrays["step"])), integrity.seal(
            {**content, "digests": integrity.digests(arrays)}
        )

    def _finish_save(self, path: Path, written: dict[str, Any] | None) -> None:
        """Reads a checkpoint back, and only then removes older ones; `written` is None if it was there already."""
        step = int(path.name)
        self._unproved.add(step)
        self._contents.pop(step, None)
        if written is None:
            atomic.sync_tree(path)
            atomic.sync(path.parent)
        found = proof.read_back(path)
        if written is not None and found[integrity.SEAL] != written[integrity.SEAL]:
            raise CorruptCheckpoint(f"{path} is corrupt: its metadata differs from what was written")
        if self._on_save is not None:
            self._on_save(step, found["metadata"])
        self._unproved.discard(step)
        self._remove_incomplete()  # of a failed save
        self._remove_old()

    def _fail(self, error: BaseException) -> None:
        self._error = error
        if isinstance(error, CorruptCheckpoint):
            for step in self._unproved & {*self.steps()}:
                self._remove(self.directory / str(step))
        self._remove_incomplete()  # the next attempt needs the disk space

    def _make_room(self, path: Path, content: dict[str, Any]) -> bool:
        """Returns whether a checkpoint must be written. Removes one of the same step that has less information."""
        atomic.make_directory(self.directory)
        if not path.is_dir():
            if os.path.lexists(path):
                self._move_away(int(path.name), f"{path} is no directory")
            return True
        with contextlib.suppress(CorruptCheckpoint):
            old = self._read_content(int(path.name))
            # A run that stops during an evaluation saves before the metrics of that step are written ('settled').
            settled = old["metadata"].get("settled", True) or not content["metadata"].get("settled", True)
            if settled and (old["metrics"] or not content["metrics"]):
                return False
        self._remove(path)
        return True

    def _remove(self, path: Path) -> None:
        # Renamed first, so that a process killed here does not leave half a checkpoint under a valid name.
        doomed = self.directory / f"{_REMOVING}{path.name}"
        atomic.check(path)
        self._contents.pop(int(path.name), None)
        atomic.remove_tree(doomed)
        os.rename(path, doomed)
        atomic.remove_tree(doomed)

    def _remove_old(self) -> None:
        """Removes all checkpoints except the newest and the best."""
        steps, ranked = self.steps(), [step for _, step in self._ranked()]
        kept = {*steps[-self._keep :], *ranked[max(0, len(ranked) - self._keep_best) :]}
        for step in set(steps) - kept:
            self._remove(self.directory / str(step))

    def is_saving(self) -> bool:
        """Returns whether a save is in progress."""
        return self._thread is not None and self._thread.is_alive()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Waits for the save in progress.

        Raises:
            SaveFailed: it failed.
        """
        self._join()
        error, self._error = self._error, None
        if error is not None:
            raise SaveFailed(integrity.root_cause(error)) from error

    # --- restoring --------------------------------------------------------------------------------------------------

    def restore(self, like: Mapping[str, Any], step: int | None = None, optional: Collection[str] = ()) -> dict:
        """Returns the arrays of a step, by default the newest, verified.

        Args:
            like: trees of arrays or jax.ShapeDtypeStructs, by name: the shapes, dtypes and shardings of the result.
            step: one of `steps()`.
            optional: names that an older checkpoint may lack; the result then lacks them as well.

        Raises:
            UserError: there is no such checkpoint, it is corrupt, or it is of another model.
        """
        try:
            return self._restore(like, self.find(step), optional)
        except CorruptCheckpoint as error:
            raise UserError(f"{error}\n  verify all: python -m vit_jax.checkpoints verify DIR") from error

    def restore_newest(self, like: Mapping[str, Any], optional: Collection[str] = ()) -> dict:
        """Returns the arrays of the newest intact checkpoint; corrupt ones are moved to WORKDIR/checkpoints-damaged.

        Arguments as for `restore`.

        Raises:
            UserError: there is none, all are corrupt, or it is of another model.
        """
        if not multihost.on_rank_0(lambda: bool(self.corrupt())):
            self.find(None)
        # If one process of a cluster finds a corrupt file, all of them use the next older checkpoint.
        for step in reversed(multihost.on_rank_0(self.steps)):
            arrays = problem = failure = None
            try:
                arrays = self._restore(like, step, optional)
            except CorruptCheckpoint as error:
                problem = str(error)
            except UserError as error:
                failure = error
            if multihost.any_of(failure is not None):
                raise failure or UserError(f"another process cannot read checkpoint {step}\n  see its message")
            if not multihost.any_of(problem is not None):
                return arrays
            del arrays  # there may be no memory for two
            self._contents.pop(step, None)
            multihost.on_rank_0(lambda step=step, problem=problem: self._move_away(step, problem or "corrupt"))
        raise UserError(
            f"all checkpoints in {self.directory} are corrupt; they were moved to {self._corrupt_directory}\n"
            "  use another --workdir, or remove this one to start again"
        )

    def read_part(self, step: int, name: str) -> dict[str, np.ndarray]:
        """Returns the verified arrays below one top-level name, by path ('parameters/head/logits/kernel').

        Raises:
            UserError: they are corrupt.
        """
        path = self.directory / str(step)
        written = {key: text for key, text in self.content(step)["digests"].items() if key.startswith(f"{name}/")}
        try:
            return inventory.verified(
                path, written, lambda: integrity.names_and_leaves({name: orbax_io.read_part(path, name)})
            )
        except CorruptCheckpoint as error:
            raise UserError(str(error)) from error

    def _move_away(self, step: int, problem: str) -> None:
        target, count = self._corrupt_directory / str(step), 0
        while target.exists():
            count += 1
            target = self._corrupt_directory / f"{step}-{count}"
        atomic.make_directory(self._corrupt_directory)
        atomic.rename(self.directory / str(step), target)
        self._say(f"warning: {problem}; moved to {target}")

    def _restore(self, like: Mapping[str, Any], step: int, optional: Collection[str]) -> dict[str, Any]:
        path, written = self.directory / str(step), self._read_content(step)["digests"]
        stored = {name.split("/")[0] for name in written}
        wanted = {name: tree for name, tree in like.items() if name in stored or name not in optional}
        integrity.check_shapes(path, written, wanted)
        return inventory.verified(path, written, lambda: orbax_io.read(path, wanted))
