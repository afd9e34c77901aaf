"""Masked patch prediction: the mean colour of corrupted patches (arXiv 2010.11929, appendix B.1.2)."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num

from vit_jax.models import masking
from vit_jax.models.checks import check_encoder
from vit_jax.models.dense import Dense
from vit_jax.models.vit import VisionTransformer, input_grid

LEVELS = 8  # of a channel: three bits
MASKED, SWAPPED = 0.8, 0.1  # shares of the corrupted patches; the rest is kept as it is


class Corruption(NamedTuple):
    """What is done to the patches of a batch.

    Attributes:
        corrupted: True where a patch is to be predicted.
        masked: True where the mask embedding stands in its place.
        sources: the number of the patch whose embedding stands there: its own, but where it is another's.
    """

    corrupted: Bool[Array, "batch patches"]
    masked: Bool[Array, "batch patches"]
    sources: Int[Array, "batch patches"]


def draw_corruption(keys: Key[Array, " batch"], patches: int, count: int) -> Corruption:
    """Corrupts `count` patches of every image: by 80 % masked, by 10 % swapped, by 10 % only to be predicted.

    Which of the three is drawn for each patch by itself. A swapped one gets the embedding of any other patch of the
    same image, so that nothing has to be fetched from another device.
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
    """The embeddings with the corrupted ones replaced."""
    swapped = masking.take(embeddings, corruption.sources)
    return jnp.where(corruption.masked[..., None], mask_embedding.astype(embeddings.dtype), swapped)


def mean_colours(
    patches: Num[Array, "batch patches pixels"], mean: tuple[float, ...], std: tuple[float, ...]
) -> Int[Array, "batch patches"]:
    """The mean colour of every patch in three bits a channel, as one number, first channel first: 512 for RGB.

    Args:
        patches: normalised, that is (x / 255 - mean) / std of each channel.
        mean: of each channel, in [0, 1].
        std: likewise.
    """
    pixels = patches.astype(jnp.float32).reshape(*patches.shape[:2], -1, len(mean))
    means = 255 * (pixels.mean(axis=2) * jnp.asarray(std) + jnp.asarray(mean))
    # A mean that was exactly a bound between two levels must not fall below it by the last bit of normalising.
    levels = jnp.clip(jnp.floor(jnp.round(1024 * means) / (1024 * 256 // LEVELS)), 0, LEVELS - 1).astype(jnp.int32)
    return (levels * jnp.asarray([LEVELS**power for power in reversed(range(len(mean)))])).sum(axis=-1)


class MaskedPatchPrediction(nn.Module):
    """A Vision Transformer that tells the mean colours of patches from the others.

    Its parameters are `backbone/...`, those of the Vision Transformer; `mask_embedding`; and `colours/...`, one linear
    layer on every patch's output.

    Attributes:
        backbone: a Vision Transformer without a head whose pooling is 'none'.
        mean: of each channel, by which images were normalised; in [0, 1].
        std: likewise.
        masked: share of the patches that are corrupted.

    Raises:
        ValueError: at construction, for a backbone of which not every token comes out, or that has a stem.
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
        """Logits of every patch's colour, in float32, and True where the patch was corrupted.

        Args:
            inputs: images, or patches as `patches.patchify` makes them.
            keys: by which an image's corruption is drawn; None for some.
            train: as of the backbone.
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
