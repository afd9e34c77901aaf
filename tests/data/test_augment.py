import chex
import jax
import numpy as np
import pytest
import scipy.ndimage

from vit_jax.data import augment

IMAGES = np.random.default_rng(0).integers(1, 256, (64, 6, 5, 3), np.uint8)


def test_normalize_is_the_formula():
    made = augment.Augment((0.2, 0.5, 0.7), (0.1, 0.2, 0.4)).normalize(jax.numpy.asarray(IMAGES))
    wanted = (IMAGES / 255.0 - [0.2, 0.5, 0.7]) / [0.1, 0.2, 0.4]
    np.testing.assert_allclose(made, wanted, atol=1e-5)


def test_the_digits_come_out_with_mean_zero_and_deviation_one():
    from vit_jax.data import sources

    digits = sources.load("digits", "train")
    made = np.asarray(augment.Augment(digits.mean, digits.std).normalize(jax.numpy.asarray(digits.images)), np.float64)
    assert abs(made.mean()) < 1e-5
    assert abs(made.std() - 1) < 1e-5


@pytest.mark.parametrize("padding", [1, 2])
def test_a_crop_is_one_of_the_shifts_and_all_shifts_occur(padding):
    made = np.asarray(augment.pad_and_crop(jax.random.key(1), jax.numpy.asarray(IMAGES), padding))
    padded = np.pad(IMAGES, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    span = range(2 * padding + 1)
    shifts = []
    for image, source in zip(made, padded, strict=True):
        fits = [(y, x) for y in span for x in span if (source[y : y + 6, x : x + 5] == image).all()]
        assert len(fits) == 1
        shifts.append(fits[0])
    assert {y for y, _ in shifts} == {x for _, x in shifts} == set(span)


def test_a_flip_mirrors_about_half_of_the_images():
    many = np.tile(IMAGES, (16, 1, 1, 1))
    made = np.asarray(augment.flip(jax.random.key(2), jax.numpy.asarray(many)))
    mirrored = (made == many[:, :, ::-1]).all(axis=(1, 2, 3))
    kept = (made == many).all(axis=(1, 2, 3))
    assert (mirrored ^ kept).all()
    # 1,024 fair coins: 512 +- 5 standard deviations of 16.
    assert abs(mirrored.sum() - 512) < 80


def test_the_same_key_gives_the_same_batch_and_another_key_another():
    train = jax.jit(augment.Augment((0.5,) * 3, (0.25,) * 3, crop_padding=2, flip=True, mixup=0.5))
    targets = jax.nn.one_hot(np.arange(64) % 10, 10)
    first, again, other = (train(jax.random.key(k), IMAGES, targets) for k in (3, 3, 4))
    chex.assert_trees_all_equal(first, again)
    assert (first[0] != other[0]).any()


def test_mixup_blends_images_and_targets_by_one_share_from_its_distribution():
    count, alpha = 4096, 0.4
    inputs = np.arange(count, dtype=np.float32)[:, None, None, None] * np.ones((1, 2, 2, 1), np.float32)
    targets = np.eye(count, dtype=np.float32)[:, :2]  # examples 0 and 1 have a class, so shares can be read off
    made, mixed = augment.mixup(jax.random.key(5), jax.numpy.asarray(inputs), jax.numpy.asarray(targets), alpha)
    own, other = np.arange(count), np.arange(count)[::-1]
    shares = (np.asarray(made)[:, 0, 0, 0] - other) / (own - other)
    assert (np.asarray(made) == np.asarray(made)[:, :1, :1]).all()
    assert shares.min() > -1e-3 and shares.max() < 1 + 1e-3
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)); five standard errors of each.
    assert abs(shares.mean() - 0.5) < 5 * np.sqrt(1 / (4 * (2 * alpha + 1)) / count)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), abs=0.01)
    np.testing.assert_allclose(mixed[0], [shares[0], 0], atol=1e-3)
    np.testing.assert_allclose(mixed[-1], [1 - shares[-1], 0], atol=1e-3)


def test_turning_and_scaling_is_the_affine_map_of_scipy():
    images = np.random.default_rng(1).integers(0, 256, (6, 9, 8, 2), np.uint8)
    key, rotation, scaling = jax.random.key(7), 40.0, 0.3
    made = np.asarray(augment.turn_and_scale(key, jax.numpy.asarray(images), rotation, scaling))
    draws = np.asarray(jax.random.uniform(key, (2, 6), minval=-1.0), np.float64)
    centre = np.array([4.0, 3.5])
    for image, result, turn, scale in zip(images, made, *draws, strict=True):
        angle, factor = np.deg2rad(rotation) * turn, 1 + scaling * scale
        inverse = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / factor
        for channel in range(2):
            wanted = scipy.ndimage.affine_transform(
                image[..., channel].astype(np.float64), inverse, centre - inverse @ centre, order=1
            )
            inside = scipy.ndimage.affine_transform(
                np.ones((9, 8)), inverse, centre - inverse @ centre, order=1, mode="constant", cval=0
            )
            difference = np.abs(result[..., channel] - wanted)[inside > 0.99]
            assert difference.max() <= 0.51
    assert len({round(float(turn), 3) for turn in draws[0]}) == 6


def test_turning_by_nothing_changes_nothing():
    made = augment.turn_and_scale(jax.random.key(0), jax.numpy.asarray(IMAGES), 0.0, 0.0)
    np.testing.assert_array_equal(made, IMAGES)
