"""Multi-head self-attention (arXiv 2010.11929, appendix A)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vit_jax.models import masking
from vit_jax.models.attention_backends import BACKENDS, FALLBACK, Backend, Shape, observed, plain, split
from vit_jax.models.block_config import BlockConfig
from vit_jax.models.dense import Dense, stacked
from vit_jax.models.dropout import Dropout
from vit_jax.models.positions import Terms, rotate

Mask = Bool[Array, "#batch #heads #queries tokens"] | Int[Array, " batch"]


class Attention(nn.Module):
    """Multi-head self-attention over tokens.

    Queries, keys and values are one projection `qkv` [width, 3 * width]. For a backend that reads them as three arrays
    it is computed as three matmuls, so that nothing is copied. Where the backend `config.attention_kernel` lacks what a
    call needs, 'plain' is used instead.

    Attributes:
        config: options of the block.
    """

    config: BlockConfig

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch tokens width"],
        mask: Mask | None = None,
        train: bool = False,
        positions: Terms = Terms(),  # noqa: B008 (it is immutable)
    ) -> Float[Array, "batch tokens width"]:
        """Returns tokens that are each a weighted mean of all values, projected.

        The weights are sown into the collection 'intermediates' as 'weights'.

        Args:
            tokens: the normalized residual stream.
            mask: booleans, True where a query (third axis) may attend to a key (fourth axis); or integers, the number
                of valid tokens of each example, which come first. None: every query attends to every key.
            train: whether attention dropout is applied.
            positions: bias and rotation of a position embedding.

        Raises:
            TypeError: the mask is of neither kind, such as an additive one.
            ValueError: the number of heads does not divide the width, or the shape of the mask is wrong.
        """
        config, (batch, count, width) = self.config, tokens.shape
        if width % config.heads:
            raise ValueError(f"{config.heads} heads do not divide a width of {width}")
        lengths, mask = _lengths_or_mask(mask, (batch, config.heads, count, count))
        sown = self.is_mutable_collection("intermediates")
        if sown or mask is not None or (train and config.attention_dropout > 0):

            def sow_and_drop(weights: jax.Array) -> jax.Array:
                return Dropout(config.attention_dropout)(observed(self, weights), train)

            parts = self._project(tokens, BACKENDS[FALLBACK], positions)
            mixed = plain(*parts, positions.bias, lengths, mask, sow_and_drop).reshape(batch, count, width)
        else:
            mixed = self._attend(tokens, lengths, positions)
        if config.attention_norm:
            mixed = config.make_norm("norm")(mixed)
        out = Dense(width, dtype=config.dtype, matmul_dtype=config.matmul_dtype, name="out")
        return out(mixed)[:, :count]

    @nn.nowrap
    def matmul_flops(self, shape: tuple[int, ...]) -> int:
        """FLOPs of scores and weighted means, for tokens of this shape; the projections are `Dense` layers."""
        batch, tokens, width = shape
        return 2 * 2 * batch * tokens * tokens * width

    @nn.nowrap
    def activation_bytes(self, tokens: int, width: int) -> int:
        """Bytes of one image that the backward pass reads: input, queries, keys, values, mixed values, weights."""
        item = jnp.dtype(self.config.dtype).itemsize
        return 5 * tokens * width * item + 2 * 4 * self.config.heads * tokens**2

    @nn.nowrap
    def matmul_bytes(self, tokens: int, width: int, batched: bool) -> int:
        """Bytes of the outputs of the projections for one image; with `batched`, of the attention matmuls too."""
        item = jnp.dtype(self.config.dtype).itemsize
        attention = 4 * self.config.heads * tokens**2 + tokens * width * item  # scores are float32
        return 4 * tokens * width * item + (attention if batched else 0)

    def shape(
        self,
        tokens: jax.Array,
        mask: Mask | None = None,
        train: bool = False,
        positions: Terms = Terms(),  # noqa: B008 (it is immutable)
    ) -> Shape:
        """What a call with these arguments requires of a backend."""
        config = self.config
        return Shape(
            batch=tokens.shape[0],
            tokens=tokens.shape[1],
            heads=config.heads,
            size=tokens.shape[2] // config.heads,
            dtype=jnp.dtype(config.dtype).name,
            bias=positions.bias is not None,
            lengths=mask is not None and mask.ndim == 1,
            transformed=config.qk_norm or positions.rotation is not None,
            dropout=config.attention_dropout > 0,
        )

    def _attend(self, tokens: jax.Array, lengths: jax.Array | None, positions: Terms) -> jax.Array:
        """Attention by the configured backend, before the output projection; includes padding tokens, if any."""
        backend, bias = BACKENDS[self.config.attention_kernel], positions.bias
        if (bias is not None and not backend.takes_bias) or (lengths is not None and not backend.takes_lengths):
            backend = BACKENDS[FALLBACK]
        untransformed = positions.rotation is None and not self.config.qk_norm
        if backend.attend_fused is not None and bias is None and lengths is None and untransformed:
            return backend.attend_fused(self._dense(3 * tokens.shape[-1])(tokens), self.config.heads)
        count = tokens.shape[1]
        padding = -count % backend.multiple
        if padding:
            # Padded keys are masked and padded queries dropped: they affect no result and no gradient.
            tokens = jnp.pad(tokens, ((0, 0), (0, padding), (0, 0)))
            if bias is not None:
                masked = ((0, 0), (0, 0), (0, padding), (0, padding))
                bias = jnp.pad(bias, masked, constant_values=float(jnp.finfo(self.config.dtype).min) / 2)
            elif lengths is None:
                lengths = jnp.full(len(tokens), count, jnp.int32)
        mixed = backend.attend(*self._project(tokens, backend, positions), bias, lengths)
        return mixed.reshape(tokens.shape)

    def _project(self, tokens: jax.Array, backend: Backend, positions: Terms) -> tuple[jax.Array, ...]:
        """Queries, keys and values [batch, tokens, heads, size], normalized and rotated."""
        config, (batch, count, width) = self.config, tokens.shape
        if backend.attend_fused is None:
            parts = self._dense(3 * width, parts=3)(tokens)
            queries, keys, values = (part.reshape(batch, count, config.heads, -1) for part in parts)
        else:
            queries, keys, values = split(self._dense(3 * width)(tokens), config.heads)
        if config.qk_norm:
            queries = config.make_norm("norm_queries")(queries)
            keys = config.make_norm("norm_keys")(keys)
        if positions.rotation is not None:
            padding = ((0, count - positions.rotation[0].shape[0]), (0, 0))
            rotation = [jnp.pad(part, padding) for part in positions.rotation]
            queries, keys = rotate(queries, *rotation), rotate(keys, *rotation)
        return queries, keys, values

    def _dense(self, features: int, parts: int = 1) -> Dense:
        return Dense(
            features,
            self.config.qkv_bias,
            dtype=self.config.dtype,
            matmul_dtype=self.config.matmul_dtype,
            parts=parts,
            kernel_init=stacked(nn.initializers.xavier_uniform(), 3),
            name="qkv",
        )


def _lengths_or_mask(mask: Any, shape: tuple[int, int, int, int]) -> tuple[Any, Any]:
    """The argument `mask` as lengths or as a mask, checked; the other one is None."""
    if mask is None:
        return None, None
    if getattr(mask, "ndim", None) == 1 and mask.dtype != bool:
        masking.check_lengths("mask", mask, shape[0])
        return mask, None
    masking.check_mask("mask", mask, shape)
    return None, mask
