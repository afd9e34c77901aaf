import dataclasses
import functools
import re

import chex
import jax
import numpy as np
import pytest
import scipy.ndimage

from vit_jax import config as config_options
from vit_jax import sharding
from vit_jax.config.check import check_config
from vit_jax.data import augment, operations, sources
from vit_jax.data.policies import POLICIES
from vit_jax.errors import UserError
from vit_jax.models.patches import patchify

IMAGES = np.random.default_rng(0).integers(1, 256, (64, 6, 5, 3), np.uint8)


def test_normalize_matches_the_formula():
    actual = augment.Augment((0.2, 0.5, 0.7), (0.1, 0.2, 0.4)).normalize(jax.numpy.asarray(IMAGES))
    expected = (IMAGES / 255.0 - [0.2, 0.5, 0.7]) / [0.1, 0.2, 0.4]
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_normalized_digits_have_mean_zero_and_standard_deviation_one():
    digits = sources.load("digits", "train")
    normalize = augment.Augment(digits.mean, digits.std).normalize
    inputs = np.asarray(normalize(jax.numpy.asarray(digits.images)), np.float64)
    assert abs(inputs.mean()) < 1e-5
    assert abs(inputs.std() - 1) < 1e-5


@pytest.mark.parametrize("padding", [1, 2])
def test_crops_are_shifts_and_all_shifts_occur(padding):
    crops = np.asarray(augment.pad_and_crop(jax.random.key(1), jax.numpy.asarray(IMAGES), padding))
    padded = np.pad(IMAGES, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    span = range(2 * padding + 1)
    shifts = []
    for image, source in zip(crops, padded, strict=True):
        fits = [(y, x) for y in span for x in span if (source[y : y + 6, x : x + 5] == image).all()]
        assert len(fits) == 1
        shifts.append(fits[0])
    assert {y for y, _ in shifts} == {x for _, x in shifts} == set(span)


def test_flip_mirrors_about_half_of_the_images():
    many = np.tile(IMAGES, (16, 1, 1, 1))
    flipped = np.asarray(augment.flip(jax.random.key(2), jax.numpy.asarray(many)))
    mirrored = (flipped == many[:, :, ::-1]).all(axis=(1, 2, 3))
    unchanged = (flipped == many).all(axis=(1, 2, 3))
    assert (mirrored ^ unchanged).all()
    # Binomial with 1,024 trials: 512 +- 5 standard deviations of 16.
    assert abs(mirrored.sum() - 512) < 80


def test_result_depends_only_on_the_key():
    train = jax.jit(augment.Augment((0.5,) * 3, (0.25,) * 3, crop_padding=2, flip=True, mixup=0.5))
    targets = jax.nn.one_hot(np.arange(64) % 10, 10)
    first, again, other = (train(jax.random.key(k), IMAGES, targets) for k in (3, 3, 4))
    chex.assert_trees_all_equal(first, again)
    assert (first[0] != other[0]).any()


def test_mixup_blends_images_and_targets_with_the_same_beta_weights():
    count, alpha = 4096, 0.4
    inputs = np.arange(count, dtype=np.float32)[:, None, None, None] * np.ones((1, 2, 2, 1), np.float32)
    targets = np.eye(count, dtype=np.float32)[
        :, :2
    ]  # only examples 0 and 1 have a class, so their weights can be read from the targets
    mixed, mixed_targets = augment.mixup(
        jax.random.key(5), jax.numpy.asarray(inputs), jax.numpy.asarray(targets), alpha
    )
    own, other = np.arange(count), np.arange(count)[::-1]
    weights = (np.asarray(mixed)[:, 0, 0, 0] - other) / (own - other)
    assert (np.asarray(mixed) == np.asarray(mixed)[:, :1, :1]).all()
    assert weights.min() > -1e-3 and weights.max() < 1 + 1e-3
    # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1)); five standard errors of each.
    assert abs(weights.mean() - 0.5) < 5 * np.sqrt(1 / (4 * (2 * alpha + 1)) / count)
    assert weights.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), abs=0.01)
    np.testing.assert_allclose(mixed_targets[0], [weights[0], 0], atol=1e-3)
    np.testing.assert_allclose(mixed_targets[-1], [1 - weights[-1], 0], atol=1e-3)


def test_rotation_and_scaling_match_scipys_affine_transform():
    images = np.random.default_rng(1).integers(0, 256, (6, 9, 8, 2), np.uint8)
    key, rotation, scaling = jax.random.key(7), 40.0, 0.3
    rotated = np.asarray(augment.rotate_and_scale(key, jax.numpy.asarray(images), rotation, scaling))
    draws = np.asarray(jax.random.uniform(key, (2, 6), minval=-1.0), np.float64)
    centre = np.array([4.0, 3.5])
    for image, result, rotation_draw, scale_draw in zip(images, rotated, *draws, strict=True):
        angle, factor = np.deg2rad(rotation) * rotation_draw, 1 + scaling * scale_draw
        inverse = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) / factor
        for channel in range(2):
            expected = scipy.ndimage.affine_transform(
                image[..., channel].astype(np.float64), inverse, centre - inverse @ centre, order=1
            )
            inside = scipy.ndimage.affine_transform(
                np.ones((9, 8)), inverse, centre - inverse @ centre, order=1, mode="constant", cval=0
            )
            difference = np.abs(result[..., channel] - expected)[inside > 0.99]
            assert difference.max() <= 0.51
    assert len({round(float(draw), 3) for draw in draws[0]}) == 6


def test_rotation_by_zero_changes_nothing():
    unchanged = augment.rotate_and_scale(jax.random.key(0), jax.numpy.asarray(IMAGES), 0.0, 0.0)
    np.testing.assert_array_equal(unchanged, IMAGES)


# --- combinations ---

FULL = {"crop_padding": 2, "flip": True, "policy": "rand_augment", "erasing": 0.5, "mixup": 0.8, "cutmix": 1.0}
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
    """Returns the 8-bit values of normalized inputs."""
    values = np.asarray(inputs, np.float64) * [0.25, 0.2, 0.3] + [0.5, 0.4, 0.3]
    np.testing.assert_allclose(255 * values, np.round(255 * values), atol=1e-3)
    return np.round(255 * values).astype(np.uint8)


@pytest.fixture(scope="module")
def augmented(photos):
    """Returns a function that augments the photos with a recipe and a key; each recipe is compiled once."""
    targets = {"fine": np.eye(24, dtype=np.float32), "coarse": np.eye(24, dtype=np.float32)[:, :2]}
    compiled = {name: jax.jit(make(**options)) for name, options in RECIPES.items()}
    return lambda name, key=0: compiled[name](jax.random.key(key), photos, targets)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_functions_of_the_key_and_keep_the_sum_of_targets(name, augmented):
    first, again, other = (augmented(name, key) for key in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    inputs, targets = first
    assert inputs.shape == (24, 32, 40, 3) and np.isfinite(np.asarray(inputs)).all()
    assert (np.asarray(other[0]) != np.asarray(inputs)).mean() > 0.5
    np.testing.assert_allclose(np.asarray(targets["fine"]).sum(1), 1, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(targets["fine"])[:, :2], targets["coarse"])


@pytest.mark.slow
def test_crop_and_flip_are_the_same_with_and_without_interpolation(photos):
    """A policy that never applies its operations leaves only crop and flip, but uses the interpolating path."""
    options = {"crop_padding": 3, "flip": True}
    idle = {"policy": "rand_augment", "policy_probability": 0.0}
    targets = np.zeros((24, 1), np.float32)
    plain, composed = (jax.jit(make(**o))(jax.random.key(4), photos, targets)[0] for o in (options, options | idle))
    np.testing.assert_array_equal(pixels_of(plain), pixels_of(composed))


@pytest.mark.slow
def test_rotation_is_nearly_the_same_when_composed_with_a_policy(photos):
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
def test_pixel_operations_do_not_change_fill_pixels(photos):
    """If one operation shears and another inverts, in either order, the corners keep the fill value."""
    options = {"policy": "rand_augment", "policy_probability": 1.0, "policy_std": 0.0, "policy_operations": 3}
    many = np.tile(photos[:20], (20, 1, 1, 1))
    pixels = pixels_of(jax.jit(make(**options))(jax.random.key(5), many, np.zeros((400, 1), np.float32))[0])
    fill = np.array([128, 102, 76])  # the mean, times 255, rounded
    filled = (pixels == fill).all(-1)
    # 5 of 15 operations are geometric: 1 - (2/3)^3 = 70 % of the images draw at least one of them.
    assert 0.55 < (filled.sum((1, 2)) > 20).mean() < 0.85


def test_reflect_border_contains_pixels_of_the_image(photos):
    crops = np.asarray(augment.pad_and_crop(jax.random.key(0), jax.numpy.asarray(photos), 4, "reflect"))
    padded = np.pad(photos, ((0, 0), (4, 4), (4, 4), (0, 0)), mode="reflect")
    for image, source in zip(crops[:20], padded, strict=False):
        assert any((source[y : y + 32, x : x + 40] == image).all() for y in range(9) for x in range(9))


def test_color_jitter_draws_factors_and_orders(photos):
    jitter = make(brightness=0.4, contrast=0.2, saturation=1.5, hue=0.1)
    chain = jitter._draw_jitter(jax.random.key(0), 20_000)
    codes, arguments = np.asarray(chain.codes), np.asarray(chain.arguments)
    spans = {"brightness": (0.6, 1.4), "contrast": (0.8, 1.2), "color": (0.0, 2.5), "hue": (-0.1, 0.1)}
    for name, (low, high) in spans.items():
        here = codes == operations.CODES[name]
        assert (here.sum(0) == 1).all()  # once per image
        # 20,000 draws: each position has a quarter of them, within five standard deviations.
        assert np.abs(here.mean(1) - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 20_000)
        values = arguments[here]
        assert low <= values.min() and values.max() <= high + 1e-6
        if name != "color":  # its negative factors are clipped to 0
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
def test_inputs_can_be_arranged_as_patches(photos):
    arrange = functools.partial(patchify, patch_size=4)
    as_images, as_patches = (jax.jit(make(arrange=a, crop_padding=2, flip=True, mixup=0.5)) for a in (None, arrange))
    targets = np.zeros((24, 1), np.float32)
    inputs, _ = as_images(jax.random.key(0), photos, targets)
    patches, _ = as_patches(jax.random.key(0), photos, targets)
    assert patches.shape == (24, 80, 48)
    np.testing.assert_array_equal(patches, patchify(inputs, 4))


@pytest.mark.slow
def test_batches_do_not_depend_on_the_device_count_and_need_no_communication(photos):
    """Without mixing, which reads another example, each device works only on its own examples."""
    images = np.tile(photos, (2, 1, 1, 1))[:32]
    options = {k: v for k, v in (FULL | {"hue": 0.1}).items() if k not in ("mixup", "cutmix")}
    targets = np.eye(32, dtype=np.float32)
    batches = {}
    for devices in (1, 2, 4):
        mesh = sharding.make_mesh(devices)
        sharded = sharding.data_sharding(mesh)
        run = jax.jit(
            make(**options), in_shardings=(sharding.replicated(mesh), sharded, sharded), out_shardings=sharded
        )
        compiled = run.lower(jax.random.key(9), images, targets).compile()
        arguments = jax.device_put((images, targets), sharded)
        batches[devices] = jax.device_get(
            compiled(jax.device_put(jax.random.key(9), sharding.replicated(mesh)), *arguments)
        )
        text = compiled.as_text()
        assert not re.findall(r" (all-gather|all-to-all|collective-permute|all-reduce)(?:-start)?\(", text), devices
    for devices in (2, 4):
        chex.assert_trees_all_equal(batches[1], batches[devices])


def test_each_option_is_a_field_with_the_same_default():
    fields = {field.name: field.default for field in dataclasses.fields(augment.Augment)}
    for name, option in config_options.OPTIONS["augment"].items():
        assert fields.pop(name) == option.default, name
    assert {*fields} == {"mean", "std", "arrange", "dtype"}


def test_each_policy_is_an_allowed_value_of_the_option():
    assert config_options.OPTIONS["augment"]["policy"].choices == ("none", *POLICIES)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"resized_crop": True, "crop_padding": 4}, ["resized_crop", "crop_padding", "one of the two"]),
        ({"resized_crop": True, "min_crop_area": 0.9, "max_crop_area": 0.5}, ["min_crop_area", "0.5"]),
        ({"erasing": 0.5, "min_erasing_area": 0.5}, ["min_erasing_area", "max_erasing_area"]),
        ({"repeats": 3}, ["repeats", "128"]),
        ({"policy": "autoaugment"}, ["policy", "auto_augment"]),
        ({"policy": "rand_augment", "policy_magnitude": 11.0}, ["policy_magnitude", "10"]),
        ({"hue": 0.6}, ["hue", "0.5"]),
    ],
)
def test_contradictory_options_are_refused(options, words):
    config = config_options.default()
    config.train.steps = 1
    config.augment.update(options)
    with pytest.raises(UserError) as caught:
        check_config(config)
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
def test_options_that_do_not_fit_the_images_are_refused(options, shape, words):
    config = config_options.default()
    config.augment.update(options)
    with pytest.raises(UserError) as caught:
        augment.check_shape(config.augment, shape)
    assert all(word in str(caught.value) for word in words), caught.value
    augment.check_shape(config_options.default().augment, shape)
