import chex
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.models.dropout import Dropout, keep_mask


def test_dropout_drops_its_share_follows_its_key_and_is_off_in_evaluation():
    module, values = Dropout(0.3), jnp.ones((64, 32, 16))

    def drop(key, train=True):
        return module.apply({}, values, train, rngs={"dropout": jax.random.key(key)})

    first, other = drop(0), drop(1)
    chex.assert_trees_all_equal(first, drop(0))
    chex.assert_trees_all_equal(drop(0, train=False), values)
    assert set(np.unique(first)) == {0, np.float32(1 / 0.7)}
    # Binomial: within 5 standard deviations.
    zeros = (np.asarray(first) == 0).sum()
    assert abs(zeros - 0.3 * values.size) < 5 * np.sqrt(0.3 * 0.7 * values.size)
    both = ((np.asarray(first) == 0) & (np.asarray(other) == 0)).sum()
    assert abs(both - 0.09 * values.size) < 5 * np.sqrt(0.09 * 0.91 * values.size)


def test_masks_of_different_places_and_keys_are_independent():
    keys = jax.random.split(jax.random.key(1), 128)
    masks = np.asarray(jax.vmap(lambda key: keep_mask(key, 0.5, (32, 64)))(keys)).reshape(128, -1) - 0.5
    for lag in (1, 2, 3, 7, 8, 16, 32, 63, 64, 65, 128, 512, 1024):
        correlation = (masks[:, :-lag] * masks[:, lag:]).mean() * 4
        assert abs(correlation) < 5 / np.sqrt(masks.size * (1 - lag / 2048)), lag
    between = masks @ masks.T / masks.shape[1] * 4 - np.eye(128)
    assert np.abs(between).max() < 6 / np.sqrt(masks.shape[1])


def test_a_place_is_kept_at_any_rate():
    kept = [float(keep_mask(jax.random.key(0), rate, (512, 512)).mean()) for rate in (0.01, 0.1, 0.5, 0.9)]
    np.testing.assert_allclose(kept, [0.99, 0.9, 0.5, 0.1], atol=5 * 0.5 / 512)


def test_a_mask_is_the_same_however_it_is_spread_over_devices():
    from jax.sharding import NamedSharding, PartitionSpec

    from vit_jax.training import parallel

    key = jax.random.key(3)
    whole = jax.jit(lambda key: keep_mask(key, 0.4, (16, 5, 3)))(key)
    spread = NamedSharding(parallel.make_mesh(8), PartitionSpec("data"))
    chex.assert_trees_all_equal(whole, jax.jit(lambda key: keep_mask(key, 0.4, (16, 5, 3)), out_shardings=spread)(key))
