"""Parameters for one image size, patch size or number of channels, converted to another."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from vit_jax.models.resampling import resample_positions


def resize_patches(
    kernel: Float[np.ndarray, "pixels width"], old: int, new: int
) -> Float[np.ndarray, "new_pixels width"]:
    """The embedding kernel for another patch size, `old` to `new` pixels (FlexiViT, arXiv 2212.08013, section 3.4).

    With B the matrix that resizes a patch bilinearly, the new kernel is the pseudo-inverse of B^T times the old one. A
    resized patch then has the same embedding if patches grow, and nearly the same if they shrink. B acts on rows and
    columns separately, and so does its pseudo-inverse.
    """
    if old == new:
        return kernel
    resize = jax.image.resize(jnp.eye(old), (new, old), "bilinear", antialias=True, precision=jax.lax.Precision.HIGHEST)
    inverse = np.linalg.pinv(np.asarray(resize, np.float64).T)
    patches = np.asarray(kernel, np.float64).reshape(old, old, -1)
    resized = np.einsum("ai,bj,ijk->abk", inverse, inverse, patches, optimize=True)
    return resized.reshape(-1, kernel.shape[1]).astype(np.float32)


def adapt_channels(
    kernel: Float[np.ndarray, "height width channels features"], channels: int
) -> Float[np.ndarray, "height width new_channels features"]:
    """The kernel of the first layer for images with another number of channels, by timm's rule.

    For one channel the kernel is summed, so that the result for a greyscale image equals that for its RGB copy. For
    others the channels are repeated and scaled by old / new, which preserves the result for images of equal channels
    if the new number is a multiple of the old one.
    """
    old = kernel.shape[2]
    if channels == old:
        return kernel
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    return kernel[:, :, np.arange(channels) % old] * np.float32(old / channels)


def how_channels(old: int, new: int) -> str:
    """A description of what `adapt_channels` does."""
    return f"channels {old} -> {new}, " + ("summed" if new == 1 else f"repeated, times {old}/{new}")


def fit_positions(
    name: str, array: Float[np.ndarray, "*shape"], old: tuple[int, int], new: tuple[int, int], method: str
) -> Float[np.ndarray, "*new_shape"]:
    """A position embedding ('table', 'rows', 'columns', 'offsets' or 'class') for another grid.

    A class token's row is kept. `method` is one of `resampling.METHODS`.
    """
    resampled = resample_positions({"positions": {name: jnp.asarray(array)}}, old, new, method)
    return np.asarray(resampled["positions"][name], np.float32)
