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
from vit_jax.data.sources import Source
from vit_jax.evaluation.per_class import Predictions
from vit_jax.objectives.base import Objective
from vit_jax.progress import Counter
from vit_jax.runtime import hardware
from vit_jax.sharding import multihost

# Large enough to hide the cost of a dispatch; small enough for streamed batches to fit, and to stop soon on request.
BATCHES_PER_DISPATCH = 8


class Interrupted(Exception):
    """An evaluation stopped early because `should_stop()` returned True."""


def make_scorer(
    module: nn.Module, augment: Augment, mesh: Mesh, objective: Objective
) -> Callable[[Any, pipeline.Feed, jax.Array], tuple[dict[str, Any], dict[str, Any]]]:
    """Returns the compiled function (parameters, feed, example_ids [batches, batch]) -> (sums, predictions).

    These are the results of `objective.eval_batch`: the sums over all batches, and the predictions of each example, as
    arrays [batches, batch]. `example_ids` are indices into the split; -1 marks padding, which is not counted.
    """

    def run(parameters: Any, feed: pipeline.Feed, example_ids: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
        def score_batch(position: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
            inputs, labels = pipeline.get_batch(feed, position, sharding.data_sharding(mesh))
            return objective.eval_batch(module, parameters, augment.views(inputs), labels, example_ids[position])

        def add_batch(sums: dict[str, Any], position: jax.Array) -> tuple[dict[str, Any], dict[str, Any]]:
            of_batch, predictions = score_batch(position)
            return jax.tree.map(jnp.add, sums, of_batch), predictions

        shapes, _ = jax.eval_shape(score_batch, jnp.int32(0))
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(add_batch, zeros, jnp.arange(example_ids.shape[0]))

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
) -> tuple[dict[str, float | int], dict[str, Predictions]]:
    """Returns the metrics of a whole split, and the predictions for every example by head ({} without labels).

    The metrics are named as by `objective.summarize`: '<split>/loss', '<split>/examples', ...

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
    totals, parts = None, []
    with Counter("scoring", len(batches.source), f"{split} images", enabled=multihost.is_rank_0()) as counter:
        for feed, ids in zip(batches.feeds((table, len(table)) for table in indices), example_ids, strict=True):
            if should_stop():
                raise Interrupted
            sums, predictions = scorer(parameters, feed, ids)
            sums = jax.tree.map(lambda leaf: leaf.item(), sums)
            totals = sums if totals is None else jax.tree.map(operator.add, totals, sums)
            parts.append(jax.device_get(predictions))
            counter.add(ids.size)
    return objective.summarize(split, totals), _predictions(parts, is_real, batches.source)


def _predictions(
    parts: list[dict[str, Any]], is_real: Bool[np.ndarray, "dispatches batches batch"], source: Source
) -> dict[str, Predictions]:
    """Returns the predictions of all dispatches by head, without padding, in the order of the examples."""
    labels, names, found = source.labels_by_kind(), source.class_names_by_label(), {}
    for head in parts[0]:
        arrays = {name: np.stack([part[head][name] for part in parts])[is_real] for name in parts[0][head]}
        found[head] = Predictions(labels[head], class_names=names[head], **arrays)
    return found


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
