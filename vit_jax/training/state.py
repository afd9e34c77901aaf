"""Everything that training carries from one step to the next, and everything that a checkpoint holds."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from vit_jax import optim

# Names in a checkpoint -> fields of TrainState. The names on disk never change; the fields may.
ARRAYS = {
    "step": "step",
    "shift": "skipped_batches",
    "streak": "nonfinite_streak",
    "updates": "updates",
    "parameters": "parameters",
    "optimizer": "optimizer",
    "averaged": "averaged",
    "objective": "objective",
    "metrics": "metrics",
}
# Arrays that checkpoints of version 0.1 lack.
ADDED = ("updates",)


class TrainState(flax.struct.PyTreeNode):
    """The state after `step` training steps.

    Attributes:
        step: int32, number of steps taken.
        skipped_batches: int32, number of batches skipped after bursts of non-finite steps. Order, augmentation and
            dropout depend on the seed and on `step + skipped_batches`, the index of the next batch.
        nonfinite_streak: int32, number of steps in a row, up to this one, whose loss or gradient was not finite.
        updates: int32, number of parameter updates; steps with a non-finite loss or gradient make none.
        parameters: of the trained module, float32.
        optimizer: state of the optax transformation.
        averaged: exponential moving average of the parameters, or None.
        objective: extra state of the objective, such as a teacher's parameters, or None.
        metrics: name -> float32 sum over the steps since the last log step; 'count' and 'skipped' are the numbers of
            finite and non-finite steps. They are part of the state so that a resumed run logs exactly what the
            uninterrupted one does.
    """

    # Any: JAX transformations rebuild the state with shapes, shardings and placeholders in place of arrays.
    step: Any
    skipped_batches: Any
    nonfinite_streak: Any
    updates: Any
    parameters: Any
    optimizer: Any
    averaged: Any
    objective: Any
    metrics: Any

    def for_evaluation(self) -> Any:
        """Returns the parameters to evaluate and to export: the averaged ones if there are any."""
        return self.parameters if self.averaged is None else self.averaged

    def to_arrays(self) -> dict[str, Any]:
        """Returns the state by its names in a checkpoint; parts that are None are left out."""
        arrays = {name: getattr(self, field) for name, field in ARRAYS.items()}
        return {name: tree for name, tree in arrays.items() if tree is not None}

    def with_arrays(self, arrays: Mapping[str, Any]) -> "TrainState":
        """Returns the same state with the arrays of a checkpoint, which may be one of version 0.1."""
        arrays = dict(arrays)
        if "updates" not in arrays:
            # A copy: no two arrays of the state may share a buffer, since all of them are donated.
            arrays["updates"] = jnp.copy(optim.legacy_update_count(arrays["optimizer"]))
        return self.replace(**{ARRAYS[name]: tree for name, tree in arrays.items()})


def zero_metrics(names: tuple[str, ...]) -> dict[str, jax.Array]:
    """Returns metric sums over no steps: zeros."""
    return {name: jnp.zeros((), jnp.float32) for name in (*names, "count", "skipped")}
