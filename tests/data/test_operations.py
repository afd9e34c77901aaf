"""Each operation compared with Pillow's, on photographs, with up to five arguments each."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_slow
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from vit_jax.data import geometry, operations, pixels
from vit_jax.data.operations import CODES

FILL = (9, 99, 200)


def posterize(image, bits):
    # Pillow does not allow 0 bits, which occurs in timm's range: the result is black.
    return ImageOps.posterize(image, int(bits)) if bits else Image.new(image.mode, image.size)


def solarize_add(image, added):
    return image.point([min(255, k + int(added)) if k < 128 else k for k in range(256)] * len(image.getbands()))


def hue(image, shift):
    if image.mode == "L":
        return image
    planes = list(image.convert("HSV").split())
    shifted = (np.asarray(planes[0]).astype(np.int64) + int(shift * 255)) % 256
    planes[0] = Image.fromarray(shifted.astype(np.uint8))
    return Image.merge("HSV", planes).convert("RGB")


FACTORS = (0.1, 0.37, 1.0, 1.3, 1.9)
PIXEL_OPERATIONS = {
    "invert": (lambda image, unused: ImageOps.invert(image), (0.0,)),
    "auto_contrast": (lambda image, unused: ImageOps.autocontrast(image), (0.0,)),
    "equalize": (lambda image, unused: ImageOps.equalize(image), (0.0,)),
    "posterize": (posterize, (0.0, 1.0, 3.0, 4.0, 8.0)),
    "solarize": (lambda image, threshold: ImageOps.solarize(image, threshold), (0.0, 51.0, 127.5, 200.0, 256.0)),
    "solarize_add": (solarize_add, (0.0, 11.0, 55.0, 99.0, 110.0)),
    "brightness": (lambda image, factor: ImageEnhance.Brightness(image).enhance(factor), FACTORS),
    "contrast": (lambda image, factor: ImageEnhance.Contrast(image).enhance(factor), FACTORS),
    "color": (lambda image, factor: ImageEnhance.Color(image).enhance(factor), FACTORS),
    "sharpness": (lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor), FACTORS),
    "grayscale": (lambda image, unused: image.convert("L").convert(image.mode), (0.0,)),
    "blur": (lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius)), (0.1, 0.5, 1.0, 1.7, 2.0)),
    "hue": (hue, (-0.5, -0.11, 0.0, 0.2, 0.5)),
}


def affine(image, entries):
    return image.transform(image.size, Image.Transform.AFFINE, entries, Image.Resampling.BILINEAR, fillcolor=FILL)


GEOMETRIC = {
    "rotate": (lambda i, angle: i.rotate(angle, Image.Resampling.BILINEAR, fillcolor=FILL), (-135, -30, 0, 12.5, 90)),
    "shear_x": (lambda image, factor: affine(image, (1, factor, 0, 0, 1, 0)), (-0.99, -0.3, 0.0, 0.12, 0.5)),
    "shear_y": (lambda image, factor: affine(image, (1, 0, 0, factor, 1, 0)), (-0.99, -0.3, 0.0, 0.12, 0.5)),
    "translate_x": (lambda image, shift: affine(image, (1, 0, shift, 0, 1, 0)), (-14.4, -3, 0, 2.25, 32)),
    "translate_y": (lambda image, shift: affine(image, (1, 0, 0, 0, 1, shift)), (-14.4, -3, 0, 2.25, 32)),
}


def by_pillow(operation, images, argument):
    return np.stack([np.asarray(operation(Image.fromarray(image), argument)) for image in images]).astype(np.int64)


@pytest.fixture(scope="module")
def apply():
    """Returns `operations.apply` with all operations on pixel values, compiled once per shape."""
    return jax.jit(lambda *arrays: operations.apply(*arrays, tuple(PIXEL_OPERATIONS)))


def test_every_operation_is_compared_with_pillow():
    assert {*PIXEL_OPERATIONS, *GEOMETRIC, "identity"} == {*operations.NAMES}


@pytest.mark.parametrize("name", mostly_slow(list(PIXEL_OPERATIONS), 4))
def test_pixel_operations_match_pillow_bit_for_bit(name, photos, apply):
    operation, arguments = PIXEL_OPERATIONS[name]
    inside = np.ones(photos.shape[:3], bool)
    for argument in arguments:
        drawn = np.full(len(photos), argument, np.float32)
        actual = np.asarray(apply(photos, inside, np.full(len(photos), CODES[name]), drawn))
        np.testing.assert_array_equal(actual, by_pillow(operation, photos, float(drawn[0])), err_msg=f"{argument}")


def test_pixel_operations_match_pillow_on_grey_images(photos):
    grey = np.asarray(pixels.grey(jnp.asarray(photos))).astype(np.uint8)
    compiled = jax.jit(lambda *arrays: operations.apply(*arrays, tuple(PIXEL_OPERATIONS)))
    inside = np.ones(grey.shape[:3], bool)
    for name, (operation, arguments) in PIXEL_OPERATIONS.items():
        argument = np.float32(arguments[-1])
        codes = np.full(len(grey), CODES[name])
        actual = np.asarray(compiled(grey, inside, codes, np.full(len(grey), argument)))[..., 0]
        expected = by_pillow(operation, grey[..., 0], float(argument))
        np.testing.assert_array_equal(actual, expected, err_msg=name)


def test_images_of_a_batch_can_have_different_operations(photos, apply):
    names = [*PIXEL_OPERATIONS, "identity", "rotate"]
    codes = np.array([CODES[names[k % len(names)]] for k in range(len(photos))])
    actual = np.asarray(apply(photos, np.ones(photos.shape[:3], bool), codes, np.full(len(photos), 1.5, np.float32)))
    for k, image in enumerate(photos):
        operation = PIXEL_OPERATIONS.get(names[k % len(names)], (lambda image, unused: image,))[0]
        np.testing.assert_array_equal(actual[k], by_pillow(operation, [image], 1.5)[0])


def test_auto_contrast_rounds_like_pillow_for_every_range_of_values():
    ramps = [np.clip(np.arange(256), low, high) for low in range(0, 256, 5) for high in range(low, 256, 3)]
    images = np.array(ramps, np.uint8).reshape(-1, 16, 16, 1)
    inside = np.ones(images.shape[:3], bool)

    @jax.jit
    def auto_contrast(images, inside):
        return pixels.look_up(images, pixels.auto_contrast(pixels.histogram(images, inside)))

    actual = auto_contrast(images, inside)
    expected = by_pillow(lambda image, unused: ImageOps.autocontrast(image), images[..., 0], None)
    np.testing.assert_array_equal(np.asarray(actual)[..., 0], expected)


def test_statistics_ignore_fill_pixels(photos, apply):
    height, width = 20, 30
    inside = np.zeros(photos.shape[:3], bool)
    inside[:, :height, :width] = True
    for name in ("equalize", "auto_contrast", "contrast"):
        codes, factor = np.full(len(photos), CODES[name]), np.full(len(photos), 0.5, np.float32)
        actual = np.asarray(apply(photos, inside, codes, factor))[:, :height, :width]
        expected = by_pillow(PIXEL_OPERATIONS[name][0], photos[:, :height, :width], 0.5)
        np.testing.assert_array_equal(actual, expected, err_msg=name)


@pytest.fixture(scope="module")
def look_up():
    @jax.jit
    def compiled(images, codes, arguments):
        windows = geometry.full_windows(*images.shape[:3])
        layers = [
            operations.affine_maps(*layer, tuple(GEOMETRIC), *images.shape[1:3])
            for layer in zip(codes, arguments, strict=True)
        ]
        actual, inside = geometry.look_up(images, windows, layers, operations.is_geometric(codes), *images.shape[1:3])
        return jnp.where(inside[..., None], actual, jnp.asarray(FILL, jnp.uint8))

    return compiled


@pytest.mark.parametrize("name", GEOMETRIC)
def test_geometric_operations_match_pillow(name, photos, look_up):
    operation, arguments = GEOMETRIC[name]
    for argument in arguments:
        codes = np.full((1, len(photos)), CODES[name])
        actual = np.asarray(look_up(photos, codes, np.full(codes.shape, argument, np.float32))).astype(np.int64)
        expected = by_pillow(operation, photos, argument)
        inner = actual[:, 2:-2, 2:-2] - expected[:, 2:-2, 2:-2]
        # At most one step of 1/255 per pixel, and much less on average.
        assert np.abs(inner).mean() < 0.05, argument
        assert np.abs(inner).max() <= 1, argument
        assert (np.abs(actual - expected) > 1).mean() < 0.002, argument


def test_composed_geometric_operations_match_pillow_applied_twice(photos, look_up):
    """On smooth images, interpolating once or twice is nearly the same; fill pixels are as if applied one by one."""
    smooth = by_pillow(lambda image, unused: image.filter(ImageFilter.GaussianBlur(4)), photos, 0).astype(np.uint8)
    codes = np.stack([np.full(len(smooth), CODES[name]) for name in ("rotate", "translate_x")])
    arguments = np.stack([np.full(len(smooth), value, np.float32) for value in (20.0, 9.0)])
    actual = np.asarray(look_up(smooth, codes, arguments)).astype(np.int64)
    rotated = by_pillow(GEOMETRIC["rotate"][0], smooth, 20.0).astype(np.uint8)
    expected = by_pillow(GEOMETRIC["translate_x"][0], rotated, 9.0)
    filled = (expected == FILL).all(-1)
    np.testing.assert_array_equal((actual == FILL).all(-1)[:, :, 31:], filled[:, :, 31:])
    inner = ~filled & (actual != FILL).any(-1)
    assert np.abs(actual - expected)[inner].mean() < 1
    assert inner.mean() > 0.5


def test_translation_back_does_not_restore_lost_pixels(photos, look_up):
    codes = np.full((2, len(photos)), CODES["translate_x"])
    actual = np.asarray(
        look_up(photos, codes, np.array([[10.0], [-10.0]], np.float32) * np.ones(codes.shape, np.float32))
    )
    np.testing.assert_array_equal(actual[:, :, 10:], photos[:, :, 10:])
    assert (actual[:, :, :10] == np.array(FILL)).all()


def test_resized_crop_matches_pillow(photos):
    batch, height, width = photos.shape[:3]
    windows = geometry.resized_crop(jax.random.key(1), batch, height, width, (0.08, 1.0), 4 / 3)
    moved = jnp.zeros(batch, bool)
    actual, inside = jax.jit(lambda images: geometry.look_up(images, windows, [], moved, height, width))(photos)
    assert inside.all()
    edges = zip(*(np.asarray(a) for a in (windows.left, windows.top, windows.width, windows.height)), strict=True)
    for image, result, (left, top, wide, high) in zip(photos, np.asarray(actual), edges, strict=True):
        window = Image.fromarray(image).crop((left, top, left + wide, top + high))
        expected = np.asarray(window.resize((width, height), Image.Resampling.BILINEAR)).astype(np.int64)
        assert np.abs(result - expected).max() <= 1
        assert np.abs(result - expected).mean() < 0.3


@pytest.mark.parametrize("shape, area, ratio", [((64, 64), (0.08, 1.0), 4 / 3), ((48, 96), (0.2, 0.5), 2.0)])
def test_windows_have_the_areas_and_ratios_of_torchvision(shape, area, ratio):
    count, (height, width) = 20_000, shape
    windows = geometry.resized_crop(jax.random.key(2), count, height, width, area, ratio)
    sizes = np.stack([windows.height, windows.width])
    generator, expected = np.random.default_rng(0), []
    for _ in range(count):  # the published algorithm, one image at a time
        for _ in range(10):
            target = height * width * generator.uniform(*area)
            aspect = np.exp(generator.uniform(-np.log(ratio), np.log(ratio)))
            wide, high = round(np.sqrt(target * aspect)), round(np.sqrt(target / aspect))
            if 0 < wide <= width and 0 < high <= height:
                break
        else:
            pytest.fail("the central window is tested elsewhere")
        expected.append((high, wide))
    actual, expected = (np.log(np.asarray(s, np.float64).reshape(2, -1)) for s in (sizes, np.array(expected).T))
    for statistic in (lambda s: s[0] + s[1], lambda s: s[1] - s[0]):  # of area and of ratio
        ours, theirs = statistic(actual), statistic(expected)
        assert abs(ours.mean() - theirs.mean()) < 5 * theirs.std() * np.sqrt(2 / count)
        assert abs(ours.var() / theirs.var() - 1) < 5 * np.sqrt(2 * 2 / count)
    top, left = np.asarray(windows.top), np.asarray(windows.left)
    for start, free in ((top, height - sizes[0]), (left, width - sizes[1])):
        assert (start >= 0).all() and (start <= free).all()
        some = free > 0
        share = (start[some] + 0.5) / (free[some] + 1)
        assert abs(share.mean() - 0.5) < 5 * np.sqrt(1 / 12 / some.sum())


def test_window_that_never_fits_is_the_largest_central_one():
    windows = geometry.resized_crop(jax.random.key(0), 5, 10, 100, (0.9, 1.0), 4 / 3)
    sizes = [np.asarray(getattr(windows, name)).tolist() for name in ("top", "left", "height", "width")]
    assert sizes == [[0] * 5, [43] * 5, [10] * 5, [13] * 5]
