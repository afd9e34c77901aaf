"""Masked patch prediction: predicts the mean colour of corrupted patches (arXiv 2010.11929, appendix B.1.2)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num

from vit_jax.models import masking
from vit_jax.models.checks import check_encoder
from vit_jax.models.dense import Dense
from vit_jax.models.vit import VisionTransformer, input_grid

LEVELS = 8  # per channel: three bits
MASKED, SWAPPED = 0.8, 0.1  # fractions of the corrupted patches; the others keep their embedding


class Corruption(NamedTuple):
    """How the patches of a batch are corrupted.

    Attributes:
        corrupted: True if the patch is to be predicted.
        masked: True if its embedding is replaced by the mask embedding.
        sources: index of the patch whose embedding it gets: its own index unless it is swapped.
    """

    corrupted: Bool[Array, "batch patches"]
    masked: Bool[Array, "batch patches"]
    sources: Int[Array, "batch patches"]


def draw_corruption(keys: Key[Array, " batch"], patches: int, count: int) -> Corruption:
    """Corrupts `count` patches of every image: 80 % are masked, 10 % swapped, 10 % keep their embedding.

    This is drawn for each patch independently. A swapped patch gets the embedding of another patch of the same image,
    so that no communication between devices is needed.
    """
    which, kinds, others = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0)
    corrupted = masking.draw_hidden(which, patches, count)
    kind = jax.vmap(lambda key: jax.random.uniform(key, (patches,)))(kinds)
    distance = jax.vmap(lambda key: jax.random.randint(key, (patches,), 1, max(patches, 2)))(others)
    swapped = corrupted & (kind >= MASKED) & (kind < MASKED + SWAPPED)
    own = jnp.broadcast_to(jnp.arange(patches), corrupted.shape)
    return Corruption(corrupted, corrupted & (kind < MASKED), jnp.where(swapped, (own + distance) % patches, own))


def corrupt(
    embeddings: Float[Array, "batch patches width"], mask_embedding: Float[Array, "1 1 width"], corruption: Corruption
) -> Float[Array, "batch patches width"]:
    """The embeddings after masking and swapping."""
    masking.check_mask("corruption.masked", corruption.masked, embeddings.shape[:2])
    swapped = masking.take(embeddings, corruption.sources)
    return jnp.where(corruption.masked[..., None], mask_embedding.astype(embeddings.dtype), swapped)


def mean_colours(
    patches: Num[Array, "batch patches pixels"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Int[Array, "batch patches"]:
    """The mean colour of every patch with three bits per channel, as one integer: one of 512 for RGB.

    Args:
        patches: normalized pixels, (x / 255 - mean) / std for each channel.
        mean: one value per channel, in [0, 1].
        std: one value per channel.
    """
    pixels = patches.astype(jnp.float32).reshape(*patches.shape[:2], -1, len(mean))
    means = 255 * (pixels.mean(axis=2) * jnp.asarray(std) + jnp.asarray(mean))
    # Rounding: a mean exactly at a boundary between two levels must not fall below it by the normalization's last bit.
    levels = jnp.clip(jnp.floor(jnp.round(1024 * means) / (1024 * 256 // LEVELS)), 0, LEVELS - 1).astype(jnp.int32)
    return (levels * jnp.asarray([LEVELS**power for power in reversed(range(len(mean)))])).sum(axis=-1)


class MaskedPatchPrediction(nn.Module):
    """A Vision Transformer that predicts the mean colours of corrupted patches.

    Its parameters are `backbone/...`, those of the Vision Transformer; `mask_embedding`; and `colours/...`, a linear
    layer on the output of every patch.

    Attributes:
        backbone: a Vision Transformer without a head or stem, with pooling 'none'.
        mean: mean of each channel with which images were normalized, in [0, 1].
        std: standard deviation of each channel with which images were normalized.
        masked: fraction of the patches that are corrupted.

    Raises:
        ValueError: at construction, if the backbone does not return all tokens or has a stem.
    """

    backbone: VisionTransformer
    mean: tuple[float, ...]
    std: tuple[float, ...]
    masked: float = 0.5

    def __post_init__(self) -> None:
        check_encoder(self.backbone)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        inputs: Num[Array, "batch height width channels"] | Num[Array, "batch patches pixels"],
        keys: Key[Array, " batch"] | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "batch patches colours"], Bool[Array, "batch patches"]]:
        """Returns logits of the colour of every patch in float32, and a mask that is True for corrupted patches.

        Args:
            inputs: images, or patches as `patches.patchify` returns them.
            keys: one per image, from which its corruption is drawn; None for a fixed one.
            train: as in `VisionTransformer`.
        """
        rows, columns = input_grid(self.backbone, inputs)
        count = masking.hidden_count(self.masked, rows * columns)
        keys = masking.default_keys(len(inputs)) if keys is None else keys
        corruption = draw_corruption(keys, rows * columns, count)
        shape = (1, 1, self.backbone.width - self.backbone.position_width)
        embedding = self.param("mask_embedding", nn.initializers.normal(0.02), shape, jnp.float32)
        tokens = self.backbone(inputs, train=train, replace=lambda patches: corrupt(patches, embedding, corruption))
        patches = tokens[:, -rows * columns :]
        return Dense(LEVELS ** len(self.mean), name="colours")(patches), corruption.corrupted
