"""Text encoders that were trained together with a Vision Transformer, and classification by the texts that they embed.

CLIP (arXiv 2103.00020) and SigLIP (arXiv 2303.15343) embed images and texts in one space. The scores of an image for
several texts are cosine similarities, scaled: a linear classifier of normalized features (section 3.1.2).
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vit_jax.models.block_config import BlockConfig, option
from vit_jax.models.dense import Dense
from vit_jax.models.encoder import Encoder
from vit_jax.models.pooling import Head
from vit_jax.models.vit import VisionTransformer


class TextTransformer(nn.Module):
    """Embeds texts, given as token ids.

    Attributes:
        config: options of the blocks.
        vocabulary: number of token ids.
        length: maximum number of tokens of a text.
        width: of the token embeddings.
        depth: number of blocks.
        features: size of the result.
        causal: True: a token attends to itself and those before it, and the features are those of the end token (CLIP).
            False: every token attends to all, padding included, and the features are those of the last one (SigLIP).
        end_token: id of the end token, of which the first in a text counts; None for the largest id of each text.
    """

    config: BlockConfig
    vocabulary: int
    length: int
    width: int
    depth: int
    features: int
    causal: bool = True
    end_token: int | None = None

    @nn.compact
    def __call__(self, ids: Int[Array, "batch tokens"]) -> Float[Array, "batch features"]:
        """Returns the features of each text, not normalized, in float32."""
        count, normal = ids.shape[1], nn.initializers.normal(0.02)
        table = self.param("token_embedding", normal, (self.vocabulary, self.width), jnp.float32)
        positions = self.param("token_positions", normal, (1, self.length, self.width), jnp.float32)
        tokens = (jnp.asarray(table)[ids] + jnp.asarray(positions)[:, :count]).astype(self.config.dtype)
        mask = jnp.tril(jnp.ones((1, 1, count, count), bool)) if self.causal else None
        tokens = Encoder(self.depth, self.config, name="encoder")(tokens, mask)
        if self.causal:
            is_end = ids if self.end_token is None else ids == self.end_token
            features = tokens[jnp.arange(len(ids)), is_end.argmax(axis=1)]
        else:
            features = tokens[:, -1]
        return Head(self.features, name="head")(features)


class CosineHead(nn.Module):
    """Logits that are linear in the features at length 1, after a projection without a bias.

    Attributes:
        classes: number of logits.
        projection: size of the projected features; None for no projection.
    """

    classes: int
    projection: int | None = None

    @nn.compact
    def __call__(self, features: Float[Array, "*leading width"]) -> Float[Array, "*leading classes"]:
        features = features.astype(jnp.float32)
        if self.projection is not None:
            features = Dense(self.projection, use_bias=False, name="projection")(features)
        return Dense(self.classes, name="logits")(unit_length(features))


class ZeroShotTransformer(VisionTransformer):
    """A Vision Transformer whose head compares its features with those of texts.

    Attributes:
        projection: size of the features that are compared; None for those of the pooling.
    """

    projection: int | None = option(None, affects="head")

    @nn.nowrap
    def make_head(self) -> nn.Module:
        """The head, with the texts' features as its kernel."""
        return CosineHead(self.classes, self.projection, name="head")


def unit_length(features: Float[Array, "*leading width"]) -> Float[Array, "*leading width"]:
    """Returns the features divided by their lengths."""
    return features / jnp.linalg.norm(features, axis=-1, keepdims=True)
