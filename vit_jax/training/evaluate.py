"""Evaluation of a whole split, exactly: every example once, whatever the batch size or the number of devices."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from vit_jax.data import pipeline
from vit_jax.data.augment import Augment
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import parallel
from vit_jax.training.step import cross_entropy

TOP = 5
# Batches of a set that is sent rather than resident: enough to hide the dispatch, few enough to fit.
BATCHES_A_DISPATCH = 16


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


def mean_probability(views: list[Float[Array, "batch classes"]]) -> Float[Array, "batch classes"]:
    """Logits of the mean of the views' class probabilities."""
    logs = jax.nn.log_softmax(jnp.stack(views).astype(jnp.float32), axis=-1)
    return jax.nn.logsumexp(logs, axis=0) - jnp.log(len(views))


def make_scorer(
    model: VisionTransformer, augment: Augment, mesh: Mesh
) -> Callable[[Any, pipeline.Feed, jax.Array], dict[str, jax.Array]]:
    """The compiled function (parameters, feed, real [batches, batch]) -> sums as of `score` over all its batches."""

    def run(parameters: Any, feed: pipeline.Feed, real: jax.Array) -> dict[str, jax.Array]:
        def body(position: jax.Array, sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
            images, labels = pipeline.take(feed, position, parallel.spread(mesh))
            views = [model.apply({"params": parameters}, view) for view in augment.views(images)]
            logits = views[0] if len(views) == 1 else mean_probability(views)
            return jax.tree.map(jnp.add, sums, score(logits, labels, real[position]))

        zeros = {"examples": 0, "correct": 0, "top5": 0, "loss": 0.0}
        return jax.lax.fori_loop(0, real.shape[0], body, jax.tree.map(jnp.asarray, zeros))

    return jax.jit(run, out_shardings=parallel.replicated(mesh))


def evaluate(
    scorer: Callable, parameters: Any, batches: pipeline.Pipeline, batch_size: int, split: str
) -> dict[str, float | int]:
    """Metrics of the whole split, named '<split>/accuracy', '/top5', '/loss' (means) and '/examples' (a count)."""
    indices, real = pipeline.evaluation_indices(batch_size, len(batches.source))
    rows = len(indices) if batches.resident is not None else min(BATCHES_A_DISPATCH, len(indices))
    rows = batches.rows(batch_size, rows)
    missing = ((0, -len(indices) % rows), (0, 0))  # the last dispatch is filled up, so that one program serves all
    tables, present = (np.pad(array, missing).reshape(-1, rows, batch_size) for array in (indices, real))
    totals = {"examples": 0, "correct": 0, "top5": 0, "loss": 0.0}
    for feed, counted in zip(batches.feeds((table, rows) for table in tables), present, strict=True):
        sums = scorer(parameters, feed, counted)
        totals = {name: totals[name] + sums[name].item() for name in totals}
    count = totals["examples"]
    return {
        f"{split}/accuracy": totals["correct"] / count,
        f"{split}/top5": totals["top5"] / count,
        f"{split}/loss": totals["loss"] / count,
        f"{split}/examples": count,
    }
