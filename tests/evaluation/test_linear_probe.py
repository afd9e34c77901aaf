"""The linear probe, compared with scikit-learn's logistic regression."""

import numpy as np
import pytest

from vit_jax.evaluation import linear_probe


@pytest.fixture(scope="module")
def problem():
    """Returns ten features of very different scale, and labels of three overlapping classes."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 3, 400)
    features = generator.normal(size=(3, 10))[labels] + 1.5 * generator.normal(size=(400, 10))
    return (features * 10.0 ** generator.uniform(-2, 2, 10)).astype(np.float32), labels


def by_scikit_learn(features, labels, l2):
    """Returns loss, kernel and bias in float64; the bias is centred, since only its differences are determined."""
    from sklearn.linear_model import LogisticRegression

    features = features.astype(np.float64)
    inputs = (features - features.mean(0)) / (features.std(0) + 1e-5)
    fitted = LogisticRegression(C=1 / (l2 * len(labels)), tol=1e-10, max_iter=10_000).fit(inputs, labels)
    logits = fitted.decision_function(inputs)
    entropy = np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]
    loss = entropy.mean() + l2 / 2 * np.square(fitted.coef_).sum()
    return loss, fitted.coef_.T, fitted.intercept_ - fitted.intercept_.mean()


@pytest.mark.parametrize("l2", [1.0, 1e-1, 1e-2])
def test_fit_agrees_with_scikit_learn(problem, l2):
    loss, kernel, bias = by_scikit_learn(*problem, l2)
    fit = linear_probe.Probe(*problem, 3).fit(l2)
    assert fit.loss == pytest.approx(loss, rel=1e-6)
    assert fit.gradient < 2e-6
    np.testing.assert_allclose(fit.classifier.kernel, kernel, atol=3e-4)
    np.testing.assert_allclose(fit.classifier.bias - fit.classifier.bias.mean(), bias, atol=3e-4)


@pytest.mark.slow
def test_block_size_does_not_change_the_result(problem, monkeypatch):
    one_block = linear_probe.Probe(*problem, 3).fit(1e-2)
    monkeypatch.setattr(linear_probe, "_BLOCK", 64)  # the last block is not full
    blocks = linear_probe.Probe(*problem, 3).fit(1e-2)
    np.testing.assert_allclose(blocks.classifier.kernel, one_block.classifier.kernel, atol=2e-4)


def test_labels_of_held_out_examples_do_not_affect_the_fit(problem):
    features, labels = problem
    held_out = linear_probe.hold_out(labels, 0.25, seed=0)
    fit = linear_probe.Probe(features, labels, 3).fit(1e-2, included=~held_out)
    changed = labels.copy()
    changed[held_out] = (changed[held_out] + 1) % 3
    same = linear_probe.Probe(features, changed, 3).fit(1e-2, included=~held_out)
    np.testing.assert_array_equal(fit.classifier.kernel, same.classifier.kernel)


def test_hold_out_takes_a_fraction_of_each_class_and_depends_on_the_seed():
    labels = np.repeat([0, 1, 2], [100, 50, 9])
    held_out = linear_probe.hold_out(labels, 0.1, seed=0)
    assert np.bincount(labels[held_out], minlength=3).tolist() == [10, 5, 0]
    np.testing.assert_array_equal(held_out, linear_probe.hold_out(labels, 0.1, seed=0))
    assert (held_out != linear_probe.hold_out(labels, 0.1, seed=1)).any()


def test_choose_returns_the_constant_with_the_best_held_out_accuracy(problem):
    """The accuracies agree with those of scikit-learn, fitted to the other examples."""
    from sklearn.linear_model import LogisticRegression

    features, labels = problem
    grid = (1e-3, 1e-1, 10.0, 1e3)
    choice = linear_probe.Probe(features, labels, 3).choose(grid, seed=0, held_out=0.3)
    held_out = linear_probe.hold_out(labels, 0.3, seed=0)
    inputs = (features.astype("d") - features.mean(0, dtype="d")) / (features.std(0, dtype="d") + 1e-5)
    expected = {}
    for l2 in grid:
        model = LogisticRegression(C=1 / (l2 * (~held_out).sum()), tol=1e-8, max_iter=10_000)
        model.fit(inputs[~held_out], labels[~held_out])
        expected[l2] = model.score(inputs[held_out], labels[held_out])
    assert choice.accuracies == pytest.approx(expected, abs=1.01 / held_out.sum())
    assert choice.accuracies[choice.l2] == max(choice.accuracies.values())
    assert not any(
        l2 > choice.l2 and value == max(choice.accuracies.values()) for l2, value in choice.accuracies.items()
    )
