"""The Transformer encoder (arXiv 2010.11929, eq. 2 and 3): pre-LN blocks of attention and MLP."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from vit_jax.models.attention import Attention
from vit_jax.models.dense import Dense
from vit_jax.models.dropout import Dropout

LAYER_NORM_EPSILON = 1e-6


class LayerNorm(nn.Module):
    """Layer normalisation, statistics in float32, result in `dtype`."""

    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "*leading width"]) -> Float[Array, "*leading width"]:
        norm = nn.LayerNorm(epsilon=LAYER_NORM_EPSILON, dtype=jnp.float32, name="norm")
        nn.share_scope(self, norm)
        return norm(tokens).astype(self.dtype)


class MlpBlock(nn.Module):
    """Two dense layers with a GELU between, its tanh form (as the published code computes it).

    Attributes:
        hidden: width of the layer between.
        dropout: rate after each of the two layers in training.
        dtype: arithmetic of the products.
    """

    hidden: int
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "batch tokens width"], train: bool = False
    ) -> Float[Array, "batch tokens width"]:
        bias_init = nn.initializers.normal(1e-6)
        hidden = Dense(self.hidden, dtype=self.dtype, bias_init=bias_init, name="up")(tokens)
        hidden = jax.nn.gelu(hidden, approximate=True)
        hidden = Dropout(self.dropout)(hidden, train)
        outputs = Dense(tokens.shape[-1], dtype=self.dtype, bias_init=bias_init, name="down")(hidden)
        return Dropout(self.dropout)(outputs, train)


class EncoderBlock(nn.Module):
    """x + Attention(LayerNorm(x)), then x + MLP(LayerNorm(x)).

    Attributes:
        heads: attention heads.
        mlp_width: hidden width of the MLP.
        dropout: rate after attention and inside the MLP.
        attention_dropout: rate on the attention weights.
        stochastic_depth: rate at which this block's branches are dropped.
        dtype: arithmetic.
    """

    heads: int
    mlp_width: int
    dropout: float = 0.0
    attention_dropout: float = 0.0
    stochastic_depth: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch tokens width"],
        mask: Bool[Array, "#batch #heads #queries tokens"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch tokens width"]:
        branch = LayerNorm(self.dtype, name="norm_attention")(tokens)
        branch = Attention(self.heads, self.attention_dropout, self.dtype, name="attention")(branch, mask, train)
        branch = Dropout(self.dropout)(branch, train)
        tokens = tokens + Dropout(self.stochastic_depth, shared_axes=(1, 2))(branch, train)

        branch = LayerNorm(self.dtype, name="norm_mlp")(tokens)
        branch = MlpBlock(self.mlp_width, self.dropout, self.dtype, name="mlp")(branch, train)
        return tokens + Dropout(self.stochastic_depth, shared_axes=(1, 2))(branch, train)


class Encoder(nn.Module):
    """A stack of encoder blocks and the final LayerNorm (eq. 2-4).

    Attributes:
        depth: number of blocks.
        stochastic_depth: rate of the last block; it grows linearly from 0 at the first.
        others: as in `EncoderBlock`.
    """

    depth: int
    heads: int
    mlp_width: int
    dropout: float = 0.0
    attention_dropout: float = 0.0
    stochastic_depth: float = 0.0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch tokens width"],
        mask: Bool[Array, "#batch #heads #queries tokens"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch tokens width"]:
        for index in range(self.depth):
            tokens = EncoderBlock(
                heads=self.heads,
                mlp_width=self.mlp_width,
                dropout=self.dropout,
                attention_dropout=self.attention_dropout,
                stochastic_depth=self.stochastic_depth * index / max(self.depth - 1, 1),
                dtype=self.dtype,
                name=f"block_{index}",
            )(tokens, mask, train)
        return LayerNorm(self.dtype, name="norm")(tokens)
