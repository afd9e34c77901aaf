"""Nearest neighbours by cosine similarity, compared with scikit-learn and with a loop."""

import math

import numpy as np
import pytest

from vit_jax.evaluation import knn


@pytest.fixture(scope="module")
def problem():
    """Returns features and labels of bank and queries, of overlapping classes; neither fills its last block."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(6, 12))
    labels = generator.integers(0, 6, 1100 + 700)
    features = (centres[labels] + 1.5 * generator.normal(size=(1800, 12))).astype(np.float32)
    return features[:1100], labels[:1100], features[1100:], labels[1100:]


@pytest.mark.parametrize(
    "count", [pytest.param(1, marks=pytest.mark.slow), 5, pytest.param(20, marks=pytest.mark.slow)]
)
def test_majority_votes_agree_with_scikit_learn(problem, count):
    from sklearn.neighbors import KNeighborsClassifier

    bank, labels, queries, truth = problem
    theirs = KNeighborsClassifier(count, metric="cosine", algorithm="brute").fit(bank.astype("d"), labels)
    similarities, indices = knn.nearest(bank, queries, count, block=512)
    distances, their_indices = theirs.kneighbors(queries.astype("d"))
    np.testing.assert_array_equal(indices, their_indices)
    np.testing.assert_allclose(similarities, 1 - distances, atol=1e-6)
    predictions = knn.votes(similarities, labels[indices], 6, temperature=None).argmax(1)
    np.testing.assert_array_equal(predictions, theirs.predict(queries.astype("d")))
    assert (predictions == truth).mean() > 0.5


def unit(rows):
    return rows.astype("d") / np.linalg.norm(rows.astype("d"), axis=1, keepdims=True)


def test_weighted_votes_agree_with_a_loop(problem):
    bank, labels, queries, _ = problem
    similarities, indices = knn.nearest(bank, queries[:50], 20)
    votes = knn.votes(similarities, labels[indices], 6)
    cosines = unit(queries[:50]) @ unit(bank).T
    for row, actual in zip(cosines, votes, strict=True):
        expected = np.zeros(6)
        for index in np.argsort(-row)[:20]:
            expected[labels[index]] += math.exp(row[index] / 0.07)
        np.testing.assert_allclose(actual / actual.sum(), expected / expected.sum(), rtol=2e-4)


@pytest.mark.slow
def test_block_size_does_not_change_the_result(problem):
    bank, _, queries, _ = problem
    whole = knn.nearest(bank, queries, 30)
    for block in (20, 333):
        np.testing.assert_array_equal(knn.nearest(bank, queries, 30, block)[1], whole[1])
    everything = knn.nearest(bank[:30], queries, 30, 7)
    assert (np.sort(everything[1], axis=1) == np.arange(30)).all()


def test_the_first_of_equal_neighbours_comes_first():
    bank = np.tile(np.array([[1, 0], [0, 1]], np.float32), (40, 1))
    _, indices = knn.nearest(bank, np.array([[2, 0], [0, 3]], np.float32), 5, block=16)
    np.testing.assert_array_equal(indices, [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]])
    assert knn.votes(np.ones((1, 2), "f"), np.array([[3, 1]]), 4, None).argmax(1) == 1


def test_low_temperatures_and_zero_vectors_give_finite_results():
    votes = knn.votes(np.array([[0.9, 0.8]], "f"), np.array([[1, 0]]), 2, temperature=1e-4)
    np.testing.assert_allclose(votes, [[0, 1]])
    similarities, _ = knn.nearest(np.ones((3, 2), "f"), np.zeros((1, 2), "f"), 2)
    np.testing.assert_array_equal(similarities, [[0, 0]])
