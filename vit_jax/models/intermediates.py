"""What happens inside: the embedded patches, every block's output, every head's attention weights."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from vit_jax.models.vit import VisionTransformer


class Intermediates(NamedTuple):
    """Arrays from inside one forward pass. Tokens are [class token] [registers] patches, row by row.

    Attributes:
        embedded: the encoder's input: patches embedded, with the position where it is added at the input.
        blocks: every block's output, before the last LayerNorm.
        weights: what each query (fourth axis) takes from each key (fifth), layer by layer, head by head.
        pooling: of attention pooling, what its query takes from each token; None with another pooling.
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
    """`model.apply(variables, inputs, mask, grid=grid)`, and what happened on the way; dropout is off.

    The logits are those of the plain call, to the last bit, also within a compiled function: they come from a pass of
    their own, which the compiler is kept from merging with the one that is looked into. That makes two passes.
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
