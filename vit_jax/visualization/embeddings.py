"""What embeddings contain: principal components of filters and of patch tokens, similarities of positions."""

from typing import Any

import numpy as np
from jaxtyping import Float, Float32

from vit_jax.errors import UserError
from vit_jax.models import stacking
from vit_jax.models.positions import POSITIONS, Terms
from vit_jax.models.vit import VisionTransformer, extra_tokens, position_at

COSINE, BIAS, ROTATION = "cosine similarity", "bias of the score, mean over heads", "cosine of the rotation between two"


def principal_components(
    samples: Float[np.ndarray, "samples features"], count: int
) -> tuple[Float[np.ndarray, "count features"], Float[np.ndarray, " count"], Float[np.ndarray, " features"]]:
    """Returns the leading principal components, the share of the variance of each, and the mean of the samples.

    Components have length 1, and the entry of the largest magnitude is positive. They are computed in float64, from
    the matrix of covariances of the shorter axis.
    """
    mean = samples.mean(axis=0, dtype=np.float64)
    centred = samples - mean
    is_wide = centred.shape[1] > centred.shape[0]
    values, vectors = np.linalg.eigh(centred @ centred.T if is_wide else centred.T @ centred)
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    count = min(count, len(values))
    components = vectors[:, :count].T
    if is_wide:
        components = components @ centred
        components /= np.maximum(np.linalg.norm(components, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    largest = components[np.arange(count), np.abs(components).argmax(axis=1)]
    components = components * np.where(largest < 0, -1.0, 1.0)[:, None]
    return components, values[:count] / max(values.sum(), np.finfo(np.float64).tiny), mean


def filters(
    model: VisionTransformer, parameters: dict[str, Any]
) -> Float32[np.ndarray, "filters height width channels"]:
    """Returns the filters that see the pixels: of the patch embedding, or of the first convolution of a stem."""
    if model.stem is not None:
        return np.moveaxis(np.asarray(parameters["stem"]["convolution_root"]["kernel"], np.float32), -1, 0)
    kernel = np.asarray(parameters["embedding"]["projection"]["kernel"], np.float32)
    side = model.patch_size
    return np.moveaxis(kernel.reshape(side, side, -1, kernel.shape[-1]), -1, 0)


def position_similarity(
    model: VisionTransformer, parameters: dict[str, Any], grid: tuple[int, int], layer: int = 0
) -> tuple[Float[np.ndarray, "rows columns rows columns"], str]:
    """Returns how each position (first two axes) is related to each other one (last two), and what that number is.

    * Of a table, learned or fixed: the cosine similarity of the embeddings (arXiv 2010.11929, Fig. 7 centre).
    * Of a relative position: the bias of the attention score, averaged over the heads.
    * Of a rotary one without a table: the mean cosine of the angles between the two rotations, which is the cosine
      similarity of two queries and keys with equal channels after they are rotated.

    Args:
        model: the Vision Transformer.
        parameters: of the model.
        grid: rows and columns of patches.
        layer: from 0, for position embeddings that each layer has of its own.

    Raises:
        UserError: the model has no position embedding.
    """
    if model.position == "none":
        raise UserError("positions: the model has no position embedding\n  choose another picture, such as rollout")
    terms, extra = _terms(model, parameters, grid, layer), extra_tokens(model)
    if terms.table is not None:
        table = np.asarray(terms.table, np.float64)[0, extra:]
        unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), np.finfo(np.float64).tiny)
        similarity, kind = unit @ unit.T, COSINE
    elif terms.bias is not None:
        similarity, kind = np.asarray(terms.bias, np.float64)[0].mean(axis=0)[extra:, extra:], BIAS
    else:
        cosines, sines = (np.asarray(part, np.float64)[extra:] for part in terms.rotation)
        similarity, kind = (cosines @ cosines.T + sines @ sines.T) / cosines.shape[1], ROTATION
    return similarity.reshape(*grid, *grid), kind


def _terms(model: VisionTransformer, parameters: dict[str, Any], grid: tuple[int, int], layer: int) -> Terms:
    """Returns the output of the position embedding of the model, or of one of its layers."""
    if position_at(model) == "layers":
        parameters = stacking.unstack_blocks(parameters)["encoder"][f"block_{layer}"]
    own = {"params": parameters.get("positions", {})}
    return POSITIONS[model.position](model.layout(grid)).apply(own)
