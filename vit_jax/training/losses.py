"""What training minimises and counts: the cross-entropy of one head, or the weighted sum over several."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree
from ml_collections import ConfigDict

from vit_jax.errors import UserError

Logits = PyTree[Float[Array, "batch _"]]


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


def accuracy(logits: Float[Array, "batch classes"], targets: Float[Array, "batch classes"]) -> Float[Array, ""]:
    """Share of examples whose largest logit stands where their largest target does."""
    return (logits.argmax(axis=-1) == targets.argmax(axis=-1)).astype(jnp.float32).mean()


def measure(
    logits: Logits, targets: Logits, weights: Mapping[str, float]
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
    """The batch's mean loss, and what is recorded: `loss` and `accuracy`.

    With several heads, logits and targets are dictionaries. The loss is then the weighted sum, the accuracy that of
    the head that `weights` names first, and each head's own are recorded besides as `<head>/loss` and
    `<head>/accuracy`.
    """
    if not isinstance(logits, Mapping):
        (weight,) = weights.values()
        mean = cross_entropy(logits, targets).mean()
        loss = mean if weight == 1 else weight * mean
        return loss, {"loss": loss, "accuracy": accuracy(logits, targets)}
    metrics = {}
    for name in weights:
        metrics[f"{name}/loss"] = cross_entropy(logits[name], targets[name]).mean()
        metrics[f"{name}/accuracy"] = accuracy(logits[name], targets[name])
    loss = sum(weight * metrics[f"{name}/loss"] for name, weight in weights.items())
    return loss, {"loss": loss, "accuracy": metrics[f"{next(iter(weights))}/accuracy"], **metrics}


def metric_names(weights: Mapping[str, float]) -> tuple[str, ...]:
    """The names of what a training step records."""
    each = [f"{name}/{metric}" for name in weights for metric in ("loss", "accuracy")] if len(weights) > 1 else []
    return ("loss", "accuracy", *each, "gradient_norm")
