"""The linear probe, against scikit-learn's logistic regression."""

import numpy as np
import pytest

from vit_jax.evaluation import linear_probe


@pytest.fixture(scope="module")
def problem():
    """Three overlapping classes of ten features, of very different size."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 400)
    features = generator.normal(size=(3, 10))[labels] + 1.5 * generator.normal(size=(400, 10))
    return (features * 10.0 ** generator.uniform(-2, 2, 10)).astype(np.float32), labels


def by_scikit_learn(features, labels, l2):
    """Loss, and weights and bias up to what all classes have in common, in float64."""
    from sklearn.linear_model import LogisticRegression

    features = features.astype(np.float64)
    inputs = (features - features.mean(0)) / (features.std(0) + 1e-5)
    fitted = LogisticRegression(C=1 / (l2 * len(labels)), tol=1e-10, max_iter=10_000).fit(inputs, labels)
    logits = fitted.decision_function(inputs)
    entropy = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
    loss = entropy.mean() + l2 / 2 * np.square(fitted.coef_).sum()
    return loss, fitted.coef_.T, fitted.intercept_ - fitted.intercept_.mean()


@pytest.mark.parametrize("l2", [1.0, 1e-1, 1e-2])
def test_loss_and_coefficients_are_scikit_learns(problem, l2):
    loss, kernel, bias = by_scikit_learn(*problem, l2)
    fit = linear_probe.Probe(*problem, 3).fit(l2)
    assert fit.loss == pytest.approx(loss, rel=1e-6)
    assert fit.gradient < 2e-6
    np.testing.assert_allclose(fit.classifier.kernel, kernel, atol=3e-4)
    np.testing.assert_allclose(fit.classifier.bias - fit.classifier.bias.mean(), bias, atol=3e-4)


def test_blocks_change_nothing(problem, monkeypatch):
    whole = linear_probe.Probe(*problem, 3).fit(1e-2)
    monkeypatch.setattr(linear_probe, "_BLOCK", 64)  # the last one is not full
    parts = linear_probe.Probe(*problem, 3).fit(1e-2)
    np.testing.assert_allclose(parts.classifier.kernel, whole.classifier.kernel, atol=2e-4)


def test_what_is_held_out_is_not_learned_from(problem):
    features, labels = problem
    out = linear_probe.hold_out(labels, 0.25, seed=0)
    fits = linear_probe.Probe(features, labels, 3)
    found = fits.fit(1e-2, counted=~out)
    others = labels.copy()
    others[out] = (others[out] + 1) % 3
    same = linear_probe.Probe(features, others, 3).fit(1e-2, counted=~out)
    np.testing.assert_array_equal(found.classifier.kernel, same.classifier.kernel)


def test_a_share_of_each_class_is_held_out_by_the_seed():
    labels = np.repeat([0, 1, 2], [100, 50, 9])
    out = linear_probe.hold_out(labels, 0.1, seed=0)
    assert np.bincount(labels[out], minlength=3).tolist() == [10, 5, 0]
    np.testing.assert_array_equal(out, linear_probe.hold_out(labels, 0.1, seed=0))
    assert (out != linear_probe.hold_out(labels, 0.1, seed=1)).any()


def test_the_constant_is_the_one_that_does_best_on_what_was_held_out(problem):
    """Each accuracy is that of scikit-learn fitted to the rest; the choice is the best of them."""
    from sklearn.linear_model import LogisticRegression

    features, labels = problem
    grid = (1e-3, 1e-1, 10.0, 1e3)
    choice = linear_probe.Probe(features, labels, 3).choose(grid, seed=0, held_out=0.3)
    out = linear_probe.hold_out(labels, 0.3, seed=0)
    inputs = (features.astype("d") - features.mean(0, dtype="d")) / (features.std(0, dtype="d") + 1e-5)
    wanted = {}
    for l2 in grid:
        fitted = LogisticRegression(C=1 / (l2 * (~out).sum()), tol=1e-8, max_iter=10_000).fit(
            inputs[~out], labels[~out]
        )
        wanted[l2] = fitted.score(inputs[out], labels[out])
    assert choice.accuracies == pytest.approx(wanted, abs=1.01 / out.sum())
    assert choice.accuracies[choice.l2] == max(choice.accuracies.values())
    assert not any(
        l2 > choice.l2 and value == max(choice.accuracies.values()) for l2, value in choice.accuracies.items()
    )
