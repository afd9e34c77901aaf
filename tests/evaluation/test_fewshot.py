"""Least squares from a few examples, against NumPy's own least squares in float64."""

import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.evaluation import fewshot, linear_classifier


def problem(examples, width, classes=4, seed=0):
    """Features of very different size and place, and labels of which every class has some."""
    generator = np.random.default_rng(seed)
    scales, places = 10.0 ** generator.uniform(-2, 2, width), generator.normal(0, 3, width)
    labels = np.arange(examples) % classes
    features = generator.normal(size=(examples, width)) * scales + places
    return features.astype(np.float32), labels


def by_numpy(features, labels, classes, l2):
    """Weights and bias that minimise |X W + b - Y|^2 + l2 |W|^2, as one augmented system."""
    features = features.astype(np.float64)
    inputs = (features - features.mean(0)) / (features.std(0) + 1e-5)
    examples, width = inputs.shape
    targets = np.full((examples, classes), -1.0)
    targets[np.arange(examples), labels] = 1
    top, bottom = np.c_[inputs, np.ones(examples)], np.c_[np.sqrt(l2) * np.eye(width), np.zeros(width)]
    both = np.linalg.lstsq(np.r_[top, bottom], np.r_[targets, np.zeros((width, classes))], rcond=None)[0]
    return both[:-1], both[-1]


@pytest.mark.parametrize(("examples", "width"), [(8, 50), (200, 50), (50, 50)])
@pytest.mark.parametrize("l2", [0.1, 1024.0])
def test_the_solution_is_that_of_float64(examples, width, l2):
    features, labels = problem(examples, width)
    kernel, bias = by_numpy(features, labels, 4, l2)
    found = fewshot.fit(features, labels, 4, l2)
    np.testing.assert_allclose(found.kernel, kernel, atol=1e-5)
    others = problem(300, width, seed=1)[0]
    inputs = (others.astype(np.float64) - features.mean(0, dtype="d")) / (features.std(0, dtype="d") + 1e-5)
    scale = np.abs(inputs @ kernel).max()
    np.testing.assert_allclose(
        linear_classifier.logits(found, others), inputs @ kernel + bias, atol=1e-5 * max(1, scale)
    )
    assert (found.predict(others) == (inputs @ kernel + bias).argmax(1)).all()


def test_the_usual_constant_grows_with_the_width():
    features, labels = problem(40, 768)
    usual, given = fewshot.fit(features, labels, 4), fewshot.fit(features, labels, 4, 1024.0)
    np.testing.assert_array_equal(usual.kernel, given.kernel)


def test_a_feature_that_never_changes_does_no_harm():
    features, labels = problem(40, 10)
    features[:, 3] = 7
    found = fewshot.fit(features, labels, 4, 1.0)
    assert not found.kernel[3].any() and np.isfinite(np.asarray(linear_classifier.logits(found, features))).all()


def test_a_draw_has_exactly_so_many_of_each_class():
    labels = np.random.default_rng(0).integers(0, 7, 500)
    for shots in (1, 5, 20):
        places = fewshot.draw(labels, 7, shots, seed=3, number=2)
        assert labels[places].tolist() == np.repeat(np.arange(7), shots).tolist()
        assert len({*places.tolist()}) == 7 * shots


def test_draws_differ_and_follow_from_the_seed():
    labels = np.arange(400) % 4
    of = lambda seed, number, shots=5: fewshot.draw(labels, 4, shots, seed, number).tolist()  # noqa: E731
    assert of(0, 0) == of(0, 0)
    assert len({tuple(of(seed, number)) for seed in range(3) for number in range(4)}) == 12
    assert {*of(0, 1, 2)} < {*of(0, 1, 5)}
    # Fixed for ever: Philox's stream is.
    assert of(0, 0, 1) == [0, 185, 162, 207]


def test_a_class_with_too_few_examples_is_named():
    with pytest.raises(UserError, match="class 2 has 1 training examples\n  allowed: at most 1 shots"):
        fewshot.draw(np.array([0, 0, 1, 1, 2]), 3, 2, 0, 0)
