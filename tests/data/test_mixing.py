import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from vit_jax.data import mixing

COUNT = 4096


@functools.cache
def compiled(**options):
    return jax.jit(lambda *arrays: mixing.mix(*arrays, **options))


def mix(key=0, count=COUNT, **options):
    """Returns the weights of each example's own pixels and targets; all pixels of an image hold its index."""
    inputs = jnp.broadcast_to(jnp.arange(count, dtype=jnp.float32)[:, None, None, None], (count, 16, 12, 1))
    targets = {
        "fine": jax.nn.one_hot(jnp.where(jnp.arange(count) < count // 2, 1, 0), 2),
        "coarse": jnp.ones((count, 1)),
    }
    options = {"mixup": 0.0, "cutmix": 0.0, "probability": 1.0, "switch": 0.5, "per_batch": False} | options
    mixed, mixed_targets = compiled(**options)(jax.random.key(key), inputs, targets)
    own = np.arange(count)[:, None, None]
    kept = (np.asarray(mixed)[..., 0] - own[::-1]) / (own - own[::-1])
    np.testing.assert_allclose(mixed_targets["coarse"], 1, atol=1e-6)
    first = np.asarray(mixed_targets["fine"])[:, 1]
    return kept, np.where(own[:, 0, 0] < count // 2, first, 1 - first)


def is_cut(kept):
    return np.isclose(kept, kept.round(), atol=1e-3).all((1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_mixup_weights_have_a_beta_distribution(alpha):
    kept, weight = mix(mixup=alpha)
    np.testing.assert_allclose(kept, weight[:, None, None] * np.ones_like(kept), atol=2e-3)
    assert scipy.stats.kstest(weight, scipy.stats.beta(alpha, alpha).cdf).pvalue > 1e-6


def test_cutmix_replaces_a_rectangle_and_weights_targets_by_area():
    kept, weight = mix(cutmix=1.0)
    assert is_cut(kept).all()
    replaced = kept.round() == 0
    for rows_or_columns in (replaced.any(2), replaced.any(1)):  # one rectangle: no gaps between those it touches
        assert (np.abs(np.diff(np.pad(rows_or_columns.astype(int), ((0, 0), (1, 1))))).sum(1) <= 2).all()
    np.testing.assert_array_equal(replaced, replaced.any(2)[:, :, None] & replaced.any(1)[:, None, :])
    np.testing.assert_allclose(weight, 1 - replaced.mean((1, 2)), atol=1e-6)
    # The published algorithm, one image at a time.
    generator, expected = np.random.default_rng(0), []
    for _ in range(COUNT):
        side = np.sqrt(1 - generator.beta(1, 1))
        areas = []
        for size in (16, 12):
            half, centre = int(size * side) // 2, generator.integers(size)
            areas.append(np.clip(centre + half, 0, size) - np.clip(centre - half, 0, size))
        expected.append(1 - areas[0] * areas[1] / (16 * 12))
    assert scipy.stats.ks_2samp(weight, expected).pvalue > 1e-6


@pytest.mark.slow
def test_mixup_and_cutmix_are_selected_with_their_probabilities():
    kept, weight = mix(mixup=0.8, cutmix=1.0, probability=0.7, switch=0.3)
    untouched = (np.abs(kept - 1) < 1e-4).all((1, 2))
    blended = ~is_cut(kept)
    assert abs(blended.mean() - 0.7 * 0.7) < 5 * np.sqrt(0.49 * 0.51 / COUNT)
    # Empty rectangles and blends with weight 1 also count as untouched; there are few of them.
    assert 0.3 - 5 * np.sqrt(0.21 / COUNT) < untouched.mean() < 0.3 + 0.7 * 0.3 * 0.08 + 5 * np.sqrt(0.21 / COUNT)
    np.testing.assert_allclose(weight[untouched], 1, atol=1e-3)
    np.testing.assert_allclose(kept.mean((1, 2)), weight, atol=2e-3)


@pytest.mark.slow
def test_a_batch_can_share_one_draw():
    seen = []
    for key in range(40):
        kept, weight = mix(key, count=64, mixup=0.8, cutmix=1.0, per_batch=True)
        np.testing.assert_allclose(kept, np.broadcast_to(kept[:1], kept.shape), atol=2e-3)
        np.testing.assert_allclose(weight, weight[0], atol=1e-6)
        seen.append((is_cut(kept)[0], round(float(weight[0]), 3)))
    assert 5 < sum(cut for cut, _ in seen) < 35
    assert len({value for _, value in seen}) > 30


@pytest.mark.slow
@pytest.mark.parametrize("noise", [False, True])
def test_erased_rectangles_have_the_published_sizes(noise):
    shape = (COUNT, 24, 32, 3)

    def erase(key):
        return mixing.erase(key, jnp.full(shape, 7.0), probability=0.4, area=(0.1, 0.3), ratio=2.0, noise=noise)

    images = np.asarray(jax.jit(erase)(jax.random.key(3)))
    erased = (images != 7).any(-1)
    done = erased.any((1, 2))
    assert abs(done.mean() - 0.4) < 5 * np.sqrt(0.24 / COUNT)
    rows, columns = erased[done].any(2), erased[done].any(1)
    np.testing.assert_array_equal(erased[done], rows[:, :, None] & columns[:, None, :])
    high, wide = rows.sum(1), columns.sum(1)
    area, ratio = high * wide / (24 * 32), np.log(high / wide)
    assert abs(area.mean() - 0.2) < 5 * 0.2 / np.sqrt(12 * done.sum()) + 0.002
    assert abs(ratio.mean()) < 5 * np.log(4) / np.sqrt(12 * done.sum()) + 0.005
    assert area.min() > 0.08 and area.max() < 0.33 and np.exp(np.abs(ratio)).max() < 2.4
    filled = images[erased]
    if not noise:
        assert (filled == 0).all()
        return
    assert abs(filled.mean()) < 5 / np.sqrt(filled.size)
    assert abs(filled.var() - 1) < 5 * np.sqrt(2 / filled.size)
    assert scipy.stats.kstest(filled[:20_000].ravel(), "norm").pvalue > 1e-6
    both = erased[:, :, 1:] & erased[:, :, :-1]
    neighbours = images[:, :, 1:][both] * images[:, :, :-1][both]
    assert abs(neighbours.mean()) < 5 / np.sqrt(neighbours.size)
