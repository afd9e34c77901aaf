"""Evaluation of a whole split, exactly: every example once, whatever the batch size or the number of devices."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from vit_jax.data import pipeline
from vit_jax.data.augment import AsTheyAre, Augment
from vit_jax.models.pooling import HeadAlone
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import hardware, parallel
from vit_jax.training.losses import cross_entropy

TOP = 5
# Enough to hide the dispatch; few enough to fit where batches are sent, and to stop soon when asked to.
BATCHES_A_DISPATCH = 8


class Interrupted(Exception):
    """An evaluation was asked to stop before its end."""


def score(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"], real: Bool[Array, " batch"]
) -> dict[str, jax.Array]:
    """Sums over the real examples of a batch: examples, correct, top5 (int32) and loss (float32).

    An example with a logit that is not a number is never correct.
    """
    finite = jnp.isfinite(logits).all(axis=-1)
    own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    # Of equal logits the first counts as the larger, as argmax has it: constant logits score by chance, not always.
    before = jnp.arange(logits.shape[-1]) < labels[:, None]
    rank = ((logits > own) | ((logits == own) & before)).sum(axis=-1)
    counted = real & finite
    return {
        "examples": real.sum(),
        "correct": (counted & (rank == 0)).sum(),
        "top5": (counted & (rank < TOP)).sum(),
        "loss": jnp.where(real, cross_entropy(logits, jax.nn.one_hot(labels, logits.shape[-1])), 0.0).sum(),
    }


def mean_probability(views: Sequence[Float[Array, "batch classes"]]) -> Float[Array, "batch classes"]:
    """Logits of the mean of the views' class probabilities."""
    logs = jax.nn.log_softmax(jnp.stack(views).astype(jnp.float32), axis=-1)
    return jax.nn.logsumexp(logs, axis=0) - jnp.log(len(views))


def make_scorer(
    model: VisionTransformer | HeadAlone, augment: Augment | AsTheyAre, mesh: Mesh
) -> Callable[[Any, pipeline.Feed, jax.Array], dict[str, Any]]:
    """The compiled function (parameters, feed, real [batches, batch]) -> sums as of `score` over all its batches.

    Of a model with several heads, a dictionary of such sums.
    """

    def one(logits: Any, labels: Any, real: jax.Array) -> dict[str, Any]:
        if isinstance(logits, Mapping):
            return {name: score(logits[name], labels[name], real) for name in labels}
        return score(logits, labels, real)

    def run(parameters: Any, feed: pipeline.Feed, real: jax.Array) -> dict[str, Any]:
        def body(position: jax.Array, sums: dict[str, Any]) -> dict[str, Any]:
            inputs, labels = pipeline.take(feed, position, parallel.spread(mesh))
            views = [model.apply({"params": parameters}, view) for view in augment.views(inputs)]
            logits = views[0] if len(views) == 1 else jax.tree.map(lambda *heads: mean_probability(heads), *views)
            return jax.tree.map(jnp.add, sums, one(logits, labels, real[position]))

        zeros = _zeros(model.classes)
        return jax.lax.fori_loop(0, real.shape[0], body, jax.tree.map(jnp.asarray, zeros))

    options = hardware.compiler_options(mesh.devices.flat[0].platform)
    return jax.jit(run, out_shardings=parallel.replicated(mesh), compiler_options=options)


def extract(
    model: VisionTransformer, augment: Augment, parameters: Any, batches: pipeline.Pipeline, batch_size: int
) -> Iterator[Float[np.ndarray, "examples *features"]]:
    """What a model makes of every example of a source, in order, some batches at a time; no augmentation, no dropout.

    With a model whose `classes` is None, these are features.
    """

    def run(parameters: Any, feed: pipeline.Feed) -> jax.Array:
        def one(position: jax.Array) -> jax.Array:
            inputs, _ = pipeline.take(feed, position, parallel.spread(batches.mesh))
            return model.apply({"params": parameters}, augment.normalize(inputs))

        return jax.lax.map(one, jnp.arange(rows))

    indices, real = pipeline.evaluation_indices(batch_size, len(batches.source))
    rows, tables, present = _tables(batches, indices, real)
    options = hardware.compiler_options(batches.mesh.devices.flat[0].platform)
    compiled = jax.jit(run, out_shardings=parallel.replicated(batches.mesh), compiler_options=options)
    for feed, counted in zip(batches.feeds((table, rows) for table in tables), present, strict=True):
        features = np.asarray(compiled(parameters, feed))
        yield features.reshape(-1, *features.shape[2:])[counted.ravel()]


def _tables(
    batches: pipeline.Pipeline, indices: np.ndarray, real: np.ndarray
) -> tuple[int, Int[np.ndarray, "dispatches rows batch"], Bool[np.ndarray, "dispatches rows batch"]]:
    """Batches a dispatch, and all of them so arranged; the last dispatch is filled up: one program serves all."""
    count, batch_size = indices.shape
    rows = batches.rows(batch_size, min(BATCHES_A_DISPATCH, count))
    missing = ((0, -count % rows), (0, 0))
    return rows, *(np.pad(array, missing).reshape(-1, rows, batch_size) for array in (indices, real))


def _zeros(classes: int | Mapping[str, int]) -> dict[str, Any]:
    zeros = {"examples": 0, "correct": 0, "top5": 0, "loss": 0.0}
    return {name: dict(zeros) for name in classes} if isinstance(classes, Mapping) else zeros


def evaluate(
    scorer: Callable,
    parameters: Any,
    batches: pipeline.Pipeline,
    batch_size: int,
    split: str,
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float | int]:
    """Metrics of the whole split, named '<split>/accuracy', '/top5', '/loss' (means) and '/examples' (a count).

    With several heads these are the first one's, and '<split>/<head>/accuracy', '/top5' and '/loss' are each one's.

    Raises:
        Interrupted: `asked_to_stop()` was True before the end.
    """
    indices, real = pipeline.evaluation_indices(batch_size, len(batches.source))
    rows, tables, present = _tables(batches, indices, real)
    totals = _zeros(batches.source.classes())
    for feed, counted in zip(batches.feeds((table, rows) for table in tables), present, strict=True):
        if asked_to_stop():
            raise Interrupted
        sums = scorer(parameters, feed, counted)
        totals = jax.tree.map(lambda total, more: total + more.item(), totals, sums)
    if not batches.source.others:
        return {**_means(split, totals), f"{split}/examples": totals["examples"]}
    first = totals[batches.source.label]
    metrics = {**_means(split, first), f"{split}/examples": first["examples"]}
    for name in batches.source.classes():
        metrics |= _means(f"{split}/{name}", totals[name])
    return metrics


def _means(prefix: str, sums: dict[str, float | int]) -> dict[str, float]:
    names = {"accuracy": "correct", "top5": "top5", "loss": "loss"}
    return {f"{prefix}/{metric}": sums[name] / sums["examples"] for metric, name in names.items()}
