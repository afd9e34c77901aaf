"""Few-shot least squares, compared with NumPy's least-squares solver in float64."""

import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.evaluation import fewshot, linear_classifier


def problem(examples, width, classes=4, seed=0):
    """Returns features of very different means and scales, and labels that contain every class."""
    generator = np.random.default_rng(seed)
    scales, means = 10.0 ** generator.uniform(-2, 2, width), generator.normal(0, 3, width)
    labels = np.arange(examples) % classes
    features = generator.normal(size=(examples, width)) * scales + means
    return features.astype(np.float32), labels


def by_numpy(features, labels, classes, l2):
    """Returns the kernel and the bias that minimize |X W + b - Y|^2 + l2 |W|^2, from one augmented system."""
    features = features.astype(np.float64)
    inputs = (features - features.mean(0)) / (features.std(0) + 1e-5)
    examples, width = inputs.shape
    targets = np.full((examples, classes), -1.0)
    targets[np.arange(examples), labels] = 1
    top, bottom = np.c_[inputs, np.ones(examples)], np.c_[np.sqrt(l2) * np.eye(width), np.zeros(width)]
    solution = np.linalg.lstsq(np.r_[top, bottom], np.r_[targets, np.zeros((width, classes))], rcond=None)[0]
    return solution[:-1], solution[-1]


@pytest.mark.parametrize(("examples", "width"), [(8, 50), (200, 50), (50, 50)])
@pytest.mark.parametrize("l2", [0.1, 1024.0])
def test_fit_agrees_with_float64_least_squares(examples, width, l2):
    features, labels = problem(examples, width)
    kernel, bias = by_numpy(features, labels, 4, l2)
    classifier = fewshot.fit(features, labels, 4, l2)
    np.testing.assert_allclose(classifier.kernel, kernel, atol=1e-5)
    unseen = problem(300, width, seed=1)[0]
    inputs = (unseen.astype(np.float64) - features.mean(0, dtype="d")) / (features.std(0, dtype="d") + 1e-5)
    scale = np.abs(inputs @ kernel).max()
    np.testing.assert_allclose(
        linear_classifier.logits(classifier, unseen), inputs @ kernel + bias, atol=1e-5 * max(1, scale)
    )
    assert (classifier.predict(unseen) == (inputs @ kernel + bias).argmax(1)).all()


def test_default_l2_is_proportional_to_the_width():
    features, labels = problem(40, 768)
    default, explicit = fewshot.fit(features, labels, 4), fewshot.fit(features, labels, 4, 1024.0)
    np.testing.assert_array_equal(default.kernel, explicit.kernel)


def test_a_constant_feature_is_ignored():
    features, labels = problem(40, 10)
    features[:, 3] = 7
    classifier = fewshot.fit(features, labels, 4, 1.0)
    assert not classifier.kernel[3].any()
    assert np.isfinite(np.asarray(linear_classifier.logits(classifier, features))).all()


def test_a_draw_has_the_requested_number_of_each_class():
    labels = np.random.default_rng(0).integers(0, 7, 500)
    for shots in (1, 5, 20):
        indices = fewshot.draw(labels, 7, shots, seed=3, draw_index=2)
        assert labels[indices].tolist() == np.repeat(np.arange(7), shots).tolist()
        assert len({*indices.tolist()}) == 7 * shots


def test_draws_are_determined_by_seed_and_index():
    labels = np.arange(400) % 4

    def draw(seed, draw_index, shots=5):
        return fewshot.draw(labels, 4, shots, seed, draw_index).tolist()

    assert draw(0, 0) == draw(0, 0)
    assert len({tuple(draw(seed, draw_index)) for seed in range(3) for draw_index in range(4)}) == 12
    assert {*draw(0, 1, 2)} < {*draw(0, 1, 5)}
    assert draw(0, 0, 1) == [0, 185, 162, 207]  # NumPy guarantees the output of Philox


def test_too_many_shots_are_refused():
    with pytest.raises(UserError, match="but class 2 has 1 training examples\n  allowed: at most 1 shots"):
        fewshot.draw(np.array([0, 0, 1, 1, 2]), 3, 2, 0, 0)
