"""Pooling of tokens into one feature vector per image, and the classifier head."""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.models.attention_backends import observed, plain
from vit_jax.models.block_config import BlockConfig
from vit_jax.models.dense import Dense, stacked
from vit_jax.models.mlp import MlpBlock


class Pooling(nn.Module):
    """Base class of the poolings: tokens to features.

    Attributes:
        extra: number of tokens before the patches: class token and registers.
        config: options of the encoder's blocks, which attention pooling shares.

    A class says which tokens it needs before the patches: `needs_class_token`, `needs_register`.
    """

    extra: int
    config: BlockConfig
    needs_class_token = False
    needs_register = False


class TokenPooling(Pooling):
    """The class token's output (arXiv 2010.11929, eq. 4)."""

    needs_class_token = True

    def __call__(self, tokens: Float[Array, "batch tokens width"]) -> Float[Array, "batch width"]:
        return tokens[:, 0]


class MeanPooling(Pooling):
    """The mean over the patches; without a class token, 'gap' of the published code (appendix D.3)."""

    def __call__(self, tokens: Float[Array, "batch tokens width"]) -> Float[Array, "batch width"]:
        return tokens[:, self.extra :].mean(axis=1)


class TokenAndMeanPooling(Pooling):
    """The class token's output and the mean over the patches, concatenated (arXiv 2304.07193, appendix B.3)."""

    needs_class_token = True

    def __call__(self, tokens: Float[Array, "batch tokens width"]) -> Float[Array, "batch twice_width"]:
        return jnp.concatenate([tokens[:, 0], tokens[:, self.extra :].mean(axis=1)], axis=-1)


class TokenAndRegisterPooling(Pooling):
    """The outputs of the class token and the first register, concatenated (arXiv 2012.12877: distillation token)."""

    needs_class_token = True
    needs_register = True

    def __call__(self, tokens: Float[Array, "batch tokens width"]) -> Float[Array, "batch twice_width"]:
        return jnp.concatenate([tokens[:, 0], tokens[:, 1]], axis=-1)


class AttentionPooling(Pooling):
    """A learned query attends to all tokens; an MLP with a residual follows ('MAP' of arXiv 2106.04560, appendix).

    As in big_vision: as wide an MLP as in the encoder, and a norm before the MLP only.

    Attributes:
        heads: number of attention heads; None for as many as in the encoder.
    """

    heads: int | None = None

    @nn.compact
    def __call__(self, tokens: Float[Array, "batch tokens width"]) -> Float[Array, "batch width"]:
        config, (batch, count, width) = self.config, tokens.shape
        dtype, heads = config.dtype, self.heads or config.heads
        size = width // heads
        probe = self.param("probe", nn.initializers.xavier_uniform(), (1, 1, width), jnp.float32)
        queries = Dense(width, dtype=dtype, name="query")(jnp.asarray(probe)).reshape(1, 1, heads, size)
        kernel_init = stacked(nn.initializers.xavier_uniform(), 2)
        fused = Dense(2 * width, dtype=dtype, kernel_init=kernel_init, name="key_value")(tokens)
        keys, values = jnp.moveaxis(fused.reshape(batch, count, 2, heads, size), 2, 0)
        queries = jnp.broadcast_to(queries, (batch, *queries.shape[1:]))
        mixed = plain(queries, keys, values, on_weights=partial(observed, self)).reshape(batch, 1, width)
        pooled = Dense(width, dtype=dtype, name="out")(mixed)
        normed = config.make_norm("norm")(pooled)
        # Always the GELU MLP, without dropout, and in the compute dtype: one token per image takes hardly any time.
        mlp = MlpBlock(dataclasses.replace(config, dropout=0.0, mlp_norm=False, matmul_dtype=None), name="mlp")
        return (pooled + mlp(normed))[:, 0]

    @nn.nowrap
    def matmul_flops(self, shape: tuple[int, ...]) -> int:
        """FLOPs of scores and weighted means of one query, for tokens of this shape."""
        return 2 * 2 * math.prod(shape)


class NoPooling(Pooling):
    """No pooling: all tokens, class token and registers first."""

    def __call__(self, tokens: Float[Array, "batch tokens width"]) -> Float[Array, "batch tokens width"]:
        return tokens


POOLINGS: dict[str, type[Pooling]] = {
    "token": TokenPooling,
    "mean": MeanPooling,
    "token_mean": TokenAndMeanPooling,
    "token_register": TokenAndRegisterPooling,
    "map": AttentionPooling,
    "none": NoPooling,
}


class Head(nn.Module):
    """The linear classifier, in float32, with zero kernels initially (arXiv 2010.11929, section 3.2).

    Attributes:
        classes: number of logits.
        pre_logits: width of a Dense + tanh layer before the logits, as in pre-training; None for no such layer.
        bias: initial value of the biases.
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
    """Several classifiers on the same features.

    Attributes:
        classes: number of logits of each classifier, by its name.
        pre_logits: as in `Head`; each classifier has its own layer.
        bias: as in `Head`.
    """

    classes: Mapping[str, int]
    pre_logits: int | None = None
    bias: float = 0.0

    @nn.compact
    def __call__(self, features: Float[Array, "*leading width"]) -> dict[str, Float[Array, "*leading _"]]:
        heads = {name: Head(count, self.pre_logits, self.bias, name=name) for name, count in self.classes.items()}
        return {name: head(features) for name, head in heads.items()}
