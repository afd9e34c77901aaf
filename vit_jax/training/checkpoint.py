"""Saving and restoring the state with Orbax: in the background, the newest few and the best."""

import math
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from vit_jax.errors import UserError
from vit_jax.training.state import TrainState

FOLDER = "checkpoints"
METRIC = "validation/accuracy"


def _rank(metrics: dict[str, float] | None) -> float:
    value = (metrics or {}).get(METRIC, -math.inf)
    return -math.inf if math.isnan(value) else value


def _preservation(keep: int, keep_best: int) -> Any:
    policies = ocp.training.preservation_policies
    kept = [policies.LatestN(keep)]
    if keep_best:
        # Alone, the policy of the best would delete the newest: the two stand together.
        best = policies.BestN(get_metric_fn=_rank, n=keep_best, keep_checkpoints_without_metrics=False)
        kept.append(best)
    return policies.AnyPreservationPolicy(kept)


class Checkpoints:
    """The checkpoints of a workdir; a context manager that on leaving waits for the save under way."""

    def __init__(self, workdir: Path, keep: int = 2, keep_best: int = 1, read_only: bool = False):
        """Opens, or starts, WORKDIR/checkpoints.

        Args:
            workdir: the run's folder.
            keep: how many of the newest are kept.
            keep_best: how many of those with the best validation accuracy are kept besides.
            read_only: leave alone what another process may be writing there.
        """
        self._orbax = ocp.training.Checkpointer(
            workdir.resolve() / FOLDER,
            save_decision_policy=None,
            preservation_policy=_preservation(keep, keep_best),
            cleanup_tmp_directories=not read_only,
        )
        self._saving = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self._orbax.close()

    def steps(self) -> list[int]:
        """The steps that there are checkpoints of, oldest first."""
        return [checkpoint.step for checkpoint in self._orbax.checkpoints]

    def best(self) -> tuple[int, float] | None:
        """The step with the best validation accuracy, and that; None where none was measured. Of equals, the newest."""
        ranked = [(_rank(checkpoint.metrics), checkpoint.step) for checkpoint in self._orbax.checkpoints]
        score, step = max(ranked, default=(-math.inf, 0))
        return (step, score) if score > -math.inf else None

    def metadata(self, step: int | None = None) -> dict[str, Any]:
        """What was saved beside the state of a step (by default the newest): `config` and `seconds` of training."""
        return self._orbax.metadata(step or self.steps()[-1]).custom_metadata

    def save(self, state: TrainState, metadata: dict, metrics: dict[str, float] | None = None) -> None:
        """Starts a save of the state and what `metadata` is to return; back once the state may be overwritten."""
        self.wait()
        self._saving = self._orbax.save_checkpointables_async(
            int(state.step), {"state": _without_none(state)}, force=True, metrics=metrics, custom_metadata=metadata
        )

    def wait(self) -> None:
        """Waits for the save under way; raises what made it fail."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def restore(self, like: TrainState, step: int | None = None) -> TrainState:
        """The state of a step (by default the newest) with the shapes, types and shardings of `like`.

        Args:
            like: arrays or jax.ShapeDtypeStruct.
            step: one of `steps()`.

        Raises:
            UserError: there is no such checkpoint.
        """
        steps = self.steps()
        if not steps or (step is not None and step not in steps):
            known = ", ".join(map(str, steps)) or "none"
            wanted = "" if step is None else f" of step {step}"
            raise UserError(f"{self._orbax.directory} has no checkpoint{wanted}\n  there are: {known}")
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like)
        loaded = self._orbax.load_checkpointables(step or steps[-1], {"state": _without_none(abstract)})["state"]
        return like.replace(**loaded)


def _without_none(state: TrainState) -> dict[str, Any]:
    fields = ("step", "parameters", "optimizer", "averaged", "metrics")
    return {name: getattr(state, name) for name in fields if getattr(state, name) is not None}
