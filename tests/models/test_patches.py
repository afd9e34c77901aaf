import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models.patches import PatchEmbedding, patchify, unpatchify


@pytest.mark.parametrize("channels", [1, 3, 5])
@pytest.mark.parametrize(("height", "width"), [(8, 8), (12, 4), (4, 16)])
def test_unpatchify_inverts_patchify(draw, height, width, channels):
    images = draw(2, height, width, channels)
    patches = patchify(images, 4)
    assert patches.shape == (2, height * width // 16, 16 * channels)
    np.testing.assert_array_equal(unpatchify(patches, 4, (height, width)), images)


def test_patches_go_row_by_row_and_pixels_row_column_channel(draw):
    images = draw(1, 4, 6, 3)
    patches = patchify(images, 2)
    slow = [images[0, r : r + 2, c : c + 2].ravel() for r in (0, 2) for c in (0, 2, 4)]
    np.testing.assert_array_equal(patches[0], np.stack(slow))


@pytest.mark.parametrize(("size", "patch", "channels"), [((8, 12), 4, 3), ((6, 6), 3, 1), ((4, 8), 2, 5)])
def test_embedding_is_a_strided_convolution(draw, size, patch, channels):
    images = draw(2, *size, channels)
    module = PatchEmbedding(8, patch)
    kernel, bias = draw(patch * patch * channels, 8, seed=1), draw(8, seed=2)
    with jax.default_matmul_precision("highest"):
        tokens = module.apply({"params": {"projection": {"kernel": kernel, "bias": bias}}}, images)
        convolved = jax.lax.conv_general_dilated(
            images,
            kernel.reshape(patch, patch, channels, 8),
            window_strides=(patch, patch),
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
    expected = convolved.reshape(2, -1, 8) + bias
    np.testing.assert_allclose(tokens, expected, atol=1e-6 * float(jnp.abs(expected).max()))


def test_what_does_not_fit_is_refused(draw):
    with pytest.raises(ValueError, match="a patch of 3 does not divide an image of 8x9"):
        patchify(draw(1, 8, 9, 3), 3)
    with pytest.raises(ValueError, match="takes 4 patches of a multiple of 16"):
        unpatchify(draw(1, 6, 48), 4, (8, 8))
    with pytest.raises(ValueError, match="takes 4 patches of a multiple of 16"):
        unpatchify(draw(1, 4, 47), 4, (8, 8))
