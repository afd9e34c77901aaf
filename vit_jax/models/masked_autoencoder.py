"""The masked autoencoder: predicts the pixels of the patches that are hidden from the encoder (arXiv 2111.06377)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, Num

from vit_jax.models import masking
from vit_jax.models.block_config import BlockConfig
from vit_jax.models.checks import check_encoder
from vit_jax.models.dense import Dense
from vit_jax.models.encoder import Encoder
from vit_jax.models.positions import sine_cosine_2d
from vit_jax.models.vit import VisionTransformer, extra_tokens, input_grid

VARIANCE_EPSILON = 1e-6  # added to the variance of a patch, as in the published code


class Decoder(nn.Module):
    """A narrow Transformer from the visible tokens to the pixels of all patches.

    Attributes:
        width: size of its tokens.
        depth: number of blocks.
        config: options of the blocks.
        grid: rows and columns of patches.
        pixels: number of values per patch.
    """

    width: int
    depth: int
    config: BlockConfig
    grid: tuple[int, int]
    pixels: int

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch tokens encoder_width"],
        hidden: Bool[Array, "batch patches"],
        extra: int,
        train: bool = False,
    ) -> Float[Array, "batch patches pixels"]:
        """Returns predicted pixels in float32.

        Args:
            tokens: class token and registers, if any, then the visible patches in ascending order.
            hidden: True for the patches that are not among the tokens.
            extra: number of tokens before the patches.
            train: as in `Encoder`.
        """
        masking.check_mask("hidden", hidden, (len(tokens), self.grid[0] * self.grid[1]))
        dtype, matmul_dtype = self.config.dtype, self.config.matmul_dtype
        tokens = Dense(self.width, dtype=dtype, matmul_dtype=matmul_dtype, name="embedding")(tokens)
        mask = self.param("mask_embedding", nn.initializers.normal(0.02), (1, 1, self.width), jnp.float32)
        mask = jnp.broadcast_to(mask.astype(dtype), (len(tokens), 1, self.width))
        visible = jnp.concatenate([tokens[:, extra:], mask], axis=1)
        # The mask embedding is the last one: the input for every hidden patch.
        indices = jnp.where(hidden, visible.shape[1] - 1, jnp.cumsum(~hidden, axis=1) - 1)
        patches = masking.take(visible, indices) + sine_cosine_2d(*self.grid, self.width).astype(dtype)
        tokens = jnp.concatenate([tokens[:, :extra], patches], axis=1)
        tokens = Encoder(self.depth, self.config, name="encoder")(tokens, None, train)
        return Dense(self.pixels, name="pixels")(tokens[:, extra:].astype(jnp.float32))


class MaskedAutoencoder(nn.Module):
    """An encoder of the visible patches of an image, and a decoder that predicts the pixels of the hidden ones.

    Its parameters are `backbone/...`, those of the Vision Transformer, and `decoder/...`. The decoder uses 'sincos_2d'
    positions, whatever the encoder uses.

    Attributes:
        backbone: a Vision Transformer without a head, with pooling 'none' and positions at the input.
        masked: fraction of the patches that are hidden from the encoder.
        decoder_width: size of the decoder's tokens.
        decoder_depth: number of decoder blocks.
        decoder_heads: number of attention heads of the decoder blocks.
        decoder_mlp_width: hidden width of the decoder blocks' MLPs.

    Raises:
        ValueError: at construction, if the backbone cannot encode a part of the patches or the decoder's width is not
            allowed.
    """

    backbone: VisionTransformer
    masked: float = 0.75
    decoder_width: int = 128
    decoder_depth: int = 2
    decoder_heads: int = 4
    decoder_mlp_width: int = 512

    def __post_init__(self) -> None:
        check_encoder(self.backbone, positions_at_input=True)
        if self.decoder_width % self.decoder_heads or self.decoder_width % 4:
            raise ValueError(
                f"decoder_width is {self.decoder_width}: it must be a multiple of 4, for its positions, and of the "
                f"{self.decoder_heads} decoder heads"
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        inputs: Num[Array, "batch height width channels"] | Num[Array, "batch patches pixels"],
        keys: Key[Array, " batch"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "batch patches patch_pixels"], Bool[Array, "batch patches"]]:
        """Returns the predicted pixels of every patch in float32, and a mask that is True for hidden patches.

        Args:
            inputs: images, or patches as `patches.patchify` returns them.
            keys: one per image, from which its hidden patches are drawn; None for fixed ones.
            train: as in `VisionTransformer`.
        """
        backbone, (rows, columns) = self.backbone, input_grid(self.backbone, inputs)
        count = masking.hidden_count(self.masked, rows * columns)
        keys = masking.default_keys(len(inputs)) if keys is None else keys
        hidden = masking.draw_hidden(keys, rows * columns, count)
        tokens = backbone(inputs, train=train, visible=masking.visible_indices(hidden, count))
        pixels = inputs.shape[-1] * (backbone.patch_size**2 if inputs.ndim == 4 else 1)
        config = self._decoder_config()
        decoder = Decoder(self.decoder_width, self.decoder_depth, config, (rows, columns), pixels, name="decoder")
        return decoder(tokens, hidden, extra_tokens(backbone), train), hidden

    def _decoder_config(self) -> BlockConfig:
        """Plain blocks with the backbone's GELU, compute dtype and attention backend."""
        backbone = self.backbone
        return BlockConfig(
            heads=self.decoder_heads,
            mlp_width=self.decoder_mlp_width,
            gelu=backbone.gelu,
            dtype=backbone.dtype,
            attention_kernel=backbone.attention_kernel,
            matmul_dtype=backbone.matmul_dtype,
        )


def pixel_statistics(
    patches: Num[Array, "batch patches pixels"],
) -> tuple[Float[Array, "batch patches 1"], Float[Array, "batch patches 1"]]:
    """Mean and standard deviation of every patch over its pixels and channels, in float32.

    As in the published code, the variance is the unbiased estimate plus 1e-6.
    """
    patches = patches.astype(jnp.float32)
    mean = patches.mean(axis=-1, keepdims=True)
    squares = jnp.square(patches - mean).sum(axis=-1, keepdims=True)
    return mean, jnp.sqrt(squares / max(patches.shape[-1] - 1, 1) + VARIANCE_EPSILON)


def normalize_patches(patches: Num[Array, "batch patches pixels"]) -> Float[Array, "batch patches pixels"]:
    """Every patch minus its mean, divided by its standard deviation (arXiv 2111.06377, section 3)."""
    mean, std = pixel_statistics(patches)
    return (patches.astype(jnp.float32) - mean) / std
