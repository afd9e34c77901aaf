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
    """Shares of the images themselves, read from pixels that all hold their image's number, and of the targets."""
    inputs = jnp.broadcast_to(jnp.arange(count, dtype=jnp.float32)[:, None, None, None], (count, 16, 12, 1))
    targets = {
        "fine": jax.nn.one_hot(jnp.where(jnp.arange(count) < count // 2, 1, 0), 2),
        "coarse": jnp.ones((count, 1)),
    }
    options = {"mixup": 0.0, "cutmix": 0.0, "probability": 1.0, "switch": 0.5, "alike": False} | options
    made, mixed = compiled(**options)(jax.random.key(key), inputs, targets)
    own = np.arange(count)[:, None, None]
    kept = (np.asarray(made)[..., 0] - own[::-1]) / (own - own[::-1])
    np.testing.assert_allclose(mixed["coarse"], 1, atol=1e-6)
    first = np.asarray(mixed["fine"])[:, 1]
    return kept, np.where(own[:, 0, 0] < count // 2, first, 1 - first)


def is_cut(kept):
    return np.isclose(kept, kept.round(), atol=1e-3).all((1, 2))


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_mixup_takes_its_share_from_beta(alpha):
    kept, share = mix(mixup=alpha)
    np.testing.assert_allclose(kept, share[:, None, None] * np.ones_like(kept), atol=2e-3)
    assert scipy.stats.kstest(share, scipy.stats.beta(alpha, alpha).cdf).pvalue > 1e-6


def test_cutmix_takes_one_rectangle_and_its_area_as_the_share():
    kept, share = mix(cutmix=1.0)
    assert is_cut(kept).all()
    taken = kept.round() == 0
    for rows_or_columns in (taken.any(2), taken.any(1)):  # one rectangle: no gaps between those it touches
        assert (np.abs(np.diff(np.pad(rows_or_columns.astype(int), ((0, 0), (1, 1))))).sum(1) <= 2).all()
    np.testing.assert_array_equal(taken, taken.any(2)[:, :, None] & taken.any(1)[:, None, :])
    np.testing.assert_allclose(share, 1 - taken.mean((1, 2)), atol=1e-6)
    # The rule as it is published, one image after the other.
    generator, wanted = np.random.default_rng(0), []
    for _ in range(COUNT):
        side = np.sqrt(1 - generator.beta(1, 1))
        areas = []
        for size in (16, 12):
            half, centre = int(size * side) // 2, generator.integers(size)
            areas.append(np.clip(centre + half, 0, size) - np.clip(centre - half, 0, size))
        wanted.append(1 - areas[0] * areas[1] / (16 * 12))
    assert scipy.stats.ks_2samp(share, wanted).pvalue > 1e-6


def test_mixup_and_cutmix_switch_and_leave_out_with_their_odds():
    kept, share = mix(mixup=0.8, cutmix=1.0, probability=0.7, switch=0.3)
    untouched = (np.abs(kept - 1) < 1e-4).all((1, 2))
    blended = ~is_cut(kept)
    assert abs(blended.mean() - 0.7 * 0.7) < 5 * np.sqrt(0.49 * 0.51 / COUNT)
    # Cuts of no pixel and blends of nothing count as untouched; there are few of them.
    assert 0.3 - 5 * np.sqrt(0.21 / COUNT) < untouched.mean() < 0.3 + 0.7 * 0.3 * 0.08 + 5 * np.sqrt(0.21 / COUNT)
    np.testing.assert_allclose(share[untouched], 1, atol=1e-3)
    np.testing.assert_allclose(kept.mean((1, 2)), share, atol=2e-3)


def test_a_batch_may_share_one_draw():
    seen = []
    for key in range(40):
        kept, share = mix(key, count=64, mixup=0.8, cutmix=1.0, alike=True)
        np.testing.assert_allclose(kept, np.broadcast_to(kept[:1], kept.shape), atol=2e-3)
        np.testing.assert_allclose(share, share[0], atol=1e-6)
        seen.append((is_cut(kept)[0], round(float(share[0]), 3)))
    assert 5 < sum(cut for cut, _ in seen) < 35
    assert len({value for _, value in seen}) > 30


@pytest.mark.parametrize("noise", [False, True])
def test_erasing_takes_rectangles_of_the_published_sizes(noise):
    shape = (COUNT, 24, 32, 3)

    def erase(key):
        return mixing.erase(key, jnp.full(shape, 7.0), probability=0.4, area=(0.1, 0.3), ratio=2.0, noise=noise)

    made = np.asarray(jax.jit(erase)(jax.random.key(3)))
    gone = (made != 7).any(-1)
    done = gone.any((1, 2))
    assert abs(done.mean() - 0.4) < 5 * np.sqrt(0.24 / COUNT)
    rows, columns = gone[done].any(2), gone[done].any(1)
    np.testing.assert_array_equal(gone[done], rows[:, :, None] & columns[:, None, :])
    high, wide = rows.sum(1), columns.sum(1)
    area, ratio = high * wide / (24 * 32), np.log(high / wide)
    assert abs(area.mean() - 0.2) < 5 * 0.2 / np.sqrt(12 * done.sum()) + 0.002
    assert abs(ratio.mean()) < 5 * np.log(4) / np.sqrt(12 * done.sum()) + 0.005
    assert area.min() > 0.08 and area.max() < 0.33 and np.exp(np.abs(ratio)).max() < 2.4
    filled = made[gone]
    if not noise:
        assert (filled == 0).all()
        return
    assert abs(filled.mean()) < 5 / np.sqrt(filled.size)
    assert abs(filled.var() - 1) < 5 * np.sqrt(2 / filled.size)
    assert scipy.stats.kstest(filled[:20_000].ravel(), "norm").pvalue > 1e-6
    neighbours = made[:, :, 1:][gone[:, :, 1:] & gone[:, :, :-1]] * made[:, :, :-1][gone[:, :, 1:] & gone[:, :, :-1]]
    assert abs(neighbours.mean()) < 5 / np.sqrt(neighbours.size)
