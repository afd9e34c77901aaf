"""Exact evaluation: every example of a split is scored once, whatever the batch size or the number of devices."""

import operator
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int

from vit_jax import sharding
from vit_jax.data import pipeline
from vit_jax.data.augment import Augment
from vit_jax.objectives.base import Objective
from vit_jax.runtime import hardware

# Large enough to hide the cost of a dispatch; small enough for streamed batches to fit, and to stop soon on request.
BATCHES_PER_DISPATCH = 8


class Interrupted(Exception):
    """An evaluation stopped early because `should_stop()` returned True."""


def make_scorer(
    module: nn.Module, augment: Augment, mesh: Mesh, objective: Objective
) -> Callable[[Any, pipeline.Feed, jax.Array], dict[str, Any]]:
    """Returns the compiled function (parameters, feed, example_ids [batches, batch]) -> sums over all its batches.

    The sums are those of `objective.eval_sums`. `example_ids` are indices into the split; -1 marks padding, which is
    not counted.
    """

    def run(parameters: Any, feed: pipeline.Feed, example_ids: jax.Array) -> dict[str, Any]:
        def score_batch(position: jax.Array) -> dict[str, Any]:
            inputs, labels = pipeline.get_batch(feed, position, sharding.data_sharding(mesh))
            return objective.eval_sums(module, parameters, augment.views(inputs), labels, example_ids[position])

        def add_batch(position: jax.Array, sums: dict[str, Any]) -> dict[str, Any]:
            return jax.tree.map(jnp.add, sums, score_batch(position))

        shapes = jax.eval_shape(score_batch, jnp.int32(0))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.fori_loop(0, example_ids.shape[0], add_batch, zeros)

    options = hardware.compiler_options(mesh.devices.flat[0].platform)
    return jax.jit(run, out_shardings=sharding.replicated(mesh), compiler_options=options)


def evaluate(
    scorer: Callable,
    parameters: Any,
    batches: pipeline.Pipeline,
    batch_size: int,
    split: str,
    objective: Objective,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float | int]:
    """Returns the metrics of a whole split as `objective.summarize` names them: '<split>/loss', '<split>/examples', ...

    Args:
        scorer: from `make_scorer`, with the same objective.
        parameters: of the scorer's module.
        batches: the pipeline of the split.
        batch_size: examples per batch, a multiple of the number of devices; does not change the result.
        split: the prefix of the metrics' names.
        objective: what the module was trained for.
        should_stop: called before each dispatch.

    Raises:
        Interrupted: `should_stop()` returned True.
    """
    indices, is_real = dispatch_tables(batches, batch_size)
    example_ids = np.where(is_real, indices, -1)
    totals = None
    for feed, ids in zip(batches.feeds((table, len(table)) for table in indices), example_ids, strict=True):
        if should_stop():
            raise Interrupted
        sums = jax.tree.map(lambda leaf: leaf.item(), scorer(parameters, feed, ids))
        totals = sums if totals is None else jax.tree.map(operator.add, totals, sums)
    return objective.summarize(split, totals)


def dispatch_tables(
    batches: pipeline.Pipeline, batch_size: int
) -> tuple[Int[np.ndarray, "dispatches batches batch"], Bool[np.ndarray, "dispatches batches batch"]]:
    """Returns the indices of the examples that each dispatch reads, and False where they are padding.

    All dispatches have the same shape, so that one compiled program serves all of them.
    """
    indices, is_real = pipeline.evaluation_indices(batch_size, len(batches.source))
    num_batches = len(indices)
    rows = batches.rows(batch_size, min(BATCHES_PER_DISPATCH, num_batches))
    padding = ((0, -num_batches % rows), (0, 0))
    indices, is_real = (np.pad(array, padding).reshape(-1, rows, batch_size) for array in (indices, is_real))
    return indices, is_real
