"""Maps over an image from attention weights: attention, rollout, relevance, distance.

Weights are [batch, heads, tokens, tokens], for each query (third axis) on each key (fourth axis). Tokens are
[class token] [registers] patches, in row-major order; `extra` is the number of tokens before the patches.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vit_jax.models.vit import VisionTransformer

CLASS_TOKEN, MEAN, POOLING = "class token", "mean over patches", "pooling query"
Weights = Float[Array, "batch heads tokens tokens"]


def query_of(model: VisionTransformer) -> str:
    """Returns what the head of a model reads: `CLASS_TOKEN`, `MEAN` (over the patches) or `POOLING` (a query)."""
    if model.pooling == "map":
        return POOLING
    return MEAN if model.pooling == "mean" or not model.class_token else CLASS_TOKEN


def of_query(rows: Float[Array, "*leading tokens keys"], query: str | int, extra: int) -> Float[Array, "*leading keys"]:
    """Returns the row of one query: `CLASS_TOKEN`, `MEAN`, or the index of a token."""
    if query == MEAN:
        return rows[..., extra:, :].mean(axis=-2)
    return rows[..., 0 if query == CLASS_TOKEN else query, :]


def to_grid(
    row: Float[Array, "*leading tokens"], extra: int, grid: tuple[int, int]
) -> Float[Array, "*leading rows columns"]:
    """Returns the values of the patches in rows and columns, without those of the tokens before them."""
    return row[..., extra:].reshape(*row.shape[:-1], *grid)


def rollout(weights: Sequence[Weights]) -> Float[Array, "batch tokens tokens"]:
    """Returns attention rollout (arXiv 2005.00928, section 3): the share of each token (last axis) in each output.

    Per layer, the weights are averaged over the heads, and the identity is added for the residual connection; rows are
    divided by their sum, which gives (A + I) / 2. The layers' matrices are multiplied.
    """
    identity = jnp.eye(weights[0].shape[-1])
    joint = jnp.broadcast_to(identity, weights[0][:, 0].shape)
    for layer in weights:
        mixed = layer.astype(jnp.float32).mean(axis=1) + identity
        joint = _product(mixed / mixed.sum(axis=-1, keepdims=True), joint)
    return joint


def relevance(weights: Sequence[Weights], gradients: Sequence[Weights]) -> Float[Array, "batch tokens tokens"]:
    """Returns the relevance of each input token (last axis) for each output token.

    arXiv 2103.15679, equations 1, 5 and 6, for self-attention: per layer, R <- R + A' R, where A' is the mean over the
    heads of the positive part of weights * gradients. R is the identity at first. `gradients` are those of the logit of
    a class with respect to the weights.
    """
    joint = jnp.broadcast_to(jnp.eye(weights[0].shape[-1]), weights[0][:, 0].shape)
    for layer, gradient in zip(weights, gradients, strict=True):
        joint = joint + _product(positive_part(layer, gradient), joint)
    return joint


def positive_part(
    weights: Float[Array, "batch heads *axes"], gradients: Float[Array, "batch heads *axes"]
) -> Float[Array, "batch *axes"]:
    """Returns the mean over the heads of the positive part of weights * gradients (arXiv 2103.15679, eq. 5)."""
    return jnp.maximum(weights * gradients, 0).astype(jnp.float32).mean(axis=1)


def mean_distance(weights: Weights, extra: int, grid: tuple[int, int], patch_size: int) -> Float[Array, "batch heads"]:
    """Returns the mean attention distance of each head in pixels (arXiv 2010.11929, Fig. 7 right and appendix D.7).

    It is the distance between the centres of two patches, averaged over all queries, and for each query over the keys
    with its weights. Class token and registers have no position: they are left out, as queries and as keys, and the
    weights of the patches are divided by their sum.

    Args:
        weights: of one layer.
        extra: number of tokens before the patches.
        grid: rows and columns of patches.
        patch_size: height and width of a patch, in pixels of the image.
    """
    centres = np.stack(np.mgrid[: grid[0], : grid[1]], axis=-1).reshape(-1, 2) * patch_size
    distances = np.linalg.norm(centres[:, None] - centres[None], axis=-1).astype(np.float32)
    among = weights[:, :, extra:, extra:].astype(jnp.float32)
    total = jnp.maximum(among.sum(axis=-1), jnp.finfo(jnp.float32).tiny)
    return (jnp.einsum("bhqk,qk->bhq", among, distances) / total).mean(axis=-1)


def _product(left: jax.Array, right: jax.Array) -> jax.Array:
    """The matrix product in float32, also on devices that would round its operands."""
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)
