import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.dropout import Dropout, keep_mask


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
def test_each_place_is_kept_at_the_rate_independently_of_its_neighbours_and_of_other_keys(rate):
    shape = (64, 65, 48)
    keys = [jax.random.key(0), jax.random.key(1), jax.random.fold_in(jax.random.key(0), 1)]
    masks = [np.asarray(keep_mask(key, rate, shape)) for key in keys]
    spread = np.sqrt(rate * (1 - rate))
    pairs = [(np.roll(masks[0], 1, axis), masks[0]) for axis in range(3)]
    pairs += [(masks[0], masks[1]), (masks[0], masks[2]), (masks[1], masks[2])]
    for mask in masks:
        assert abs(mask.mean() - (1 - rate)) < 4 * spread / np.sqrt(mask.size)
        for axis in range(3):  # every slice has its share too
            rest = mask.size / shape[axis]
            means = mask.mean(axis=tuple(a for a in range(3) if a != axis))
            assert np.abs(means - (1 - rate)).max() < 5 * spread / np.sqrt(rest)
    for one, other in pairs:
        correlation = ((one - (1 - rate)) * (other - (1 - rate))).mean() / spread**2
        assert abs(correlation) < 5 / np.sqrt(one.size)


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_what_is_kept_is_scaled_so_that_the_mean_stays(rate):
    values = jnp.ones((100, 200))
    outputs = np.asarray(Dropout(rate).apply({}, values, True, rngs={"dropout": jax.random.key(1)}))
    np.testing.assert_allclose(np.unique(outputs), [0, 1 / (1 - rate)], rtol=1e-6)
    assert abs(outputs.mean() - 1) < 4 * np.sqrt(rate * (1 - rate) / outputs.size) / (1 - rate)


def test_shared_axes_fall_together():
    examples, rate = 4096, 0.3
    module = Dropout(rate, shared_axes=(1, 2))
    outputs = np.asarray(module.apply({}, jnp.ones((examples, 2, 3)), True, rngs={"dropout": jax.random.key(0)}))
    first = outputs[:, :1, :1]
    np.testing.assert_array_equal(outputs, np.broadcast_to(first, outputs.shape))
    assert abs((first == 0).mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / examples)


def test_nothing_falls_outside_training_or_at_rate_zero(draw):
    values = draw(3, 4)
    for rate, train in ((0.5, False), (0.0, True)):
        np.testing.assert_array_equal(Dropout(rate).apply({}, values, train), values)
