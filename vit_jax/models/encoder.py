"""The Transformer encoder (arXiv 2010.11929, eq. 2 and 3): pre-LN blocks of attention and MLP."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from vit_jax.models.attention import Attention, Mask
from vit_jax.models.dropout import Dropout
from vit_jax.models.mlp import MLPS, MlpBlock, SwigluBlock
from vit_jax.models.norm import LayerNorm, LayerScale
from vit_jax.models.positions import POSITIONS, Place, Terms

SCHEDULES = ("linear", "constant")
# What a block that is computed again keeps besides its inputs: nothing; the results of all its products; or of those
# with parameters, which leaves out the attention's, whose size grows with the square of the tokens.
POLICIES = {
    True: None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "dots_no_batch": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True)
class BlockOptions:
    """What all blocks of an encoder have in common.

    Attributes:
        heads: attention heads.
        mlp_width: hidden width of the MLP.
        dropout: rate after attention and inside the MLP.
        attention_dropout: rate on the attention weights.
        mlp: 'gelu' or 'swiglu' (see `mlp`).
        gelu: its form, 'tanh' or 'exact'.
        qkv_bias: whether queries, keys and values have a bias.
        qk_norm: whether queries and keys are normalised, each head by itself.
        layer_scale: what the learned factors on the branches' channels start at; None for no such factors.
        parallel: attention and MLP side by side, after one LayerNorm, instead of one after the other.
        layer_norm_epsilon: added to the variance.
        dtype: compute dtype.
        attention_kernel: of `attention_backends.BACKENDS`.
        matmul_dtype: of the operands of the dense layers' matmuls, where it is not `dtype` (see `Dense`).
    """

    heads: int
    mlp_width: int
    dropout: float = 0.0
    attention_dropout: float = 0.0
    mlp: str = "gelu"
    gelu: str = "tanh"
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: float | None = None
    parallel: bool = False
    layer_norm_epsilon: float = 1e-6
    dtype: Dtype = jnp.float32
    attention_kernel: str = "plain"
    matmul_dtype: Dtype | None = None


class EncoderBlock(nn.Module):
    """x + Attention(LayerNorm(x)), then x + MLP(LayerNorm(x)); or in parallel, both of one LayerNorm.

    The parallel form is that of ViT-22B (arXiv 2302.05442, section 2), as one residual branch: it is scaled and
    dropped as a whole.

    Attributes:
        options: see there.
        position: a kind of `positions.POSITIONS` of which this block has its own; None for none.
        place: the tokens that position embedding is for.
    """

    options: BlockOptions
    position: str | None = None
    place: Place | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch tokens width"],
        mask: Mask | None = None,
        train: bool = False,
        rate: float | Float[Array, ""] = 0.0,
        positions: Terms = Terms(),  # noqa: B008 (it is immutable)
    ) -> Float[Array, "batch tokens width"]:
        """One layer; `rate` is that of stochastic depth, `positions` what all layers share of a position embedding."""
        options = self.options
        if self.position is not None:
            positions = POSITIONS[self.position](self.place, name="positions")()
        if positions.table is not None:
            tokens = tokens + positions.table.astype(tokens.dtype)
        # The residual stream is two-dimensional: of three axes, XLA on a GPU would make that of the examples the
        # contiguous one, and every layer would transpose.
        shape, rows = tokens.shape, tokens.reshape(-1, tokens.shape[-1])
        if options.parallel:
            normed = self._norm("norm")(rows).reshape(shape)
            branch = self._attention(normed, mask, train, positions) + self._mlp()(normed, train)
            rows = rows + self._finish(branch, "scale", rate, train)
        else:
            normed = self._norm("norm_attention")(rows).reshape(shape)
            rows = rows + self._finish(self._attention(normed, mask, train, positions), "scale_attention", rate, train)
            normed = self._norm("norm_mlp")(rows).reshape(shape)
            rows = rows + self._finish(self._mlp()(normed, train), "scale_mlp", rate, train)
        tokens = rows.reshape(shape)
        self.sow("intermediates", "output", tokens)
        return tokens

    def _norm(self, name: str) -> LayerNorm:
        return LayerNorm(self.options.dtype, self.options.layer_norm_epsilon, name=name)

    def _attention(
        self, tokens: jax.Array, mask: jax.Array | None, train: bool, positions: Terms
    ) -> Float[Array, "batch tokens width"]:
        fields = ("heads", "dtype", "qkv_bias", "qk_norm", "layer_norm_epsilon", "matmul_dtype")
        given = {name: getattr(self.options, name) for name in fields}
        given |= {"dropout": self.options.attention_dropout, "kernel": self.options.attention_kernel}
        attention = Attention(**given, name="attention")
        return Dropout(self.options.dropout)(attention(tokens, mask, train, positions), train)

    def _mlp(self) -> MlpBlock | SwigluBlock:
        form = {"gelu": self.options.gelu} if self.options.mlp == "gelu" else {}
        options = self.options
        form["matmul_dtype"] = options.matmul_dtype
        return MLPS[options.mlp](options.mlp_width, options.dropout, options.dtype, **form, name="mlp")

    def _finish(
        self, branch: Float[Array, "batch tokens width"], scale: str, rate: float | jax.Array, train: bool
    ) -> Float[Array, "rows width"]:
        """The residual branch as it is added: scaled, and dropped for some examples."""
        if self.options.layer_scale is not None:
            branch = LayerScale(self.options.layer_scale, name=scale)(branch)
        return Dropout(rate, shared_axes=(1, 2))(branch, train).reshape(-1, branch.shape[-1])


class Encoder(nn.Module):
    """A stack of encoder blocks and the final LayerNorm (eq. 2-4).

    Attributes:
        depth: number of blocks.
        options: what they have in common.
        stochastic_depth: rate of the last block.
        stochastic_depth_schedule: 'linear' from 0 at the first block, or 'constant'.
        position: a kind of position embedding of which every block has its own; None for none.
        place: the tokens it is for.
        remat: True: keep the blocks' inputs alone for the backward pass, and compute the rest again; 'dots' or
            'dots_no_batch': keep the results of products, or of those with parameters, too (see `POLICIES`).
        scan: one program for all blocks, run `depth` times, instead of `depth` copies of it. Their parameters are then
            one tree `blocks` with a leading axis of layers (see `stacking`).
        norm: whether there is a LayerNorm after the last block.
    """

    depth: int
    options: BlockOptions
    stochastic_depth: float = 0.0
    stochastic_depth_schedule: str = "linear"
    position: str | None = None
    place: Place | None = None
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
        """The tokens after all blocks and the last LayerNorm, if any; `positions` is what all blocks share."""
        rates = depth_rates(self.depth, self.stochastic_depth, self.stochastic_depth_schedule)

        def run(block: EncoderBlock, tokens: jax.Array, rate: float | jax.Array) -> jax.Array:
            def layer(block: EncoderBlock, tokens: jax.Array) -> jax.Array:
                return block(tokens, mask, train, rate, positions)

            if not self.remat:
                return layer(block, tokens)
            # Inside a scan, nothing could merge the second computation with the first.
            return nn.remat(layer, prevent_cse=not self.scan, policy=POLICIES[self.remat])(block, tokens)

        block = lambda name: EncoderBlock(self.options, self.position, self.place, name=name)  # noqa: E731
        if self.scan:
            tokens = _scan(run, block("blocks"), tokens, rates)
        else:
            for index, rate in enumerate(rates):
                tokens = run(block(f"block_{index}"), tokens, rate)
        if not self.norm:
            return tokens
        return LayerNorm(self.options.dtype, self.options.layer_norm_epsilon, name="norm")(tokens)


def depth_rates(depth: int, rate: float, schedule: str) -> list[float]:
    """The stochastic depth of each block: from 0 to `rate` in even steps, or `rate` for all."""
    return [rate if schedule == "constant" else rate * index / max(depth - 1, 1) for index in range(depth)]


def _scan(run, block: EncoderBlock, tokens: jax.Array, rates: list[float]) -> jax.Array:
    """`run` with each layer's parameters in turn."""
    step = nn.scan(
        # A rate of zero stays a number, so that nothing is drawn for it.
        lambda block, tokens, rate: (run(block, tokens, rate if any(rates) else 0.0), None),
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True},
        length=len(rates),
    )
    tokens, _ = step(block, tokens, jnp.asarray(rates, jnp.float32))
    return tokens
