"""From tokens to one vector an image, and from there to logits."""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from vit_jax.models.attention_backends import attention_weights
from vit_jax.models.dense import Dense, stacked
from vit_jax.models.encoder import BlockOptions
from vit_jax.models.mlp import MlpBlock
from vit_jax.models.norm import LayerNorm


class Pooling(nn.Module):
    """A way from tokens to features.

    Attributes:
        extra: tokens that stand before the patches: class token, registers.
        options: of the encoder's blocks, which attention pooling is built like.
    """

    extra: int
    options: BlockOptions


class TokenPooling(Pooling):
    """The class token's output (arXiv 2010.11929, eq. 4)."""

    def __call__(self, tokens: Float[Array, "batch tokens width"]) -> Float[Array, "batch width"]:
        return tokens[:, 0]


class MeanPooling(Pooling):
    """The mean of the patches' outputs: with no class token, the published code's 'gap' (appendix D.3)."""

    def __call__(self, tokens: Float[Array, "batch tokens width"]) -> Float[Array, "batch width"]:
        return tokens[:, self.extra :].mean(axis=1)


class AttentionPooling(Pooling):
    """A learned query attends to all tokens, then an MLP with its residual (arXiv 2106.04560, appendix; 'MAP').

    The form is big_vision's: heads and MLP as wide as the encoder's, LayerNorm before the MLP alone.
    """

    @nn.compact
    def __call__(self, tokens: Float[Array, "batch tokens width"]) -> Float[Array, "batch width"]:
        options, (batch, count, width) = self.options, tokens.shape
        dtype: Dtype = options.dtype
        size = width // options.heads
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, width), jnp.float32)
        queries = Dense(width, dtype=dtype, name="query")(jnp.asarray(probe)).reshape(1, 1, options.heads, size)
        kernel_init = stacked(nn.initializers.xavier_uniform(), 2)
        fused = Dense(2 * width, dtype=dtype, kernel_init=kernel_init, name="key_value")(tokens)
        keys, values = jnp.moveaxis(fused.reshape(batch, count, 2, options.heads, size), 2, 0)
        weights = attention_weights(jnp.broadcast_to(queries, (batch, *queries.shape[1:])), keys)
        self.sow("intermediates", "weights", weights)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights.astype(dtype), values).reshape(batch, 1, width)
        pooled = Dense(width, dtype=dtype, name="out")(mixed)
        normed = LayerNorm(dtype, options.layer_norm_epsilon, name="norm")(pooled)
        return (pooled + MlpBlock(options.mlp_width, dtype=dtype, gelu=options.gelu, name="mlp")(normed))[:, 0]


class NoPooling(Pooling):
    """All tokens, extra ones first."""

    def __call__(self, tokens: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        return tokens


POOLINGS: dict[str, type[Pooling]] = {
    "token": TokenPooling,
    "mean": MeanPooling,
    "map": AttentionPooling,
    "none": NoPooling,
}


class Head(nn.Module):
    """The linear classifier, zero at the start (arXiv 2010.11929, section 3.2), in float32.

    Attributes:
        classes: number of logits.
        pre_logits: width of a Dense + tanh layer before it, as in pre-training; None for none.
        bias: what its biases start at.
    """

    classes: int
    pre_logits: int | None = None
    bias: float = 0.0

    @nn.compact
    def __call__(self, features: Float[Array, "*leading width"]) -> Float[Array, "*leading classes"]:
        features = features.astype(jnp.float32)
        if self.pre_logits is not None:
            features = jnp.tanh(
                Dense(self.pre_logits, kernel_init=nn.initializers.lecun_normal(), name="pre_logits")(features)
            )
        zeros, constant = nn.initializers.zeros, nn.initializers.constant(self.bias)
        return Dense(self.classes, kernel_init=zeros, bias_init=constant, name="logits")(features)


class Heads(nn.Module):
    """Several classifiers of the same features, each by its name.

    Attributes:
        classes: number of logits of each.
        pre_logits: as in `Head`; each has its own.
        bias: as in `Head`.
    """

    classes: Mapping[str, int]
    pre_logits: int | None = None
    bias: float = 0.0

    @nn.compact
    def __call__(self, features: Float[Array, "*leading width"]) -> dict[str, Float[Array, "*leading _"]]:
        heads = {name: Head(count, self.pre_logits, self.bias, name=name) for name, count in self.classes.items()}
        return {name: head(features) for name, head in heads.items()}


class HeadAlone(nn.Module):
    """The head of a model without the model: logits of stored features, by the same parameters `head/...`.

    Attributes:
        classes: as of `VisionTransformer`, but not None.
        pre_logits: likewise.
    """

    classes: int | Mapping[str, int]
    pre_logits: int | None = None

    @nn.compact
    def __call__(
        self, features: Float[Array, "*leading width"], train: bool = False
    ) -> Float[Array, "*leading classes"] | dict[str, Float[Array, "*leading _"]]:
        head = Heads if isinstance(self.classes, Mapping) else Head
        return head(self.classes, self.pre_logits, name="head")(features)
