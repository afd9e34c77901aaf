"""The Vision Transformer (arXiv 2010.11929)."""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Num

from vit_jax.models.dropout import Dropout
from vit_jax.models.encoder import Encoder
from vit_jax.models.patches import PatchEmbedding
from vit_jax.models.pooling import POOLINGS, Head
from vit_jax.models.positions import LearnedPositions


class VisionTransformer(nn.Module):
    """Embeds patches, encodes them, pools the tokens and classifies.

    Attributes:
        classes: number of logits.
        patch_size: height and width of a patch, in pixels.
        width: size of a token.
        depth: number of encoder blocks.
        heads: attention heads a block; they share the width evenly.
        mlp_width: hidden width of the blocks' MLPs.
        class_token: whether a learned token stands before the patches.
        pooling: 'token' (the class token's output) or 'mean' (over the patches' outputs).
        position: 'learned' (a table added at the input) or 'none'.
        pre_logits: width of a Dense + tanh layer before the classifier; None for none.
        dropout: rate after the position embedding and every dense layer but queries, keys and values.
        attention_dropout: rate on the attention weights.
        stochastic_depth: rate at which the last block's branches are dropped; grows linearly from 0.
        dtype: arithmetic; parameters, LayerNorm statistics, softmax and head are float32.

    Raises:
        ValueError: at construction, for fields that contradict each other.
    """

    classes: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    class_token: bool = True
    pooling: str = "token"
    position: str = "learned"
    pre_logits: int | None = None
    dropout: float = 0.0
    attention_dropout: float = 0.0
    stochastic_depth: float = 0.0
    dtype: Dtype = jnp.float32

    def __post_init__(self) -> None:
        check(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        inputs: Num[Array, "batch height width channels"] | Num[Array, "batch patches pixels"],
        mask: Bool[Array, "#batch #heads #queries tokens"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch classes"]:
        """Logits in float32, of images or of ready-made patches.

        Args:
            inputs: images, or patches as `patches.patchify` makes them.
            mask: True where a token (third axis) may attend to another (fourth); the class token counts first.
            train: dropout and stochastic depth are on; they draw from the generator 'dropout'.
        """
        tokens = PatchEmbedding(self.width, self.patch_size, self.dtype, name="embedding")(inputs.astype(self.dtype))
        if self.class_token:
            token = self.param("class_token", nn.initializers.zeros, (1, 1, self.width), jnp.float32)
            token = jnp.broadcast_to(token.astype(self.dtype), (tokens.shape[0], 1, self.width))
            tokens = jnp.concatenate([token, tokens], axis=1)
        if self.position == "learned":
            tokens = LearnedPositions(name="positions")(tokens)
        tokens = Dropout(self.dropout)(tokens, train)
        tokens = Encoder(
            depth=self.depth,
            heads=self.heads,
            mlp_width=self.mlp_width,
            dropout=self.dropout,
            attention_dropout=self.attention_dropout,
            stochastic_depth=self.stochastic_depth,
            dtype=self.dtype,
            name="encoder",
        )(tokens, mask, train)
        features = POOLINGS[self.pooling](tokens, int(self.class_token))
        return Head(self.classes, self.pre_logits, name="head")(features)


def check(model: VisionTransformer) -> None:
    """Raises ValueError, saying what would be allowed, for fields that no model can have together."""
    for field in ("classes", "patch_size", "width", "depth", "heads", "mlp_width"):
        if getattr(model, field) < 1:
            raise ValueError(f"{field} is {getattr(model, field)}: it must be at least 1")
    for field in ("dropout", "attention_dropout", "stochastic_depth"):
        if not 0 <= getattr(model, field) < 1:
            raise ValueError(f"{field} is {getattr(model, field)}: a rate is at least 0 and below 1")
    if model.width % model.heads:
        near = [heads for heads in range(1, model.width + 1) if model.width % heads == 0 and heads <= 2 * model.heads]
        raise ValueError(f"heads is {model.heads}, which does not divide the width {model.width}: {near} would")
    if model.pooling not in POOLINGS:
        raise ValueError(f"pooling is {model.pooling!r}: one of {', '.join(POOLINGS)}")
    if model.pooling == "token" and not model.class_token:
        raise ValueError("pooling is 'token' but class_token is False: set class_token, or pool by 'mean'")
    if model.position not in ("learned", "none"):
        raise ValueError(f"position is {model.position!r}: one of learned, none")
