"""Images to patches and back, and the linear projection of patches to tokens (arXiv 2010.11929, eq. 1)."""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Num

from vit_jax import arguments
from vit_jax.models.dense import Dense


def patchify(images: Num[Array, "batch height width channels"], patch_size: int) -> Num[Array, "batch patches pixels"]:
    """Splits images into non-overlapping square patches and flattens each one.

    Patches are in row-major order; pixels within a patch are ordered (row, column, channel). A Dense layer on the
    result is the linear projection E of arXiv 2010.11929 (eq. 1), equal to a convolution whose stride is the patch
    size and whose kernel [P, P, C, D] is reshaped to [P*P*C, D].

    Raises:
        ValueError: `patch_size` does not divide the height or the width.
    """
    if getattr(images, "ndim", None) != 4:
        raise ValueError(f"images is {arguments.shown(images)}\n  allowed: an array [batch, height, width, channels]")
    batch, height, width, channels = images.shape
    rows, columns = grid_of((height, width), patch_size)
    patches = images.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return patches.swapaxes(2, 3).reshape(batch, rows * columns, patch_size * patch_size * channels)


def unpatchify(
    patches: Num[Array, "batch patches pixels"], patch_size: int, image_size: tuple[int, int]
) -> Num[Array, "batch height width channels"]:
    """The inverse of `patchify`, for images of (height, width) `image_size`.

    Raises:
        ValueError: the patches do not make up an image of that size.
    """
    batch, count, pixels = patches.shape
    rows, columns = grid_of(image_size, patch_size)
    channels, rest = divmod(pixels, patch_size * patch_size)
    if count != rows * columns or rest:
        raise ValueError(
            f"{count} patches of {pixels} pixels do not make up a {image_size[0]}x{image_size[1]} image in patches of "
            f"{patch_size}: that takes {rows * columns} patches of a multiple of {patch_size * patch_size} pixels"
        )
    images = patches.reshape(batch, rows, columns, patch_size, patch_size, channels)
    return images.swapaxes(2, 3).reshape(batch, *image_size, channels)


def grid_of(image_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """The number of rows and columns of patches in images of (height, width) `image_size`.

    Raises:
        ValueError: `patch_size` does not divide the height or the width.
    """
    (height, width), patch_size = arguments.pair("image_size", image_size), arguments.integer("patch_size", patch_size)
    if height % patch_size or width % patch_size:
        raise ValueError(f"a patch of {patch_size} does not divide an image of {height}x{width}")
    return height // patch_size, width // patch_size


class PatchEmbedding(nn.Module):
    """Patches to tokens: a strided reshape (`patchify`) and one Dense layer.

    Attributes:
        width: size D of a token.
        patch_size: height and width P of a patch, in pixels.
        dtype: compute dtype of the projection.
    """

    width: int
    patch_size: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, inputs: Num[Array, "batch height width channels"] | Num[Array, "batch patches pixels"]
    ) -> Num[Array, "batch patches embedding"]:
        """Embeds images, or patches as `patchify` returns them."""
        patches = inputs if inputs.ndim == 3 else patchify(inputs, self.patch_size)
        # LeCun's initializer, as for the equivalent convolution: the fan-in is the number of values per patch.
        kernel_init = nn.initializers.lecun_normal()
        return Dense(self.width, dtype=self.dtype, kernel_init=kernel_init, name="projection")(patches)
