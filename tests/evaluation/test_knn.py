"""Nearest neighbours by cosine, against scikit-learn and against a loop."""

import math

import numpy as np
import pytest

from vit_jax.evaluation import knn


@pytest.fixture(scope="module")
def problem():
    """Overlapping classes: features and labels of a bank and of queries; neither fills its last block."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(6, 12))
    labels = generator.integers(0, 6, 1100 + 700)
    features = (centres[labels] + 1.5 * generator.normal(size=(1800, 12))).astype(np.float32)
    return features[:1100], labels[:1100], features[1100:], labels[1100:]


@pytest.mark.parametrize(
    "count", [pytest.param(1, marks=pytest.mark.slow), 5, pytest.param(20, marks=pytest.mark.slow)]
)
def test_the_majority_is_scikit_learns(problem, count):
    from sklearn.neighbors import KNeighborsClassifier

    bank, labels, queries, truth = problem
    theirs = KNeighborsClassifier(count, metric="cosine", algorithm="brute").fit(bank.astype("d"), labels)
    similarities, places = knn.nearest(bank, queries, count, block=512)
    distances, their_places = theirs.kneighbors(queries.astype("d"))
    np.testing.assert_array_equal(places, their_places)
    np.testing.assert_allclose(similarities, 1 - distances, atol=1e-6)
    found = knn.votes(similarities, labels[places], 6, temperature=None).argmax(1)
    np.testing.assert_array_equal(found, theirs.predict(queries.astype("d")))
    assert (found == truth).mean() > 0.5


def test_weighted_votes_are_those_of_a_loop(problem):
    bank, labels, queries, _ = problem
    similarities, places = knn.nearest(bank, queries[:50], 20)
    found = knn.votes(similarities, labels[places], 6)
    unit = lambda rows: rows.astype("d") / np.linalg.norm(rows.astype("d"), axis=1, keepdims=True)  # noqa: E731
    cosines = unit(queries[:50]) @ unit(bank).T
    for row, given in zip(cosines, found, strict=True):
        wanted = [0.0] * 6
        for place in np.argsort(-row)[:20]:
            wanted[labels[place]] += math.exp(row[place] / 0.07)
        np.testing.assert_allclose(given / given.sum(), np.array(wanted) / sum(wanted), rtol=2e-4)


def test_blocks_change_nothing(problem):
    bank, _, queries, _ = problem
    whole = knn.nearest(bank, queries, 30)
    for block in (20, 333):
        np.testing.assert_array_equal(knn.nearest(bank, queries, 30, block)[1], whole[1])
    everything = knn.nearest(bank[:30], queries, 30, 7)
    assert (np.sort(everything[1], axis=1) == np.arange(30)).all()


def test_of_equal_ones_the_first_is_the_nearer():
    bank = np.tile(np.array([[1, 0], [0, 1]], np.float32), (40, 1))
    _, places = knn.nearest(bank, np.array([[2, 0], [0, 3]], np.float32), 5, block=16)
    np.testing.assert_array_equal(places, [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]])
    assert knn.votes(np.ones((1, 2), "f"), np.array([[3, 1]]), 4, None).argmax(1) == 1


def test_a_low_temperature_does_not_overflow_and_a_zero_vector_is_no_nan():
    given = knn.votes(np.array([[0.9, 0.8]], "f"), np.array([[1, 0]]), 2, temperature=1e-4)
    np.testing.assert_allclose(given, [[0, 1]])
    similarities, _ = knn.nearest(np.ones((3, 2), "f"), np.zeros((1, 2), "f"), 2)
    np.testing.assert_array_equal(similarities, [[0, 0]])
