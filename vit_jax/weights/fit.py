"""Parameters made for one kind of images, fitted to another: image size, patch size, channels."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from vit_jax.models.resampling import resample_positions


def resize_patches(
    kernel: Float[np.ndarray, "pixels width"], old: int, new: int
) -> Float[np.ndarray, "new_pixels width"]:
    """The embedding kernel of patches of `old` pixels a side for patches of `new` (FlexiViT, arXiv 2212.08013, 3.4).

    With B the matrix that resizes a patch bilinearly, the new kernel is the pseudo-inverse of B^T times the old one:
    where patches grow, a resized patch has exactly the embedding that it had; where they shrink, nearly. B acts on rows
    and columns alike, and so does its pseudo-inverse, one axis after the other.
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
    """The kernel of a first layer for images of another number of channels, as timm adapts it.

    For one channel the kernel is summed, so that a grey image does what its grey copies did; for others it is repeated,
    first channel first, and scaled by old / new, so that equal channels do what they did, where the old are whole.
    """
    old = kernel.shape[2]
    if channels == old:
        return kernel
    if channels == 1:
        return kernel.sum(axis=2, keepdims=True)
    return kernel[:, :, np.arange(channels) % old] * np.float32(old / channels)


def how_channels(old: int, new: int) -> str:
    """What `adapt_channels` does, in words."""
    return f"channels {old} -> {new}, " + ("summed" if new == 1 else f"repeated, times {old}/{new}")


def fit_positions(
    name: str, array: Float[np.ndarray, "*shape"], old: tuple[int, int], new: tuple[int, int]
) -> Float[np.ndarray, "*new_shape"]:
    """A position embedding ('table', 'rows', 'columns', 'offsets') for another grid; a class token's row is kept."""
    resampled = resample_positions({"positions": {name: jnp.asarray(array)}}, old, new)
    return np.asarray(resampled["positions"][name], np.float32)
