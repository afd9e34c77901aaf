"""The Vision Transformer (arXiv 2010.11929)."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from flax.errors import ScopeParamShapeError
from jaxtyping import Array, Bool, Float, Int, Num

from vit_jax import arguments
from vit_jax.models import masking
from vit_jax.models.block_config import BlockConfig, option
from vit_jax.models.checks import check, convert, integer_of
from vit_jax.models.dropout import Dropout
from vit_jax.models.encoder import Encoder
from vit_jax.models.patches import PatchEmbedding, grid_of
from vit_jax.models.pooling import POOLINGS, AttentionPooling, Head, Heads
from vit_jax.models.positions import POSITIONS, Terms, TokenLayout, where_applied
from vit_jax.models.resnet import ResNetStem, stem_output


def is_attention_pooling(pooling: str) -> bool:
    """Whether a pooling has parameters."""
    return POOLINGS.get(pooling) is AttentionPooling


class VisionTransformer(nn.Module, BlockConfig, kw_only=True):
    """Embeds patches, encodes them, pools the tokens and classifies.

    Its options are those of `BlockConfig`, shared by all blocks, and these:

    Attributes:
        classes: number of logits; a mapping from names to numbers for several heads on the same features; None for no
            head: the model then returns features.
        patch_size: height and width of a patch, in pixels (of the stem's feature map, if there is a stem).
        width: size of a token.
        depth: number of encoder blocks.
        class_token: whether a learned token precedes the patches.
        pooling: 'token' (output of the class token), 'mean' (over the outputs of the patches), 'token_mean' (both,
            concatenated), 'token_register' (outputs of class token and first register, concatenated), 'map' (attention
            pooling) or 'none' (all tokens are returned, and the head is applied to each).
        position: position embedding, a key of `positions.POSITIONS`.
        pre_logits: width of a Dense + tanh layer before the classifier; None for no such layer.
        head_bias: initial value of the biases of the logits; -10 suits a sigmoid loss, for which nearly all classes are
            absent (arXiv 2106.04560's code).
        norm_after_pooling: whether the final LayerNorm is applied to the mean of the patches instead of to each token
            before pooling.
        stochastic_depth: rate at which the residual branches of the last block are dropped.
        stochastic_depth_schedule: 'linear' (from 0 at the first block to the rate at the last) or 'constant'.
        registers: number of learned tokens between class token and patches that no head reads (arXiv 2309.16588).
        position_at: where the position embedding is applied: 'input', 'layers' (in every layer, each with its own) or
            'shared' (in every layer, the same); None for the default of its kind: 'input' for tables, 'layers' for
            'relative' and 'rotary'.
        position_width: 0 if a table is added to the tokens. Otherwise a fixed table of this width is concatenated to
            patch embeddings of the remaining width - position_width channels.
        position_grid: rows (and columns) of the grid whose coordinates 'sincos_2d', 'eva02' and 'pe' use for images of
            any size, such as the grid of training; None for the grid of the images themselves.
        input_norm: a norm before the blocks: of the patch embeddings, before the position embedding ('patches'); of all
            tokens, after it ('tokens', as in CLIP); None for no such norm.
        final_norm: whether a norm follows the blocks.
        pool_heads: number of heads of attention pooling; None for as many as in the blocks.
        stem: bottleneck units per stage of a ResNet before the patches; () for its root only, None for no stem.
        stem_width: channels of the root of the stem.
        remat: rematerialisation: False or 'none', True or 'full', 'dots' or 'dots_no_batch' (see `Encoder`).
        scan: whether one compiled block is run `depth` times; parameters are then stacked (see `stacking`).

    `dropout` is also applied after the position embedding.

    Raises:
        TypeError: at construction, if an option has a value of the wrong type.
        ValueError: at construction, if options are out of range or contradict each other.
    """

    classes: int | Mapping[str, int] | None = option(affects="head")
    patch_size: int = option(affects="parameters")
    width: int = option(affects="parameters")
    depth: int = option(affects="parameters")
    class_token: bool = option(True, affects="parameters")
    pooling: str = option("token", affects="function", parameters_by=is_attention_pooling)
    position: str = option("learned", affects="parameters")
    pre_logits: int | None = option(Head.pre_logits, affects="head")
    head_bias: float = option(Head.bias, affects="training")
    norm_after_pooling: bool = option(False, affects="parameters")
    stochastic_depth: float = option(Encoder.stochastic_depth, affects="training")
    stochastic_depth_schedule: str = option(Encoder.stochastic_depth_schedule, affects="training")
    registers: int = option(0, affects="parameters")
    position_at: str | None = option(None, affects="parameters")
    position_width: int = option(0, affects="parameters")
    position_grid: int | None = option(None, affects="function")
    input_norm: str | None = option(None, affects="parameters")
    final_norm: bool = option(True, affects="parameters")
    pool_heads: int | None = option(None, affects="function")
    stem: tuple[int, ...] | None = option(None, affects="parameters")
    stem_width: int = option(ResNetStem.width, affects="parameters")
    remat: bool | str = option(Encoder.remat, affects="execution")
    scan: bool = option(Encoder.scan, affects="execution")

    def __post_init__(self) -> None:
        # Models are static arguments of compiled functions, and so have to be hashable.
        if isinstance(self.classes, Mapping):
            self.classes = FrozenDict({name: integer_of(f"classes[{name!r}]", n) for name, n in self.classes.items()})
        if self.stem is not None:
            if not isinstance(self.stem, list | tuple | np.ndarray):
                raise TypeError(f"stem is {self.stem!r}\n  allowed: a tuple of integers, or None")
            self.stem = tuple(integer_of("stem", units) for units in self.stem)
        convert(self)
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
        """Returns logits [batch, classes] in float32.

        With pooling 'none' they are [batch, tokens, classes]; with several heads, a dictionary of such arrays; without
        a head, the result is features [batch, width] or [batch, tokens, width].

        Args:
            inputs: images, or patches as `patches.patchify` returns them.
            mask: True where a token (third axis) may attend to another (fourth axis); class token and registers first.
            train: whether dropout and stochastic depth are applied, with the random stream 'dropout'.
            grid: rows and columns of patches; None if the patches form a square or only their order matters.
            replace: for pre-training: applied to the patch embeddings before the position embedding.
            visible: for pre-training: indices of the patches to encode, each with its own position; None for all.

        Raises:
            ValueError: the patch size does not divide the images; the grid of the patches is unknown or wrong; or
                `visible` is given and the position embedding is not applied at the input; or the parameters are for
                images of another size or number of channels.
        """
        grid = input_grid(self, inputs, grid)
        with _shapes_explained(inputs):
            if self.stem is not None:
                inputs = ResNetStem(self.stem, self.stem_width, self.dtype, name="stem")(inputs)
            width = self.width - self.position_width
            tokens = PatchEmbedding(width, self.patch_size, self.dtype, name="embedding")(inputs.astype(self.dtype))
            if self.input_norm == "patches":
                tokens = self.make_norm("norm_input")(tokens)
            if replace is not None:
                tokens = replace(tokens)
            layout, at = self.layout(grid), position_at(self)
            positions = Terms() if at == "layers" else POSITIONS[self.position](layout, name="positions")()
            tokens = self._join(tokens, positions)
            if at == "input" and not self.position_width and positions.table is not None:
                tokens = tokens + positions.table.astype(tokens.dtype)
            if visible is not None:
                _check_positions_at_input(self)
                tokens = _only_visible(tokens, visible, layout.extra)
            if self.input_norm == "tokens":
                tokens = self.make_norm("norm_input")(tokens)
            tokens = Dropout(self.dropout)(tokens, train)
            self.sow("intermediates", "embedded", tokens)
            shared = positions if at == "shared" else positions._replace(table=None)
            tokens = self.encoder(layout)(tokens, mask, train, shared)
        heads = {"heads": self.pool_heads} if is_attention_pooling(self.pooling) else {}
        features = POOLINGS[self.pooling](layout.extra, self.block_config(), **heads, name="pooling")(tokens)
        if self.norm_after_pooling:
            features = self.make_norm("norm")(features)
        if self.classes is None:
            return features.astype(jnp.float32)
        return self.make_head()(features)

    @nn.nowrap
    def make_head(self) -> nn.Module:
        """The classifier, or several."""
        head = Heads if isinstance(self.classes, Mapping) else Head
        return head(self.classes, self.pre_logits, self.head_bias, name="head")

    @nn.nowrap
    def layout(self, grid: tuple[int, int]) -> TokenLayout:
        """The tokens of images with these rows and columns of patches, for a position embedding."""
        width = self.position_width or self.width
        size = self.width // self.heads
        return TokenLayout(*grid, int(self.class_token), self.registers, width, size, self.heads, self.position_grid)

    def _join(self, tokens: jax.Array, positions: Terms) -> jax.Array:
        """Concatenates a table in `position_width` channels, if any; then prepends class token and registers."""
        batch = tokens.shape[0]
        before = []
        if self.position_width:
            table = positions.table[:, -tokens.shape[1] :].astype(tokens.dtype)
            tokens = jnp.concatenate([tokens, jnp.broadcast_to(table, (batch, *table.shape[1:]))], axis=-1)
        if self.class_token:
            before += [self.param("class_token", nn.initializers.zeros, (1, 1, self.width), jnp.float32)]
        if self.registers:
            # Not zero: registers that are equal initially would stay equal.
            normal, shape = nn.initializers.normal(0.02), (1, self.registers, self.width)
            before += [self.param("registers", normal, shape, jnp.float32)]
        before = [jnp.broadcast_to(token.astype(self.dtype), (batch, *token.shape[1:])) for token in before]
        return jnp.concatenate([*before, tokens], axis=1) if before else tokens

    @nn.nowrap
    def encoder(self, layout: TokenLayout | None = None) -> Encoder:
        """The encoder; `layout` is only for position embeddings in the layers."""
        in_layers = position_at(self) == "layers"
        return Encoder(
            depth=self.depth,
            config=self.block_config(),
            stochastic_depth=self.stochastic_depth,
            stochastic_depth_schedule=self.stochastic_depth_schedule,
            position=self.position if in_layers else None,
            layout=layout if in_layers else None,
            remat=self.remat,
            scan=self.scan,
            norm=self.final_norm and not self.norm_after_pooling,
            name="encoder",
        )


@contextlib.contextmanager
def _shapes_explained(inputs: jax.Array) -> Iterator[None]:
    """Replaces Flax's error about parameters that are for other inputs."""
    try:
        yield
    except ScopeParamShapeError as error:
        shape = "x".join(map(str, inputs.shape[1:]))
        raise ValueError(
            f"the parameters are for images of another size or number of channels than {shape}: "
            f"{str(error).partition(' (https')[0]}\n"
            "  resize the images, or load the parameters for them: weights.load(..., image_size=(height, width))"
        ) from None


def position_at(model: VisionTransformer) -> str:
    """Where the model's position embedding is applied: 'input', 'layers' or 'shared'."""
    return where_applied(model.position, model.position_at)


def extra_tokens(model: VisionTransformer) -> int:
    """Number of tokens before the patches: class token and registers."""
    return int(model.class_token) + model.registers


def token_grid(model: VisionTransformer, image_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches in images of (height, width) `image_size`.

    Raises:
        ValueError: the patch size does not divide the image (or the stem's feature map).
    """
    if model.stem is None:
        return grid_of(image_size, model.patch_size)
    height, width, _ = stem_output(model.stem, model.stem_width, image_size)
    try:
        return grid_of((height, width), model.patch_size)
    except ValueError as error:
        raise ValueError(
            f"the stem's feature map of an image of {image_size[0]}x{image_size[1]} is {height}x{width}: {error}"
        ) from None


def pixels_per_patch(model: VisionTransformer) -> int:
    """Height and width of a patch in pixels of the image; with a stem, larger than `patch_size`."""
    if model.stem is None:
        return model.patch_size
    side = 2**12  # divisible by the reduction of every stem
    return model.patch_size * side // stem_output(model.stem, model.stem_width, (side, side))[0]


def input_grid(model: VisionTransformer, inputs: jax.Array, grid: tuple[int, int] | None = None) -> tuple[int, int]:
    """Rows and columns of patches in the inputs of a model, images or patches.

    Raises:
        ValueError: as in `VisionTransformer.__call__`.
    """
    if getattr(inputs, "ndim", None) == 4:
        return token_grid(model, inputs.shape[1:3])
    if getattr(inputs, "ndim", None) != 3:
        raise ValueError(
            f"inputs is {arguments.shown(inputs)}\n  allowed: images [batch, height, width, channels], or patches "
            "[batch, patches, pixels]"
        )
    return _grid_of_patches(model, inputs.shape[1], grid)


def _check_positions_at_input(model: VisionTransformer) -> None:
    """Raises ValueError unless the position embedding is only applied at the input."""
    at = position_at(model)
    if POSITIONS[model.position].angles is not None:
        at = "layers"
    if at != "input":
        raise ValueError(
            f"positions are applied at {at!r}, which needs all patches: to encode only some, apply them at 'input'"
        )


def _only_visible(tokens: jax.Array, visible: jax.Array, extra: int) -> jax.Array:
    """Class token, registers and the visible patches."""
    return jnp.concatenate([tokens[:, :extra], masking.take(tokens[:, extra:], visible)], axis=1)


def _grid_of_patches(model: VisionTransformer, count: int, grid: tuple[int, int] | None) -> tuple[int, int]:
    if model.stem is not None:
        raise ValueError("a model with a stem needs images [batch, height, width, channels], not patches")
    if grid is not None:
        grid = arguments.pair("grid", grid)
        if grid[0] * grid[1] != count:
            raise ValueError(f"grid is {grid[0]}x{grid[1]}, but there are {count} patches")
        return grid
    side = math.isqrt(count)
    if side * side == count:
        return side, side
    if POSITIONS[model.position].needs_grid:
        raise ValueError(
            f"{count} patches do not form a square, and position {model.position!r} needs their rows and columns: "
            "pass them as grid=(rows, columns)"
        )
    return 1, count
