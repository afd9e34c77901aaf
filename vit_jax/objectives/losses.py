"""What classification minimises and counts: the cross-entropy of one head, or the weighted sum over several."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, PyTree
from ml_collections import ConfigDict

from vit_jax.errors import UserError

Logits = PyTree[Float[Array, "batch _"]]
TOP = 5


def label_kinds(data: ConfigDict) -> tuple[str, ...]:
    """The kinds of label that are learned, a head each; the first one is the one that is reported without its name."""
    return tuple(kind.strip() for kind in data.labels.split(","))


def loss_weights(config: ConfigDict) -> dict[str, float]:
    """The factor of each head's loss, in the order of `config.data.labels`; 1 where nothing is said.

    Raises:
        UserError: what is written is not a list of 'name=number', or names a head that there is not.
    """
    kinds, text = label_kinds(config.data), config.train.loss_weights
    weights = dict.fromkeys(kinds, 1.0)
    for part in text.split(",") if text else []:
        kind, _, number = (word.strip() for word in part.partition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if kind not in weights or not 0 <= weight < float("inf"):
            raise UserError(
                f"config.train.loss_weights is {text!r}\n"
                f"  allowed: numbers of at least 0 by label, as '{','.join(f'{kind}=1' for kind in kinds)}'"
            )
        weights[kind] = weight
    if not any(weights.values()):
        raise UserError(f"config.train.loss_weights is {text!r}\n  allowed: at least one above 0")
    return weights


def cross_entropy(
    logits: Float[Array, "batch classes"], targets: Float[Array, "batch classes"]
) -> Float[Array, " batch"]:
    """Softmax cross-entropy of each example against class probabilities, in float32."""
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def sigmoid_cross_entropy(
    logits: Float[Array, "batch classes"], targets: Float[Array, "batch classes"]
) -> Float[Array, " batch"]:
    """Cross-entropy of each class by itself, summed over the classes of each example, in float32.

    As in the published code of arXiv 2106.04560: a class is there or not, whatever the others are.
    """
    return optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets).sum(axis=-1)


LOSSES: dict[str, Callable] = {"softmax": cross_entropy, "sigmoid": sigmoid_cross_entropy}


def accuracy(logits: Float[Array, "batch classes"], targets: Float[Array, "batch classes"]) -> Float[Array, ""]:
    """Share of examples whose largest logit stands where their largest target does."""
    return (logits.argmax(axis=-1) == targets.argmax(axis=-1)).astype(jnp.float32).mean()


def measure(
    logits: Logits, targets: Logits, weights: Mapping[str, float], loss: str = "softmax"
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
    """The batch's mean loss, and what is recorded: `loss` and `accuracy`.

    With several heads, logits and targets are dictionaries. The loss is then the weighted sum, the accuracy that of
    the head that `weights` names first, and each head's own are recorded besides as `<head>/loss` and
    `<head>/accuracy`. `loss` is one of `LOSSES`.
    """
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
    """Class probabilities [batch, classes] of labels [batch], smoothed; of a dictionary of labels, one of them."""
    if isinstance(labels, Mapping):
        return {name: make_targets(labels[name], classes[name], smoothing) for name in labels}
    return optax.smooth_labels(jax.nn.one_hot(labels, classes), smoothing)


def metric_names(weights: Mapping[str, float]) -> tuple[str, ...]:
    """The names of what a training step records."""
    each = [f"{name}/{metric}" for name in weights for metric in ("loss", "accuracy")] if len(weights) > 1 else []
    return ("loss", "accuracy", *each, "gradient_norm")


def score(
    logits: Float[Array, "batch classes"],
    labels: Int[Array, " batch"],
    real: Bool[Array, " batch"],
    loss: str = "softmax",
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
        "loss": jnp.where(real, LOSSES[loss](logits, jax.nn.one_hot(labels, logits.shape[-1])), 0.0).sum(),
    }


def mean_probability(
    views: Sequence[Float[Array, "batch classes"]], loss: str = "softmax"
) -> Float[Array, "batch classes"]:
    """Logits of the mean of the views' class probabilities, which are what the loss takes them for."""
    logits = jnp.stack(views).astype(jnp.float32)
    mean = lambda logs: jax.nn.logsumexp(logs, axis=0) - jnp.log(len(views))  # noqa: E731
    if loss == "sigmoid":
        return mean(jax.nn.log_sigmoid(logits)) - mean(jax.nn.log_sigmoid(-logits))
    return mean(jax.nn.log_softmax(logits, axis=-1))
