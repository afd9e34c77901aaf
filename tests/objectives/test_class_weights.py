"""Class weights: the training loss against sums over classes, one at a time; metrics and the default do not change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny_config

from vit_jax import objectives
from vit_jax.objectives import losses
from vit_jax.training import setup

LABELS = np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 3], np.int32)  # no example of class 2


def log_probability(logits, label, loss):
    """The log-likelihood of one class, with float64 sums over the classes."""
    logits = np.asarray(logits, np.float64)
    if loss == "softmax":
        return logits[label] - np.log(sum(np.exp(value) for value in logits))
    signs = [1 if c == label else -1 for c in range(len(logits))]
    return -sum(np.log1p(np.exp(-sign * value)) for sign, value in zip(signs, logits, strict=True))


def slow(logits, targets, weights, loss):
    """The mean over the examples of the sum over the classes of target x weight x loss of that class."""
    each = [
        sum(-t * weights[c] * log_probability(row, c, loss) for c, t in enumerate(target))
        for row, target in zip(logits, targets, strict=True)
    ]
    return np.mean(each)


def test_balanced_weights_are_inverse_to_the_counts_and_have_mean_1_over_the_examples():
    weights = losses.balanced_weights(LABELS, 4)
    np.testing.assert_allclose(weights, [10 / (3 * 6), 10 / (3 * 3), 0, 10 / (3 * 1)], rtol=1e-6)
    assert weights[LABELS].mean() == pytest.approx(1)
    # Every class contributes as much as the others.
    np.testing.assert_allclose([weights[c] * list(LABELS).count(c) for c in (0, 1, 3)], 10 / 3, rtol=1e-6)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("mixed", [False, True], ids=["smoothed", "smoothed and mixed"])
def test_the_weighted_loss_equals_a_sum_over_classes_and_metrics_stay_unweighted(loss, mixed):
    logits = np.random.default_rng(0).normal(0, 2, (10, 4)).astype(np.float32)
    targets = np.asarray(losses.make_targets(jnp.asarray(LABELS), 4, 0.1))
    if mixed:  # as mixup and cutmix do
        targets = 0.7 * targets + 0.3 * targets[::-1]
    weights = losses.balanced_weights(LABELS, 4)
    arrays = jnp.asarray(logits), jnp.asarray(targets), {"label": 1.0}, loss
    total, metrics = losses.loss_and_metrics(*arrays, {"label": weights})
    assert float(total) == pytest.approx(slow(logits, targets, weights, loss), rel=1e-5)
    _, plain = losses.loss_and_metrics(*arrays)
    assert jax.tree.all(jax.tree.map(np.array_equal, metrics, plain))
    equal = losses.loss_and_metrics(*arrays, {"label": np.ones(4, np.float32)})[0]
    assert float(equal) == pytest.approx(float(plain["loss"]), rel=1e-5)


def test_several_heads_have_weights_of_their_own():
    draw = np.random.default_rng(1)
    logits = {name: draw.normal(0, 2, (10, k)).astype(np.float32) for name, k in (("a", 4), ("b", 2))}
    labels = {"a": LABELS, "b": (LABELS > 0).astype(np.int32)}
    targets = {name: np.asarray(losses.make_targets(labels[name], logits[name].shape[1], 0.0)) for name in labels}
    config = tiny_config(data={"labels": ("a", "b")}, train={"loss_weights": {"b": 0.5}, "class_weights": "balanced"})
    objective = objectives.make(config).balanced(labels, {"a": tuple("0123"), "b": tuple("01")})
    arrays = jax.tree.map(jnp.asarray, (logits, targets))
    total, _ = losses.loss_and_metrics(*arrays, objective.weights, "softmax", objective.class_weights)
    parts = [
        slow(logits[n], targets[n], losses.balanced_weights(labels[n], logits[n].shape[1]), "softmax") for n in "ab"
    ]
    assert float(total) == pytest.approx(parts[0] + 0.5 * parts[1], rel=1e-5)


def test_without_class_weights_the_compiled_loss_is_unchanged():
    def text(class_weights):
        def loss(logits, targets):
            return losses.loss_and_metrics(logits, targets, {"label": 1.0}, "softmax", class_weights)

        return jax.jit(loss).lower(jnp.zeros((3, 4)), jnp.zeros((3, 4))).as_text()

    def before(logits, targets):
        mean = losses.cross_entropy(logits, targets).mean()
        return mean, {"loss": mean, "accuracy": losses.accuracy(logits, targets)}

    expected = jax.jit(before).lower(jnp.zeros((3, 4)), jnp.zeros((3, 4))).as_text().replace("jit_before", "jit_loss")
    assert text(None) == expected != text({"label": np.ones(4, np.float32)})


def test_an_experiment_weights_the_classes_of_its_training_split():
    config = tiny_config(data={"train": "train[:200]", "labels": ("label", "parity")})
    built = {}
    for choice in ("none", "balanced"):
        config.train.class_weights = choice
        built[choice] = setup.assemble(config, setup.check(config), setup.load_sources(config))
    assert built["none"].objective.class_weights is None
    source = built["balanced"].sources["train"]
    for name, labels in (("label", source.labels), ("parity", source.labels % 2)):
        counts = np.array([(labels == c).sum() for c in range(labels.max() + 1)])
        np.testing.assert_allclose(
            built["balanced"].objective.class_weights[name], 200 / (len(counts) * counts), rtol=1e-6
        )
