import functools
import re

import chex
import jax
import numpy as np
import pytest
import scipy.ndimage

from vit_jax import config as config_options
from vit_jax import sharding
from vit_jax.data import augment, operations
from vit_jax.errors import UserError
from vit_jax.models.patches import patchify

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


# --- what is composed of many parts ---

FULL = {"crop_padding": 2, "flip": True, "policy": "rand_augment", "erasing": 0.5, "mixup": 0.8, "cutmix": 1.0}
SLOW = [pytest.mark.slow]  # it compiles for long
RECIPES = {
    "full": FULL,
    "resized": {"resized_crop": True, "flip": True, "policy": "trivial_augment", "erasing": 0.5}
    | {"erasing_mode": "noise"},
    "searched": {"crop_padding": 2, "crop_border": "reflect", "policy": "auto_augment", "rotation": 5.0}
    | {"fill": "grey"},
    "three": {"policy": "three_augment", "brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.1}
    | {"fill": "black"},
}


def make(**options):
    return augment.Augment((0.5, 0.4, 0.3), (0.25, 0.2, 0.3), **options)


def pixels_of(inputs):
    """The 8-bit values that normalised ones were made of."""
    values = np.asarray(inputs, np.float64) * [0.25, 0.2, 0.3] + [0.5, 0.4, 0.3]
    np.testing.assert_allclose(255 * values, np.round(255 * values), atol=1e-3)
    return np.round(255 * values).astype(np.uint8)


@pytest.fixture(scope="module")
def augmented(photos):
    """Each recipe's batch for one key, compiled once."""
    targets = {"fine": np.eye(24, dtype=np.float32), "coarse": np.eye(24, dtype=np.float32)[:, :2]}
    compiled = {name: jax.jit(make(**options)) for name, options in RECIPES.items()}
    return lambda name, key=0: compiled[name](jax.random.key(key), photos, targets)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name == "resized" else SLOW) for name in RECIPES])
def test_a_recipe_is_a_function_of_its_key_and_targets_keep_their_sum(name, augmented):
    first, again, other = (augmented(name, key) for key in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    inputs, targets = first
    assert inputs.shape == (24, 32, 40, 3) and np.isfinite(np.asarray(inputs)).all()
    assert (np.asarray(other[0]) != np.asarray(inputs)).mean() > 0.5
    np.testing.assert_allclose(np.asarray(targets["fine"]).sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(targets["fine"])[:, :2], targets["coarse"])


@pytest.mark.slow
def test_crop_and_flip_are_the_same_whether_composed_with_a_policy_or_not(photos):
    """A policy that does nothing leaves just the crop and the flip, through the look-up."""
    options = {"crop_padding": 3, "flip": True}
    idle = {"policy": "rand_augment", "policy_probability": 0.0}
    targets = np.zeros((24, 1), np.float32)
    plain, composed = (jax.jit(make(**o))(jax.random.key(4), photos, targets)[0] for o in (options, options | idle))
    np.testing.assert_array_equal(pixels_of(plain), pixels_of(composed))


@pytest.mark.slow
def test_a_turn_is_nearly_the_same_whether_composed_with_a_policy_or_not(photos):
    options = {"rotation": 20.0, "scaling": 0.1, "fill": "black"}
    idle = {"policy": "rand_augment", "policy_probability": 0.0}
    targets = np.zeros((24, 1), np.float32)
    plain, composed = (
        pixels_of(jax.jit(make(**o))(jax.random.key(4), photos, targets)[0]).astype(int)
        for o in (options, options | idle)
    )
    inner = np.s_[:, 8:-8, 8:-8]
    assert np.abs(plain[inner] - composed[inner]).max() <= 1


@pytest.mark.slow
def test_what_is_filled_in_stays_as_it_is(photos):
    """Sheared by one operation and inverted by another, in either order: the corners keep the filling."""
    options = {"policy": "rand_augment", "policy_probability": 1.0, "policy_std": 0.0, "policy_operations": 3}
    many = np.tile(photos[:20], (20, 1, 1, 1))
    made = pixels_of(jax.jit(make(**options))(jax.random.key(5), many, np.zeros((400, 1), np.float32))[0])
    filling = np.array([128, 102, 76])  # the mean, times 255, rounded
    filled = (made == filling).all(-1)
    # Of three operations at least one of five in fifteen moves in 1 - (2/3)^3 = 70 % of the images.
    assert 0.55 < (filled.sum((1, 2)) > 20).mean() < 0.85


def test_reflected_borders_are_the_images_own_pixels(photos):
    made = np.asarray(augment.pad_and_crop(jax.random.key(0), jax.numpy.asarray(photos), 4, "reflect"))
    padded = np.pad(photos, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    for image, source in zip(made[:20], padded, strict=False):
        assert any((source[y : y + 32, x : x + 40] == image).all() for y in range(9) for x in range(9))


def test_colour_jitter_draws_factors_and_orders(photos):
    maker = make(brightness=0.4, contrast=0.2, saturation=1.5, hue=0.1)
    chain = maker._draw_jitter(jax.random.key(0), 20_000)
    codes, arguments = np.asarray(chain.codes), np.asarray(chain.arguments)
    spans = {"brightness": (0.6, 1.4), "contrast": (0.8, 1.2), "color": (0.0, 2.5), "hue": (-0.1, 0.1)}
    for name, (low, high) in spans.items():
        here = codes == operations.CODES[name]
        assert (here.sum(0) == 1).all()  # each image has each once
        # 20,000 draws: each place has a quarter of them, within five standard deviations.
        assert np.abs(here.mean(1) - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 20_000)
        values = arguments[here]
        assert low <= values.min() and values.max() <= high + 1e-6
        if name != "color":  # whose factors below 0 are 0
            assert abs(values.mean() - (low + high) / 2) < 5 * (high - low) / np.sqrt(12 * 20_000)
    assert abs((arguments[codes == operations.CODES["color"]] == 0).mean() - 0.5 / 3) < 5 * np.sqrt(0.14 / 20_000)


def test_views_are_the_image_its_shifts_and_their_mirror_images(photos):
    views = make(test_flip=True, test_shift=2).views(jax.numpy.asarray(photos))
    assert len(views) == 10
    plain = pixels_of(views[0])
    np.testing.assert_array_equal(plain, photos)
    for view, (down, right) in zip(views[1:5], [(2, 0), (0, 2), (0, -2), (-2, 0)], strict=True):
        rolled = np.roll(photos, (down, right), (1, 2))
        np.testing.assert_array_equal(pixels_of(view)[:, 2:-2, 2:-2], rolled[:, 2:-2, 2:-2])
    for view, mirrored in zip(views[:5], views[5:], strict=True):
        np.testing.assert_array_equal(np.asarray(view)[:, :, ::-1], mirrored)
    assert len(make().views(jax.numpy.asarray(photos))) == 1


@pytest.mark.slow
def test_inputs_may_be_arranged_as_patches(photos):
    arrange = functools.partial(patchify, patch_size=4)
    whole, cut = (jax.jit(make(arrange=a, crop_padding=2, flip=True, mixup=0.5)) for a in (None, arrange))
    targets = np.zeros((24, 1), np.float32)
    inputs, _ = whole(jax.random.key(0), photos, targets)
    patches, _ = cut(jax.random.key(0), photos, targets)
    assert patches.shape == (24, 80, 48)
    np.testing.assert_array_equal(patches, patchify(inputs, 4))


@pytest.mark.slow
def test_every_number_of_devices_makes_the_same_batch_without_an_exchange(photos):
    """But for mixing, which fetches the other example, each device works on its own examples."""
    images = np.tile(photos, (2, 1, 1, 1))[:32]
    options = {k: v for k, v in (FULL | {"hue": 0.1}).items() if k not in ("mixup", "cutmix")}
    targets = np.eye(32, dtype=np.float32)
    made = {}
    for devices in (1, 2, 4):
        mesh = sharding.make_mesh(devices)
        spread = sharding.data_sharding(mesh)
        run = jax.jit(make(**options), in_shardings=(sharding.replicated(mesh), spread, spread), out_shardings=spread)
        compiled = run.lower(jax.random.key(9), images, targets).compile()
        arguments = jax.device_put((images, targets), spread)
        made[devices] = jax.device_get(
            compiled(jax.device_put(jax.random.key(9), sharding.replicated(mesh)), *arguments)
        )
        text = compiled.as_text()
        assert not re.findall(r" (all-gather|all-to-all|collective-permute|all-reduce)(?:-start)?\(", text), devices
    for devices in (2, 4):
        chex.assert_trees_all_equal(made[1], made[devices])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"resized_crop": True, "crop_padding": 4}, ["resized_crop", "crop_padding", "one of the two"]),
        ({"min_crop_area": 0.9, "max_crop_area": 0.5}, ["min_crop_area", "0.5"]),
        ({"min_erasing_area": 0.5}, ["min_erasing_area", "max_erasing_area"]),
        ({"repeats": 3}, ["repeats", "128"]),
        ({"policy": "autoaugment"}, ["policy", "auto_augment"]),
        ({"policy_magnitude": 11.0}, ["policy_magnitude", "10"]),
        ({"hue": 0.6}, ["hue", "0.5"]),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(options, words):
    config = config_options.default()
    config.train.steps = 1
    config.augment.update(options)
    with pytest.raises(UserError) as caught:
        config_options.check(config)
    assert all(word in str(caught.value) for word in words), caught.value
    assert len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize(
    "options, shape, words",
    [
        ({"policy": "rand_augment"}, (32, 32, 4), ["policy", "4 channels"]),
        ({"hue": 0.1}, (32, 32, 4), ["hue", "1 or 3"]),
        ({"crop_padding": 8, "crop_border": "reflect"}, (8, 8, 1), ["crop_padding", "8 pixels"]),
        ({"test_shift": 8}, (8, 8, 1), ["test_shift"]),
    ],
)
def test_what_does_not_go_with_the_images_is_refused(options, shape, words):
    config = config_options.default()
    config.augment.update(options)
    with pytest.raises(UserError) as caught:
        augment.check_shape(config, shape)
    assert all(word in str(caught.value) for word in words), caught.value
    augment.check_shape(config_options.default(), shape)
