"""The Transformer encoder (arXiv 2010.11929, eq. 2 and 3): pre-LN blocks of attention and MLP."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.models.attention import Attention, Mask
from vit_jax.models.block_config import BlockConfig
from vit_jax.models.dropout import Dropout
from vit_jax.models.mlp import MLPS, Mlp
from vit_jax.models.norm import LayerScale
from vit_jax.models.positions import POSITIONS, Terms, TokenLayout

SCHEDULES = ("linear", "constant")
# What a rematerialised block keeps besides its inputs: nothing; the outputs of all matmuls; or the outputs of the dense
# layers, without those of attention, whose size grows with the square of the number of tokens.
POLICIES = {
    True: None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class EncoderBlock(nn.Module):
    """x + Attention(LayerNorm(x)), then x + MLP(LayerNorm(x)); or in parallel, both reading one LayerNorm's output.

    The parallel form is that of ViT-22B (arXiv 2302.05442, section 2). It is one residual branch, which is scaled and
    dropped as a whole.

    Attributes:
        config: options of the block.
        position: key of `positions.POSITIONS`: a position embedding of this block's own; None for none.
        layout: the tokens for that position embedding.
    """

    config: BlockConfig
    position: str | None = None
    layout: TokenLayout | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch tokens width"],
        mask: Mask | None = None,
        train: bool = False,
        rate: float | Float[Array, ""] = 0.0,
        positions: Terms = Terms(),  # noqa: B008 (it is immutable)
    ) -> Float[Array, "batch tokens width"]:
        """The output tokens; `rate` is of stochastic depth, `positions` a position embedding that all blocks share."""
        if self.position is not None:
            positions = POSITIONS[self.position](self.layout, name="positions")()
        if positions.table is not None:
            tokens = tokens + positions.table.astype(tokens.dtype)
        # The residual stream is two-dimensional: with three axes, XLA on GPU would make the batch axis the contiguous
        # one, and every layer would transpose.
        shape, rows = tokens.shape, tokens.reshape(-1, tokens.shape[-1])
        attention, mlp = self.parts()
        dropout = self.config.dropout

        def attend(normed: jax.Array) -> jax.Array:
            return Dropout(dropout)(attention(normed, mask, train, positions), train)

        if self.config.parallel:
            normed = self.config.make_norm("norm")(rows).reshape(shape)
            branch = attend(normed) + mlp(normed, train)
            rows = rows + self._finish(branch, "scale", rate, train)
        else:
            normed = self.config.make_norm("norm_attention")(rows).reshape(shape)
            rows = rows + self._finish(attend(normed), "scale_attention", rate, train)
            normed = self.config.make_norm("norm_mlp")(rows).reshape(shape)
            rows = rows + self._finish(mlp(normed, train), "scale_mlp", rate, train)
        tokens = rows.reshape(shape)
        self.sow("intermediates", "output", tokens)
        return tokens

    @nn.nowrap
    def parts(self) -> tuple[Attention, Mlp]:
        """The attention layer and the MLP."""
        return Attention(self.config, name="attention"), MLPS[self.config.mlp](self.config, name="mlp")

    @nn.nowrap
    def activation_bytes(self, tokens: int, width: int) -> int:
        """Bytes of one image that the block's backward pass reads, its input not included."""
        middle = tokens * width * jnp.dtype(self.config.dtype).itemsize  # the residual stream between the two parts
        return middle + sum(part.activation_bytes(tokens, width) for part in self.parts())

    def _finish(
        self, branch: Float[Array, "batch tokens width"], scale: str, rate: float | jax.Array, train: bool
    ) -> Float[Array, "rows width"]:
        """The residual branch as it is added: scaled, and zero for the examples that stochastic depth drops."""
        if self.config.layer_scale is not None:
            branch = LayerScale(self.config.layer_scale, name=scale)(branch)
        return Dropout(rate, shared_axes=(1, 2))(branch, train).reshape(-1, branch.shape[-1])


class Encoder(nn.Module):
    """A stack of encoder blocks and the final LayerNorm (eq. 2-4).

    Attributes:
        depth: number of blocks.
        config: options of the blocks.
        stochastic_depth: rate of the last block.
        stochastic_depth_schedule: 'linear' (from 0 at the first block to the rate at the last) or 'constant'.
        position: key of `positions.POSITIONS`: every block has its own position embedding of this kind; None for none.
        layout: the tokens for those position embeddings.
        remat: True: keep only the blocks' inputs for the backward pass and recompute the rest. 'dots' or
            'dots_no_batch': also keep the outputs of all matmuls, or of the dense layers (see `POLICIES`).
        scan: whether one compiled block runs `depth` times, instead of `depth` compiled copies. The blocks' parameters
            are then one tree `blocks` with a leading axis of layers (see `stacking`).
        norm: whether a LayerNorm follows the last block.
    """

    depth: int
    config: BlockConfig
    stochastic_depth: float = 0.0
    stochastic_depth_schedule: str = "linear"
    position: str | None = None
    layout: TokenLayout | None = None
    remat: bool | str = False
    scan: bool = False
    norm: bool = True

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch tokens width"],
        mask: Mask | None = None,
        train: bool = False,
        positions: Terms = Terms(),  # noqa: B008 (it is immutable)
    ) -> Float[Array, "batch tokens width"]:
        """The tokens after all blocks and the final LayerNorm; `positions` is a position embedding that all share."""
        rates = depth_rates(self.depth, self.stochastic_depth, self.stochastic_depth_schedule)

        def run(block: EncoderBlock, tokens: jax.Array, rate: float | jax.Array) -> jax.Array:
            def layer(block: EncoderBlock, tokens: jax.Array) -> jax.Array:
                return block(tokens, mask, train, rate, positions)

            if not self.remat:
                return layer(block, tokens)
            # Inside a scan, XLA cannot merge the recomputation with the forward pass.
            return nn.remat(layer, prevent_cse=not self.scan, policy=POLICIES[self.remat])(block, tokens)

        if self.scan:
            tokens = _scan(run, self._block("blocks"), tokens, rates)
        else:
            for index, rate in enumerate(rates):
                tokens = run(self._block(f"block_{index}"), tokens, rate)
        if not self.norm:
            return tokens
        return self.config.make_norm("norm")(tokens)

    @nn.nowrap
    def _block(self, name: str) -> EncoderBlock:
        return EncoderBlock(self.config, self.position, self.layout, name=name)

    @nn.nowrap
    def activation_bytes(self, tokens: int, width: int) -> int:
        """Bytes of one image that the backward pass reads, with `remat` taken into account."""
        block = EncoderBlock(self.config)
        inputs = self.depth * tokens * width * jnp.dtype(self.config.dtype).itemsize
        if not self.remat:
            return inputs + self.depth * block.activation_bytes(tokens, width)
        kept = 0
        if self.remat is not True:
            attention, mlp = block.parts()
            kept = attention.matmul_bytes(tokens, width, batched=self.remat == "dots") + mlp.matmul_bytes(tokens, width)
        return inputs + self.depth * kept + block.activation_bytes(tokens, width)  # one block at a time is recomputed


def depth_rates(depth: int, rate: float, schedule: str) -> list[float]:
    """The stochastic depth rate of each block: evenly spaced from 0 to `rate`, or `rate` for all."""
    return [rate if schedule == "constant" else rate * index / max(depth - 1, 1) for index in range(depth)]


def _scan(run, block: EncoderBlock, tokens: jax.Array, rates: list[float]) -> jax.Array:
    """Applies `run` with each layer's parameters in turn."""
    step = nn.scan(
        # A rate of zero stays a Python number, so that no random numbers are drawn for it.
        lambda block, tokens, rate: (run(block, tokens, rate if any(rates) else 0.0), None),
        variable_axes={"params": 0, "intermediates": 0, "perturbations": 0},
        split_rngs={"params": True, "dropout": True},
        length=len(rates),
    )
    tokens, _ = step(block, tokens, jnp.asarray(rates, jnp.float32))
    return tokens
