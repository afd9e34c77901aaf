"""Evaluation of a whole split, exactly: every example once, whatever the batch size or the number of devices."""

import operator
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from vit_jax import sharding
from vit_jax.data import pipeline
from vit_jax.data.augment import AsTheyAre, Augment
from vit_jax.models.vit import VisionTransformer
from vit_jax.objectives.base import Objective
from vit_jax.objectives.classification import CLASSIFY
from vit_jax.runtime import hardware

# Enough to hide the dispatch; few enough to fit where batches are sent, and to stop soon when asked to.
BATCHES_PER_DISPATCH = 8


class Interrupted(Exception):
    """An evaluation was asked to stop before its end."""


def make_scorer(
    module: nn.Module, augment: Augment | AsTheyAre, mesh: Mesh, objective: Objective = CLASSIFY
) -> Callable[[Any, pipeline.Feed, jax.Array], dict[str, Any]]:
    """The compiled function (parameters, feed, example_ids [batches, batch]) -> sums over all its batches.

    The sums are those of `objective.eval_sums`. `example_ids` are indices into the split; -1 marks padding, which is
    not counted.
    """

    def run(parameters: Any, feed: pipeline.Feed, example_ids: jax.Array) -> dict[str, Any]:
        def one(position: jax.Array) -> dict[str, Any]:
            inputs, labels = pipeline.get_batch(feed, position, sharding.data_sharding(mesh))
            return objective.eval_sums(module, parameters, augment.views(inputs), labels, example_ids[position])

        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, jnp.int32(0)))
        body = lambda position, sums: jax.tree.map(jnp.add, sums, one(position))  # noqa: E731
        return jax.lax.fori_loop(0, example_ids.shape[0], body, zeros)

    options = hardware.compiler_options(mesh.devices.flat[0].platform)
    return jax.jit(run, out_shardings=sharding.replicated(mesh), compiler_options=options)


def extract(
    model: VisionTransformer, augment: Augment, parameters: Any, batches: pipeline.Pipeline, batch_size: int
) -> Iterator[Float[np.ndarray, "examples *features"]]:
    """What a model makes of every example of a source, in order, some batches at a time; no augmentation, no dropout.

    With a model whose `classes` is None, these are features.
    """

    def run(parameters: Any, feed: pipeline.Feed) -> jax.Array:
        def one(position: jax.Array) -> jax.Array:
            inputs, _ = pipeline.get_batch(feed, position, sharding.data_sharding(batches.mesh))
            return model.apply({"params": parameters}, augment.normalize(inputs))

        return jax.lax.map(one, jnp.arange(rows))

    indices, real = pipeline.evaluation_indices(batch_size, len(batches.source))
    rows, tables, present = _tables(batches, indices, real)
    options = hardware.compiler_options(batches.mesh.devices.flat[0].platform)
    compiled = jax.jit(run, out_shardings=sharding.replicated(batches.mesh), compiler_options=options)
    for feed, counted in zip(batches.feeds((table, rows) for table in tables), present, strict=True):
        features = np.asarray(compiled(parameters, feed))
        yield features.reshape(-1, *features.shape[2:])[counted.ravel()]


def _tables(
    batches: pipeline.Pipeline, indices: np.ndarray, real: np.ndarray
) -> tuple[int, Int[np.ndarray, "dispatches rows batch"], Bool[np.ndarray, "dispatches rows batch"]]:
    """Batches a dispatch, and all of them so arranged; the last dispatch is filled up: one program serves all."""
    count, batch_size = indices.shape
    rows = batches.rows(batch_size, min(BATCHES_PER_DISPATCH, count))
    missing = ((0, -count % rows), (0, 0))
    return rows, *(np.pad(array, missing).reshape(-1, rows, batch_size) for array in (indices, real))


def evaluate(
    scorer: Callable,
    parameters: Any,
    batches: pipeline.Pipeline,
    batch_size: int,
    split: str,
    asked_to_stop: Callable[[], bool] = lambda: False,
    objective: Objective = CLASSIFY,
) -> dict[str, float | int]:
    """Metrics of the whole split, named '<split>/loss', '<split>/examples' and as `objective.summarise` says.

    Raises:
        Interrupted: `asked_to_stop()` was True before the end.
    """
    indices, real = pipeline.evaluation_indices(batch_size, len(batches.source))
    rows, tables, present = _tables(batches, indices, real)
    example_ids = np.where(present, tables, -1)
    totals = None
    for feed, counted in zip(batches.feeds((table, rows) for table in tables), example_ids, strict=True):
        if asked_to_stop():
            raise Interrupted
        sums = jax.tree.map(lambda more: more.item(), scorer(parameters, feed, counted))
        totals = sums if totals is None else jax.tree.map(operator.add, totals, sums)
    return objective.summarise(split, totals)
