"""Results per class against scikit-learn, and against counting by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from sklearn import metrics

from vit_jax import confusion
from vit_jax.evaluation.per_class import Predictions
from vit_jax.objectives import losses


def made(labels, predicted, probability=None, classes=None):
    labels, predicted = (np.asarray(array, np.int32) for array in (labels, predicted))
    probability = np.full(len(labels), 0.5) if probability is None else probability
    count = classes or max(labels.max(), predicted.max()) + 1
    others = {"true_probability": np.ones(len(labels)), "nll": np.where(predicted < 0, np.nan, 0.0)}
    others = {name: array.astype(np.float32) for name, array in others.items()}
    names = tuple(f"class {i}" for i in range(count))
    return Predictions(
        labels, predicted, np.asarray(probability, np.float32), names, rank=np.ones_like(labels), **others
    )


@pytest.fixture(scope="module", params=[2, 7, 40])
def case(request):
    """Random predictions for unbalanced classes: right two times out of three, and one class is never predicted."""
    generator, classes = np.random.default_rng(request.param), request.param
    share = generator.dirichlet(np.ones(classes))
    labels = np.concatenate([np.arange(classes), generator.choice(classes, 500, p=share)])
    noise = generator.integers(0, classes - 1 if classes > 2 else 2, len(labels))
    predicted = np.where(generator.random(len(labels)) < 2 / 3, labels, noise)
    predicted = np.where(predicted == classes - 1, 0, predicted) if classes > 2 else predicted
    return made(labels, predicted, generator.random(len(labels)), classes)


def test_numbers_equal_those_of_scikit_learn(case):
    labels, predicted = case.labels, case.predicted
    np.testing.assert_array_equal(case.confusion(), metrics.confusion_matrix(labels, predicted))
    assert case.balanced_accuracy() == pytest.approx(metrics.balanced_accuracy_score(labels, predicted), rel=1e-12)
    assert case.macro_f1() == pytest.approx(metrics.f1_score(labels, predicted, average="macro"), rel=1e-12)
    each = metrics.precision_recall_fscore_support(labels, predicted, zero_division=np.nan)
    for row, precision, recall, f1, images in zip(case.rows(), *each, strict=True):
        assert row.images == images and row.recall == pytest.approx(recall, rel=1e-12)
        assert row.f1 == pytest.approx(f1, rel=1e-12)
        assert (row.precision is None) == math.isnan(precision)
        assert row.precision is None or row.precision == pytest.approx(precision, rel=1e-12)


def test_the_most_frequent_confusion_is_the_largest_wrong_cell_of_the_row(case):
    counts = metrics.confusion_matrix(case.labels, case.predicted)
    np.fill_diagonal(counts, 0)
    for row, wrong in zip(case.rows(), counts, strict=True):
        assert row.confused == wrong.max()
        assert row.confused_with == (f"class {wrong.argmax()}" if wrong.max() else None)


def test_the_calibration_error_equals_a_loop_over_the_bins(case):
    right = case.labels == case.predicted
    total = 0.0
    for low in np.arange(15) / 15:
        inside = (case.probability >= low) & (case.probability < low + 1 / 15)
        if inside.any():
            total += inside.mean() * abs(right[inside].mean() - case.probability[inside].astype(np.float64).mean())
    assert case.calibration_error() == pytest.approx(total, rel=1e-6)


def test_the_bins_of_probability_and_accuracy_hold_every_example_once(case):
    rows, bins = case.reliability(), np.digitize(case.probability.astype(np.float64), np.arange(1, 15) / 15)
    assert len(rows) == 15 and rows[0].low == 0 and rows[-1].high == 1
    for index, row in enumerate(rows):
        inside = bins == index
        assert (row.examples, row.high) == (inside.sum(), pytest.approx(row.low + 1 / 15))
        if row.examples:
            assert row.probability == pytest.approx(case.probability[inside].astype(np.float64).mean(), rel=1e-12)
            assert row.accuracy == pytest.approx((case.labels == case.predicted)[inside].mean(), rel=1e-12)


def test_bins_without_examples_have_no_accuracy_and_those_of_certain_predictions_are_in_the_last():
    rows = made([0, 1, 1, 0], [0, 1, -1, 1], [1.0, 1.0, 0.9, 0.0]).reliability()
    assert [row.examples for row in rows] == [1, *[0] * 13, 2]
    assert rows[5][3:] == (None, None) and rows[0][3:] == (0.0, 0.0) and rows[-1][3:] == (1.0, 1.0)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_likelihood_rank_and_probability_of_the_true_class_equal_scikit_learn(loss):
    generator = np.random.default_rng(3)
    logits, labels = generator.normal(0, 4, (200, 12)).astype(np.float32), generator.integers(0, 12, 200)
    labels = np.concatenate([np.arange(12), labels[12:]]).astype(np.int32)
    logits[7, 3:] = -60.0  # a likelihood of the true class that float32 holds as a logarithm only
    found = losses.predictions(jnp.asarray(logits), jnp.asarray(labels), loss)
    predictions = Predictions(labels, class_names=tuple("abcdefghijkl"), **{n: np.asarray(a) for n, a in found.items()})
    wide = logits.astype(np.float64)
    each = scipy.special.softmax(wide, axis=1) if loss == "softmax" else scipy.special.expit(wide)
    # Of independent classes: each alone present and all others absent, given that one is.
    present = scipy.special.expit(wide[:7, None])
    alone = np.where(np.eye(12, dtype=bool), present, 1 - present).prod(axis=-1)
    alone /= alone.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(predictions.nll[:7], -np.log(alone[np.arange(7), labels[:7]]), rtol=1e-5, atol=1e-6)
    others = np.arange(200) != 7  # scikit-learn takes 2e-16 for smaller probabilities
    expected = metrics.log_loss(labels[others], scipy.special.softmax(wide[others], axis=1))
    assert predictions.nll[others].astype(np.float64).mean() == pytest.approx(expected, rel=1e-6)
    assert predictions.nll[7] == pytest.approx(60 + scipy.special.logsumexp(wide[7]), rel=1e-6)
    assert predictions.metrics()["nll"] == pytest.approx((199 * expected + predictions.nll[7]) / 200, rel=1e-6)
    for k in (1, 2, 5):
        assert np.mean(predictions.rank <= k) == metrics.top_k_accuracy_score(labels, wide, k=k)
    np.testing.assert_allclose(predictions.true_probability, each[np.arange(200), labels], rtol=1e-5)
    np.testing.assert_allclose(predictions.probability, each.max(axis=1), rtol=1e-6)
    assert ((predictions.rank == 1) == (predictions.predicted == labels)).all()


def test_the_calibration_error_of_confident_predictions_is_the_share_of_wrong_ones():
    assert made([0, 1, 1, 0], [0, 1, 1, 1], np.ones(4)).calibration_error() == pytest.approx(0.25)


def test_classes_without_images_do_not_count():
    part = made([0, 0, 2], [0, 1, 2], classes=4)
    assert part.balanced_accuracy() == pytest.approx(0.75)
    assert [row.recall for row in part.rows()] == [0.5, None, 1.0, None]
    assert [row.precision for row in part.rows()] == [1.0, 0.0, 1.0, None]
    assert part.rows()[3].f1 is None and part.macro_f1() == pytest.approx((2 / 3 + 0 + 1) / 3)


def test_an_example_without_finite_logits_is_of_its_class_but_predicted_as_none():
    broken = made([0, 0, 1], [0, -1, -1], classes=2)
    assert [(row.images, row.correct, row.confused) for row in broken.rows()] == [(2, 1, 0), (1, 0, 0)]
    assert broken.confusion().tolist() == [[1, 0], [0, 0]] and broken.balanced_accuracy() == 0.25
    assert math.isnan(broken.calibration_error())


def test_the_worst_classes_are_those_of_the_lowest_recall():
    found = made([0, 0, 1, 1, 1, 1, 2, 3, 3], [0, 1, 1, 0, 0, 1, 2, 0, 0])
    assert [row.name for row in found.worst(5)] == ["class 3", "class 1", "class 0"]
    assert [row.name for row in found.worst(1)] == ["class 3"]


@pytest.mark.parametrize("sizes, expected", [((10, 10), False), ((10, 14), False), ((10, 15), True), ((0, 9), False)])
def test_classes_are_unbalanced_from_one_and_a_half_times_as_many_examples(sizes, expected):
    labels = np.repeat([0, 1], sizes)
    assert made(labels, labels, classes=2).is_unbalanced() == expected


# --- picture ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 30, 100, 300])
def test_the_color_of_every_cell_is_the_share_of_its_row(classes):
    generator = np.random.default_rng(0)
    counts = np.diag(generator.integers(1, 90, classes))
    counts[0, 1] += 7
    picture = np.asarray(confusion.draw(counts, tuple(f"a long class name {i}" for i in range(classes)), "title"))
    cell = next(side for side in range(56, 0, -1) if classes * side <= 1600 and _cells(picture, counts, side))
    assert cell >= (16 if classes <= 100 else 5)


def _cells(picture, counts, side):
    """Whether there is a corner from which cells of this side have the colors of the counts."""
    expected = confusion.color(counts / counts.sum(axis=1, keepdims=True))
    dark = np.argwhere((picture == expected[1, 1]).all(axis=-1))  # the second cell of the diagonal is one of these
    for row, column in dark[:1]:
        inner = np.arange(len(counts)) * side + side - 2 if side > 2 else np.arange(len(counts)) * side
        rows, columns = row - side + inner, column - side + inner
        if rows[-1] < len(picture) and columns[-1] < picture.shape[1]:
            return (picture[np.ix_(rows, columns)] == expected).all()
    return False


def test_the_lightness_of_the_colors_falls_with_the_share():
    lightness = confusion.color(np.linspace(0, 1, 101)) @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(lightness) < 0).all() and lightness[0] > 250 and lightness[-1] < 60
