import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models import masked_patches
from vit_jax.models.masked_patches import MaskedPatchPrediction
from vit_jax.models.patches import patchify

KEYS = jax.random.split(jax.random.key(2), 5000)
MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


@pytest.mark.slow
def test_of_the_corrupted_80_percent_are_masked_and_10_swapped():
    corrupted, masked, sources = map(np.asarray, masked_patches.draw_corruption(KEYS, 16, 8))
    swapped = sources != np.arange(16)
    assert (corrupted.sum(axis=1) == 8).all()
    assert not (masked & ~corrupted).any() and not (swapped & ~corrupted).any() and not (masked & swapped).any()
    # Of 40,000 corrupted ones; the standard deviations are sqrt(p (1 - p) / 40000) = 0.0020 and 0.0015.
    assert masked.sum() / corrupted.sum() == pytest.approx(0.8, abs=5 * 0.0020)
    assert swapped.sum() / corrupted.sum() == pytest.approx(0.1, abs=5 * 0.0015)
    distances = np.bincount((sources - np.arange(16))[swapped] % 16, minlength=16)
    assert distances[0] == 0  # always another patch, each as likely: 4,000 / 15 = 267, with a deviation of 16
    np.testing.assert_allclose(distances[1:], swapped.sum() / 15, atol=5 * 16)


@pytest.mark.slow
def test_embeddings_are_corrupted_as_a_loop_does(draw):
    corruption = masked_patches.draw_corruption(KEYS[:40], 6, 5)
    embeddings, mask = np.asarray(draw(40, 6, 3)), np.asarray(draw(1, 1, 3, seed=1))
    wanted = embeddings.copy()
    for image in range(40):
        for patch in range(6):
            if corruption.masked[image, patch]:
                wanted[image, patch] = mask[0, 0]
            elif corruption.corrupted[image, patch]:
                wanted[image, patch] = embeddings[image, corruption.sources[image, patch]]
    assert {bool(kept) for kept in np.asarray(corruption.corrupted).ravel()} == {True, False}
    np.testing.assert_array_equal(
        masked_patches.corrupt(jnp.asarray(embeddings), jnp.asarray(mask), corruption), wanted
    )


def test_the_target_is_the_upper_three_bits_of_each_channels_mean():
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (20, 8, 8, 3), np.uint8)
    images[0, :4] = [31, 32, 255]  # means at the very bounds
    images[1, :4, :4] = [[0, 0, 0], [63, 64, 96], [128, 127, 0], [64, 65, 160]]
    normalised = (images.astype(np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    colours = masked_patches.mean_colours(patchify(jnp.asarray(normalised), 4), MEAN, STD)
    for image in range(20):
        for patch in range(4):
            top, left = 4 * (patch // 2), 4 * (patch % 2)
            red, green, blue = (
                int(images[image, top : top + 4, left : left + 4, channel].astype(int).sum() / 16) >> 5
                for channel in range(3)
            )
            assert colours[image, patch] == 64 * red + 8 * green + blue


def test_grey_images_have_eight_colours():
    patches = jnp.asarray([[[0.0], [31.9 / 255], [32.1 / 255], [1.0]]])
    assert masked_patches.mean_colours(patches, (0.0,), (1.0,)).tolist() == [[0, 0, 1, 7]]


@pytest.mark.slow
def test_logits_are_those_of_the_corrupted_image(small, randomise, draw):
    """Masking the embeddings inside the module is what a backbone makes of embeddings masked beforehand."""
    backbone, images = small(classes=None, pooling="none"), draw(3, 4, 6, 3)
    module = MaskedPatchPrediction(backbone, MEAN, STD)
    parameters = randomise(module, images)["params"]
    logits, corrupted = jax.jit(module.apply)({"params": parameters}, images, KEYS[:3])
    assert logits.shape == (3, 6, 512)
    corruption = masked_patches.draw_corruption(KEYS[:3], 6, 3)
    np.testing.assert_array_equal(corrupted, corruption.corrupted)
    projection = parameters["backbone"]["embedding"]["projection"]
    embeddings = np.array(patchify(images, 2) @ projection["kernel"] + projection["bias"])
    for image, patch in np.ndindex(3, 6):
        if corruption.masked[image, patch]:
            embeddings[image, patch] = parameters["mask_embedding"][0, 0]
        elif corruption.sources[image, patch] != patch:
            pixels = np.asarray(patchify(images, 2))[image, corruption.sources[image, patch]]
            embeddings[image, patch] = pixels @ projection["kernel"] + projection["bias"]
    replaced = jnp.asarray(embeddings)
    encode = jax.jit(lambda parameters: backbone.apply({"params": parameters}, images, replace=lambda _: replaced))
    tokens = encode(parameters["backbone"])
    wanted = tokens[:, 1:] @ parameters["colours"]["kernel"] + parameters["colours"]["bias"]
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
