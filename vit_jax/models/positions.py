"""Where a patch stands in the image: position embeddings."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


class LearnedPositions(nn.Module):
    """A learned vector for every token, added at the input (arXiv 2010.11929, eq. 1 and appendix D.4)."""

    @nn.compact
    def __call__(self, tokens: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        table = self.param("table", nn.initializers.normal(0.02), (1, *tokens.shape[1:]), jnp.float32)
        return tokens + table.astype(tokens.dtype)
