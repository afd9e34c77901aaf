"""Losses and counts of classification: the cross-entropy of one head, or the weighted sum over several."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree
from ml_collections import ConfigDict

Logits = PyTree[Float[Array, "batch _"]]
TOP = 5


def loss_weights(config: ConfigDict) -> dict[str, float]:
    """Returns the weight of each head's loss, in the order of `config.data.labels`; 1 by default."""
    return {**dict.fromkeys(config.data.labels, 1.0), **dict(config.train.loss_weights or ())}


def cross_entropy(
    logits: Float[Array, "batch classes"], targets: Float[Array, "batch classes"]
) -> Float[Array, " batch"]:
    """Returns the softmax cross-entropy of each example against class probabilities, in float32."""
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def sigmoid_cross_entropy(
    logits: Float[Array, "batch classes"], targets: Float[Array, "batch classes"]
) -> Float[Array, " batch"]:
    """Returns the binary cross-entropy of each class, summed over the classes of each example, in float32.

    As in the published code of arXiv 2106.04560: each class is present or absent, independently of the others.
    """
    return optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets).sum(axis=-1)


LOSSES: dict[str, Callable] = {"softmax": cross_entropy, "sigmoid": sigmoid_cross_entropy}


def balanced_weights(labels: Int[np.ndarray, " examples"], classes: int) -> Float[np.ndarray, " classes"]:
    """Returns n / (k n_c) for a class with n_c of n examples, k of the classes having any; 0 for the others.

    The mean over the examples of the weights of their classes is 1.
    """
    counts = np.bincount(labels, minlength=classes)
    present = counts > 0
    return np.where(present, len(labels) / (present.sum() * np.maximum(counts, 1)), 0).astype(np.float32)


def weighted(
    logits: Float[Array, "batch classes"],
    targets: Float[Array, "batch classes"],
    weights: Float[np.ndarray, " classes"],
    loss: str,
) -> Float[Array, " batch"]:
    """Returns the loss of each example with class weights, in float32.

    It is the sum over the classes of target times weight times the loss of a one-hot target of that class. So a mixed
    example has the mixed losses of its two classes; with weights of 1 it is `LOSSES[loss]`.
    """
    logits, targets = logits.astype(jnp.float32), targets * weights
    if loss == "softmax":
        return optax.softmax_cross_entropy(logits, targets)
    absent = jax.nn.softplus(logits).sum(axis=-1)  # the loss if every class is absent
    return targets.sum(axis=-1) * absent - (targets * logits).sum(axis=-1)


def accuracy(logits: Float[Array, "batch classes"], targets: Float[Array, "batch classes"]) -> Float[Array, ""]:
    """Returns the fraction of examples whose largest logit is at the index of their largest target."""
    return (logits.argmax(axis=-1) == targets.argmax(axis=-1)).astype(jnp.float32).mean()


def loss_and_metrics(
    logits: Logits,
    targets: Logits,
    weights: Mapping[str, float],
    loss: str = "softmax",
    class_weights: Mapping[str, Float[np.ndarray, " _"]] | None = None,
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
    """Returns the batch's mean loss, and the metrics to log: `loss` and `accuracy`, which class weights do not change.

    With several heads, logits and targets are dictionaries. The loss is then the weighted sum, the accuracy that of
    the first head in `weights`, and `<head>/loss` and `<head>/accuracy` of each head are added. `loss` is one of
    `LOSSES`, `class_weights` those of each head.
    """
    if class_weights is not None:
        several = isinstance(logits, Mapping)
        total = 0.0
        for name, weight in weights.items():
            head = (logits[name], targets[name]) if several else (logits, targets)
            total += weight * weighted(*head, class_weights[name], loss).mean()
        return total, loss_and_metrics(logits, targets, weights, loss)[1]
    entropy = LOSSES[loss]
    if not isinstance(logits, Mapping):
        (weight,) = weights.values()
        mean = entropy(logits, targets).mean()
        total = mean if weight == 1 else weight * mean
        return total, {"loss": total, "accuracy": accuracy(logits, targets)}
    metrics = {}
    for name in weights:
        metrics[f"{name}/loss"] = entropy(logits[name], targets[name]).mean()
        metrics[f"{name}/accuracy"] = accuracy(logits[name], targets[name])
    total = sum(weight * metrics[f"{name}/loss"] for name, weight in weights.items())
    return total, {"loss": total, "accuracy": metrics[f"{next(iter(weights))}/accuracy"], **metrics}


def make_targets(labels: Any, classes: Any, smoothing: float) -> Logits:
    """Returns smoothed class probabilities [batch, classes] of labels [batch]; of several heads, by name."""
    if isinstance(labels, Mapping):
        return {name: make_targets(labels[name], classes[name], smoothing) for name in labels}
    return optax.smooth_labels(jax.nn.one_hot(labels, classes), smoothing)


def metric_names(weights: Mapping[str, float]) -> tuple[str, ...]:
    """Returns the names of the metrics that a training step logs."""
    each = [f"{name}/{metric}" for name in weights for metric in ("loss", "accuracy")] if len(weights) > 1 else []
    return ("loss", "accuracy", *each, "gradient_norm")


def eval_sums(
    logits: Float[Array, "batch classes"],
    labels: Int[Array, " batch"],
    real: Bool[Array, " batch"],
    loss: str = "softmax",
) -> dict[str, jax.Array]:
    """Returns sums over the real examples of a batch: examples, correct, top5 (int32) and loss (float32).

    An example with a non-finite logit is never correct.
    """
    counted, rank = real & jnp.isfinite(logits).all(axis=-1), _rank(logits, labels)
    return {
        "examples": real.sum(),
        "correct": (counted & (rank == 0)).sum(),
        "top5": (counted & (rank < TOP)).sum(),
        "loss": jnp.where(real, LOSSES[loss](logits, jax.nn.one_hot(labels, logits.shape[-1])), 0.0).sum(),
    }


def _rank(logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> Int[Array, " batch"]:
    """Returns the number of classes that come before the true one, by logit.

    Ties go to the lower index, as in argmax: constant logits are correct by chance, not always.
    """
    own = _at(logits, labels)[:, None]
    before = jnp.arange(logits.shape[-1]) < labels[:, None]
    return ((logits > own) | ((logits == own) & before)).sum(axis=-1)


def _at(values: Float[Array, "batch classes"], labels: Int[Array, " batch"]) -> Float[Array, " batch"]:
    return jnp.take_along_axis(values, labels[:, None], axis=-1)[:, 0]


def predictions(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"], loss: str
) -> dict[str, Int[Array, " batch"] | Float[Array, " batch"]]:
    """Returns what `evaluation.per_class.Predictions` holds of each example of a batch, by the names of its fields.

    Probabilities are those of the softmax, or each class's sigmoid. The negative log-likelihood is that of the softmax
    for both losses: independent classes, of which exactly one is present, have the softmax of their logits as
    probabilities. For a softmax head it is thus the loss. It is NaN with a non-finite logit.
    """
    finite = jnp.isfinite(logits).all(axis=-1)
    logits = logits.astype(jnp.float32)
    probabilities = jax.nn.softmax(logits) if loss == "softmax" else jax.nn.sigmoid(logits)
    return {
        "predicted": jnp.where(finite, logits.argmax(axis=-1), -1).astype(jnp.int32),
        "probability": probabilities.max(axis=-1),
        "true_probability": _at(probabilities, labels),
        "rank": _rank(logits, labels).astype(jnp.int32) + 1,
        "nll": jnp.where(finite, -_at(jax.nn.log_softmax(logits), labels), jnp.nan),
    }


def average_views(views: Sequence[Logits], loss: str) -> Logits:
    """Returns the logits of a single view unchanged; of several views, the logits of the mean probabilities."""
    if len(views) == 1:
        return views[0]
    return jax.tree.map(lambda *heads: mean_probability(heads, loss), *views)


def mean_probability(
    views: Sequence[Float[Array, "batch classes"]], loss: str = "softmax"
) -> Float[Array, "batch classes"]:
    """Returns the logits of the views' mean class probabilities: of a softmax, or of each class's sigmoid."""
    logits = jnp.stack(views).astype(jnp.float32)

    def mean(logs: jax.Array) -> jax.Array:
        return jax.nn.logsumexp(logs, axis=0) - jnp.log(len(views))

    if loss == "sigmoid":
        return mean(jax.nn.log_sigmoid(logits)) - mean(jax.nn.log_sigmoid(-logits))
    return mean(jax.nn.log_softmax(logits, axis=-1))
