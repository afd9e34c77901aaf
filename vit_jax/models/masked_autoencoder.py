"""The masked autoencoder: pixels of the patches that an encoder did not see (arXiv 2111.06377)."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, Num

from vit_jax.models import masking
from vit_jax.models.checks import check_encoder
from vit_jax.models.dense import Dense
from vit_jax.models.encoder import BlockOptions, Encoder
from vit_jax.models.positions import sine_cosine_2d
from vit_jax.models.vit import VisionTransformer, input_grid

EPSILON = 1e-6  # added to a patch's variance, as in the published code


class Decoder(nn.Module):
    """A narrow Transformer from the visible tokens to the pixels of all patches.

    Attributes:
        width: size of its tokens.
        depth: number of its blocks.
        options: what they have in common.
        grid: rows and columns of patches.
        pixels: values a patch.
    """

    width: int
    depth: int
    options: BlockOptions
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
        """Pixels in float32.

        Args:
            tokens: `extra` ones that stand nowhere in the image, then the visible patches in ascending order.
            hidden: True for the patches that are not among them.
            extra: class token and registers.
            train: as of the encoder.
        """
        dtype, products = self.options.dtype, self.options.matmul_dtype
        tokens = Dense(self.width, dtype=dtype, matmul_dtype=products, name="embedding")(tokens)
        mask = self.param("mask_embedding", nn.initializers.normal(0.02), (1, 1, self.width), jnp.float32)
        mask = jnp.broadcast_to(mask.astype(dtype), (len(tokens), 1, self.width))
        visible = jnp.concatenate([tokens[:, extra:], mask], axis=1)
        # A hidden patch reads the last of these, the mask embedding; a visible one its own.
        places = jnp.where(hidden, visible.shape[1] - 1, jnp.cumsum(~hidden, axis=1) - 1)
        patches = masking.take(visible, places) + sine_cosine_2d(*self.grid, self.width).astype(dtype)
        tokens = jnp.concatenate([tokens[:, :extra], patches], axis=1)
        tokens = Encoder(self.depth, self.options, name="encoder")(tokens, None, train)
        return Dense(self.pixels, name="pixels")(tokens[:, extra:].astype(jnp.float32))


class MaskedAutoencoder(nn.Module):
    """An encoder that sees some patches of an image, and a decoder that tells the pixels of the others.

    Its parameters are `backbone/...`, those of the Vision Transformer, and `decoder/...`. The decoder's positions are
    sines and cosines; the encoder's are its own.

    Attributes:
        backbone: a Vision Transformer without a head whose pooling is 'none'; positions act at its input.
        masked: share of the patches that it does not see.
        decoder_width: size of the decoder's tokens.
        decoder_depth: number of its blocks.
        decoder_heads: attention heads of each.
        decoder_mlp_width: hidden width of their MLPs.

    Raises:
        ValueError: at construction, for a backbone that cannot see some patches alone, or widths that do not fit.
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
                f"the decoder's width is {self.decoder_width}: a multiple of 4, for its positions, and of its "
                f"{self.decoder_heads} heads"
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        inputs: Num[Array, "batch height width channels"] | Num[Array, "batch patches pixels"],
        keys: Key[Array, " batch"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "batch patches patch_pixels"], Bool[Array, "batch patches"]]:
        """The pixels of every patch as the decoder has them, in float32, and True where the patch was hidden.

        Args:
            inputs: images, or patches as `patches.patchify` makes them.
            keys: by which an image's hidden patches are drawn; None for some.
            train: as of the backbone.
        """
        backbone, (rows, columns) = self.backbone, input_grid(self.backbone, inputs)
        count = masking.hidden_count(self.masked, rows * columns)
        keys = masking.default_keys(len(inputs)) if keys is None else keys
        hidden = masking.draw_hidden(keys, rows * columns, count)
        tokens = backbone(inputs, train=train, visible=masking.visible_places(hidden, count))
        pixels = inputs.shape[-1] * (backbone.patch_size**2 if inputs.ndim == 4 else 1)
        extra = int(backbone.class_token) + backbone.registers
        decoder = Decoder(
            self.decoder_width, self.decoder_depth, self._options(), (rows, columns), pixels, name="decoder"
        )
        return decoder(tokens, hidden, extra, train), hidden

    def _options(self) -> BlockOptions:
        """Of the decoder's blocks: compute dtype and attention backend are the backbone's."""
        backbone = self.backbone
        return BlockOptions(
            self.decoder_heads,
            self.decoder_mlp_width,
            gelu=backbone.gelu,
            dtype=backbone.dtype,
            attention_kernel=backbone.attention_kernel,
            matmul_dtype=backbone.matmul_dtype,
        )


def pixel_statistics(
    patches: Num[Array, "batch patches pixels"],
) -> tuple[Float[Array, "batch patches 1"], Float[Array, "batch patches 1"]]:
    """Mean and standard deviation of every patch over its pixels and channels, in float32.

    As in the published code the variance is the unbiased one, and a millionth is added to it.
    """
    patches = patches.astype(jnp.float32)
    mean = patches.mean(axis=-1, keepdims=True)
    squares = jnp.square(patches - mean).sum(axis=-1, keepdims=True)
    return mean, jnp.sqrt(squares / max(patches.shape[-1] - 1, 1) + EPSILON)


def normalize_patches(patches: Num[Array, "batch patches pixels"]) -> Float[Array, "batch patches pixels"]:
    """Every patch with its own mean taken off, divided by its own standard deviation (arXiv 2111.06377, section 3)."""
    mean, std = pixel_statistics(patches)
    return (patches.astype(jnp.float32) - mean) / std
