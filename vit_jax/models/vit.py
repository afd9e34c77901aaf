"""The Vision Transformer (arXiv 2010.11929)."""

import dataclasses
import math
from collections.abc import Callable, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int, Num

from vit_jax.models import masking
from vit_jax.models.checks import check
from vit_jax.models.dropout import Dropout
from vit_jax.models.encoder import BlockOptions, Encoder
from vit_jax.models.norm import LayerNorm
from vit_jax.models.patches import PatchEmbedding, grid_of
from vit_jax.models.pooling import POOLINGS, Head, Heads
from vit_jax.models.positions import POSITIONS, Place, Terms
from vit_jax.models.resnet import ResNetStem, stem_output


class VisionTransformer(nn.Module):
    """Embeds patches, encodes them, pools the tokens and classifies.

    Attributes:
        classes: number of logits; a mapping from names to numbers for several heads on the same features; None for no
            head: the features come out.
        patch_size: height and width of a patch, in pixels (of the stem's feature map, where there is a stem).
        width: size of a token.
        depth: number of encoder blocks.
        heads: attention heads a block; they share the width evenly.
        mlp_width: hidden width of the blocks' MLPs.
        class_token: whether a learned token stands before the patches.
        pooling: 'token' (the class token's output), 'mean' (over the patches' outputs), 'map' (attention pooling) or
            'none' (all tokens come out, and the head reads each).
        position: 'learned', 'learned_2d', 'sincos_2d', 'sinusoidal', 'none', 'relative' or 'rotary' (see `positions`).
        pre_logits: width of a Dense + tanh layer before the classifier; None for none.
        head_bias: what the biases of the heads' logits start at; -10 where each class is told from all others by itself
            (arXiv 2106.04560's code), since nearly all of them are not there.
        norm_after_pooling: whether the last LayerNorm acts on the mean of the patches and not on each token before it.
        dropout: rate after the position embedding and every dense layer but queries, keys and values.
        attention_dropout: rate on the attention weights.
        stochastic_depth: rate at which the last block's branches are dropped.
        dtype: arithmetic; parameters, LayerNorm statistics, softmax and head are float32.
        stochastic_depth_schedule: 'linear' (from 0 at the first block to the rate at the last) or 'constant'.
        registers: learned tokens between class token and patches that no head reads (arXiv 2309.16588).
        position_at: where positions act: 'input', 'layers' (in every layer, each with its own) or 'shared' (in every
            layer, the same); None for where the kind usually does: 'input' for tables, 'layers' for the last two.
        position_width: 0 where a table is added to the tokens; else so many of a token's `width` channels, the last,
            hold the (fixed) table, concatenated to an embedding of the patch in the other width - position_width.
        position_grid: patches a side of the grid whose coordinates 'sincos_2d' has, whatever the images' own is
            (that of training, say); None for the images' own.
        mlp: 'gelu', or 'swiglu' (of a gate and an MLP as wide as `mlp_width` each).
        gelu: 'tanh' or 'exact'.
        qkv_bias: whether queries, keys and values have a bias.
        qk_norm: whether queries and keys are normalised, each head by itself.
        layer_scale: what the learned factors on the residual branches' channels start at; None for no such factors.
        parallel: attention and MLP side by side instead of one after the other.
        layer_norm_epsilon: added to the variance.
        stem: bottleneck units of each stage of a ResNet before the patches; () for its root alone, None for no stem.
        stem_width: channels of its root.
        remat: compute blocks again in the backward pass instead of keeping what they computed: False or 'none', True or
            'full', 'dots' or 'dots_no_batch' (keep the results of all products, or of those with parameters).
        scan: one program for all blocks; their parameters are then stacked (see `stacking`).
        attention_kernel: backend of attention, of `attention_backends.BACKENDS`.
        matmul_dtype: of the operands of the blocks' dense products, where it is not `dtype` (see `dense`).

    Raises:
        ValueError: at construction, for fields that contradict each other.
    """

    classes: int | Mapping[str, int] | None
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
    stochastic_depth_schedule: str = "linear"
    registers: int = 0
    position_at: str | None = None
    position_width: int = 0
    mlp: str = "gelu"
    gelu: str = "tanh"
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: float | None = None
    parallel: bool = False
    layer_norm_epsilon: float = 1e-6
    stem: tuple[int, ...] | None = None
    stem_width: int = 64
    remat: bool | str = False
    scan: bool = False
    norm_after_pooling: bool = False
    attention_kernel: str = "plain"
    matmul_dtype: Dtype | None = None
    head_bias: float = 0.0
    position_grid: int | None = None

    def __post_init__(self) -> None:
        # Models are arguments of compiled functions, and so have to be hashable.
        if isinstance(self.classes, Mapping):
            self.classes = FrozenDict(self.classes)
        if isinstance(self.stem, list):
            self.stem = tuple(self.stem)
        self.remat = {"none": False, "full": True}.get(self.remat, self.remat)
        check(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        inputs: Num[Array, "batch height width channels"] | Num[Array, "batch patches pixels"],
        mask: Bool[Array, "#batch #heads #queries tokens"] | None = None,
        train: bool = False,
        grid: tuple[int, int] | None = None,
        replace: Callable[[jax.Array], jax.Array] | None = None,
        visible: Int[Array, "batch visible"] | None = None,
    ) -> Float[Array, "batch *outputs"] | dict[str, Float[Array, "batch *outputs"]]:
        """Logits in float32 [batch, classes], of images or of ready-made patches.

        With pooling 'none' they are [batch, tokens, classes]; with several heads, a dictionary of them; with none, the
        features [batch, width] or [batch, tokens, width].

        Args:
            inputs: images, or patches as `patches.patchify` makes them.
            mask: True where a token (third axis) may attend to another (fourth); class token and registers count first.
            train: dropout and stochastic depth are on; they draw from the generator 'dropout'.
            grid: rows and columns of ready-made patches; None where they make a square or their order is enough.
            replace: of pre-training, what is done to the patches' embeddings before they get a position.
            visible: likewise, the numbers of the patches that are encoded, each with its own position; None for all.

        Raises:
            ValueError: the patch does not divide the images, or patches are given without a grid they make up; or some
                patches alone shall be visible to a model whose positions act in the layers.
        """
        grid = input_grid(self, inputs, grid)
        if self.stem is not None:
            inputs = ResNetStem(self.stem, self.stem_width, self.dtype, name="stem")(inputs)
        width = self.width - self.position_width
        tokens = PatchEmbedding(width, self.patch_size, self.dtype, name="embedding")(inputs.astype(self.dtype))
        if replace is not None:
            tokens = replace(tokens)
        place, at = self._place(grid), position_at(self)
        positions = Terms() if at == "layers" else POSITIONS[self.position](place, name="positions")()
        tokens = self._join(tokens, positions)
        if at == "input" and not self.position_width and positions.table is not None:
            tokens = tokens + positions.table.astype(tokens.dtype)
        if visible is not None:
            tokens = _only_visible(tokens, visible, place.extra, at)
        tokens = Dropout(self.dropout)(tokens, train)
        self.sow("intermediates", "embedded", tokens)
        tokens = self._encoder(place)(tokens, mask, train, positions if at == "shared" else Terms())
        features = POOLINGS[self.pooling](place.extra, self._options(), name="pooling")(tokens)
        if self.norm_after_pooling:
            features = LayerNorm(self.dtype, self.layer_norm_epsilon, name="norm")(features)
        if self.classes is None:
            return features.astype(jnp.float32)
        head = Heads if isinstance(self.classes, Mapping) else Head
        return head(self.classes, self.pre_logits, self.head_bias, name="head")(features)

    def _place(self, grid: tuple[int, int]) -> Place:
        width = self.position_width or self.width
        size = self.width // self.heads
        return Place(*grid, int(self.class_token), self.registers, width, size, self.heads, self.position_grid)

    def _join(self, tokens: jax.Array, positions: Terms) -> jax.Array:
        """The concatenated position, where there is one, then class token and registers before the patches."""
        batch = tokens.shape[0]
        before = []
        if self.position_width:
            table = positions.table[:, -tokens.shape[1] :].astype(tokens.dtype)
            tokens = jnp.concatenate([tokens, jnp.broadcast_to(table, (batch, *table.shape[1:]))], axis=-1)
        if self.class_token:
            before += [self.param("class_token", nn.initializers.zeros, (1, 1, self.width), jnp.float32)]
        if self.registers:
            # Not zero: registers that start as the same would stay the same.
            normal, shape = nn.initializers.normal(0.02), (1, self.registers, self.width)
            before += [self.param("registers", normal, shape, jnp.float32)]
        before = [jnp.broadcast_to(token.astype(self.dtype), (batch, *token.shape[1:])) for token in before]
        return jnp.concatenate([*before, tokens], axis=1) if before else tokens

    def _options(self) -> BlockOptions:
        return BlockOptions(**{field.name: getattr(self, field.name) for field in dataclasses.fields(BlockOptions)})

    def _encoder(self, place: Place) -> Encoder:
        own = self.position if position_at(self) == "layers" else None
        return Encoder(
            depth=self.depth,
            options=self._options(),
            stochastic_depth=self.stochastic_depth,
            stochastic_depth_schedule=self.stochastic_depth_schedule,
            position=own,
            place=place if own else None,
            remat=self.remat,
            scan=self.scan,
            norm=not self.norm_after_pooling,
            name="encoder",
        )


def position_at(model: VisionTransformer) -> str:
    """Where the model's positions act: 'input', 'layers' or 'shared'."""
    return model.position_at or POSITIONS[model.position].at[0]


def token_grid(model: VisionTransformer, image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the patches that the model makes of images of (height, width) `image_size`.

    Raises:
        ValueError: the patch does not divide the image (or the stem's feature map).
    """
    if model.stem is None:
        return grid_of(image_size, model.patch_size)
    height, width, _ = stem_output(model.stem, model.stem_width, image_size)
    try:
        return grid_of((height, width), model.patch_size)
    except ValueError as error:
        raise ValueError(
            f"of an image of {image_size[0]}x{image_size[1]} the stem leaves {height}x{width}: {error}"
        ) from None


def input_grid(model: VisionTransformer, inputs: jax.Array, grid: tuple[int, int] | None = None) -> tuple[int, int]:
    """Rows and columns of patches of what the model is called with.

    Raises:
        ValueError: as in `VisionTransformer.__call__`.
    """
    if inputs.ndim == 4:
        return token_grid(model, inputs.shape[1:3])
    return _grid_of_patches(model, inputs.shape[1], grid)


def _only_visible(tokens: jax.Array, visible: jax.Array, extra: int, at: str) -> jax.Array:
    """Class token and registers, and of the patches those that are visible."""
    if at != "input":
        raise ValueError(f"positions act at {at!r}, and so need all patches: some alone can be seen with 'input'")
    return jnp.concatenate([tokens[:, :extra], masking.take(tokens[:, extra:], visible)], axis=1)


def _grid_of_patches(model: VisionTransformer, count: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    if model.stem is not None:
        raise ValueError("a model with a stem takes images [batch, height, width, channels], not ready-made patches")
    if grid is not None:
        if grid[0] * grid[1] != count:
            raise ValueError(f"a grid of {grid[0]}x{grid[1]} is given for {count} patches")
        return grid
    side = math.isqrt(count)
    if side * side == count:
        return side, side
    if POSITIONS[model.position].needs_grid:
        raise ValueError(
            f"{count} patches make no square, and position {model.position!r} has to know their rows and columns: "
            "give them as grid=(rows, columns)"
        )
    return 1, count
