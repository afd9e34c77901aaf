"""Multi-head self-attention (arXiv 2010.11929, appendix A): one fused product for queries, keys and values."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from vit_jax.models.dense import Dense, stacked
from vit_jax.models.dropout import Dropout


def attention_weights(
    queries: Float[Array, "batch queries heads size"],
    keys: Float[Array, "batch keys heads size"],
    mask: Bool[Array, "#batch #heads #queries keys"] | None = None,
) -> Float[Array, "batch heads queries keys"]:
    """Softmax of the scaled scores, in float32 whatever the arguments are.

    Scores are divided by the square root of the *head* size. A key whose mask is False gets a weight of exactly 0; a
    query that may see no key at all gets zeros everywhere, not an average over what is hidden from it.
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", queries, keys, preferred_element_type=jnp.float32)
    scores = scores * queries.shape[-1] ** -0.5
    if mask is None:
        return jax.nn.softmax(scores, axis=-1)
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    return jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0.0)


class Attention(nn.Module):
    """Multi-head self-attention over tokens.

    Attributes:
        heads: number of heads; they share the width evenly.
        dropout: rate at which attention weights are dropped in training.
        dtype: arithmetic of the products; softmax is in float32.
    """

    heads: int
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch tokens width"],
        mask: Bool[Array, "#batch #heads #queries tokens"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch tokens width"]:
        """Mixes tokens; `mask` is True where a query (third axis) may see a key (fourth).

        Raises:
            ValueError: the heads do not divide the width.
        """
        batch, count, width = tokens.shape
        if width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {width}")
        kernel_init = stacked(nn.initializers.xavier_uniform(), 3)
        fused = Dense(3 * width, dtype=self.dtype, kernel_init=kernel_init, name="qkv")(tokens)
        # One transpose brings all three into the layout that the batched products read.
        queries, keys, values = jnp.moveaxis(fused.reshape(batch, count, 3, self.heads, width // self.heads), 2, 0)
        weights = attention_weights(queries, keys, mask)
        self.sow("intermediates", "weights", weights)
        weights = Dropout(self.dropout)(weights, train).astype(self.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, values).reshape(batch, count, width)
        return Dense(width, dtype=self.dtype, name="out")(mixed)
