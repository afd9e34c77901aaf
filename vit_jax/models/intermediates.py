"""Intermediate arrays of a forward pass: embedded patches, outputs of blocks, attention weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from vit_jax.models.vit import VisionTransformer


class Intermediates(NamedTuple):
    """Intermediate arrays of one forward pass. Tokens are [class token] [registers] patches, in row-major order.

    Attributes:
        embedded: input of the encoder: embedded patches, plus the position embedding if it is applied at the input.
        blocks: output of every block, before the final LayerNorm.
        weights: attention weights of each query (fourth axis) on each key (fifth axis), for every layer and head.
        pooling: weights of the query of attention pooling on each token; None with another pooling.
    """

    embedded: Float[Array, "batch tokens width"]
    blocks: Float[Array, "depth batch tokens width"]
    weights: Float[Array, "depth batch heads tokens tokens"]
    pooling: Float[Array, "batch heads tokens"] | None


def apply_with_intermediates(
    model: VisionTransformer,
    variables: dict[str, Any],
    inputs: Num[Array, "batch height width channels"] | Num[Array, "batch patches pixels"],
    mask: Bool[Array, "#batch #heads #queries tokens"] | None = None,
    grid: tuple[int, int] | None = None,
) -> tuple[Any, Intermediates]:
    """Returns `model.apply(variables, inputs, mask, grid=grid)` and the intermediate arrays, without dropout.

    The logits equal those of the plain call to the last bit, also in a compiled function: they come from a forward pass
    of their own, which the compiler cannot merge with the one that returns the intermediates.
    """
    logits = model.apply(variables, inputs, mask, grid=grid)
    variables, inputs = jax.lax.optimization_barrier((variables, inputs))
    _, state = model.apply(variables, inputs, mask, grid=grid, mutable=["intermediates"])
    sown = state["intermediates"]
    encoder = sown["encoder"]
    if "blocks" in encoder:
        blocks, weights = encoder["blocks"]["output"][0], encoder["blocks"]["attention"]["weights"][0]
    else:
        layers = [encoder[f"block_{index}"] for index in range(model.depth)]
        blocks = jnp.stack([layer["output"][0] for layer in layers])
        weights = jnp.stack([layer["attention"]["weights"][0] for layer in layers])
    pooling = sown["pooling"]["weights"][0][:, :, 0] if "pooling" in sown else None
    return logits, Intermediates(sown["embedded"][0], blocks, weights, pooling)
