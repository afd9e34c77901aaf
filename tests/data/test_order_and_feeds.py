import chex
import jax
import numpy as np
import pytest

from vit_jax import sharding
from vit_jax.data import order, pipeline
from vit_jax.data.sources import Source


def toy_source(examples=37):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (examples, 4, 4, 1), np.uint8)
    labels = np.arange(examples, dtype=np.int32) % 10
    return Source("toy", "train", images, labels, tuple("0123456789"), (0.5,), (0.25,))


def test_each_epoch_visits_every_example_once_in_a_different_order():
    first, second = (order.permutation(3, epoch, 1000) for epoch in (0, 1))
    np.testing.assert_array_equal(np.sort(first), np.arange(1000))
    np.testing.assert_array_equal(np.sort(second), np.arange(1000))
    # Two independent permutations agree at about one of 1000 positions (Poisson with mean 1).
    assert (first == second).sum() < 8
    assert (first == order.permutation(4, 0, 1000)).sum() < 8


def test_order_matches_the_recorded_one():
    # If the order changed between versions, no run could be resumed exactly.
    assert order.permutation(0, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]


@pytest.mark.parametrize("start, count", [(0, 30), (7, 100), (29, 2), (95, 13)])
def test_indices_are_a_pure_function_of_the_position(start, count):
    sequence = np.concatenate([order.permutation(5, epoch, 30) for epoch in range(5)])
    np.testing.assert_array_equal(order.indices(5, start, count, 30), sequence[start : start + count])


def test_batches_of_steps_do_not_depend_on_the_dispatch_boundaries():
    whole = pipeline.train_indices(1, 8, first=0, count=12, rows=12, examples=37)
    parts = [pipeline.train_indices(1, 8, first, 3, 12, 37)[:3] for first in (0, 3, 6, 9)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def test_repeated_examples_are_in_the_same_batch():
    plain = pipeline.train_indices(1, 4, first=6, count=6, rows=8, examples=37)
    repeated = pipeline.train_indices(1, 12, first=6, count=6, rows=8, examples=37, repeats=3)
    np.testing.assert_array_equal(repeated, np.concatenate([plain] * 3, axis=1))


@pytest.mark.parametrize("batch_size", [1, 5, 16, 37, 64])
def test_evaluation_indices_contain_every_example_once(batch_size):
    indices, real = pipeline.evaluation_indices(batch_size, 37)
    assert indices.shape == real.shape == (-(-37 // batch_size), batch_size)
    np.testing.assert_array_equal(indices[real], np.arange(37))


@pytest.mark.parametrize("devices", [1, 4])
def test_resident_and_streamed_sets_give_the_same_batches(devices):
    mesh, source = sharding.make_mesh(devices), toy_source()
    rows = pipeline.train_indices(2, 8, first=3, count=4, rows=4, examples=37)
    batches = {}
    for resident in ("always", "never"):
        feed = pipeline.make(source, mesh, resident).feed(rows)
        get_batch = jax.jit(lambda feed, i: pipeline.get_batch(feed, i, sharding.data_sharding(mesh)))
        batches[resident] = [jax.device_get(get_batch(feed, i)) for i in range(4)]
    chex.assert_trees_all_equal(batches["always"], batches["never"])
    for row, (images, labels) in zip(rows, batches["never"], strict=True):
        np.testing.assert_array_equal(images, source.images[row])
        np.testing.assert_array_equal(labels, source.labels[row])
