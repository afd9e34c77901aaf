"""Multi-head self-attention (arXiv 2010.11929, appendix A)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from vit_jax.models.attention_backends import (
    BACKENDS,
    FALLBACK,
    Backend,
    Shape,
    attention_weights,
    key_mask,
    split,
)
from vit_jax.models.dense import Dense, stacked
from vit_jax.models.dropout import Dropout
from vit_jax.models.norm import LayerNorm
from vit_jax.models.positions import Terms, rotate

Mask = Bool[Array, "#batch #heads #queries tokens"] | Int[Array, " batch"]


class Attention(nn.Module):
    """Multi-head self-attention over tokens.

    Queries, keys and values are one projection `qkv` [width, 3 * width]; for a backend that reads them apart it is
    computed as three matmuls, so that nothing is copied.

    Attributes:
        heads: number of heads; they share the width evenly.
        dropout: rate at which attention weights are dropped in training.
        dtype: compute dtype; softmax is in float32.
        qkv_bias: whether queries, keys and values have a bias.
        qk_norm: whether queries and keys pass a LayerNorm over each head's channels (arXiv 2302.05442, section 2).
        layer_norm_epsilon: of that LayerNorm.
        kernel: the backend, of `attention_backends.BACKENDS`; where it does not have what a call needs, 'plain'.
        matmul_dtype: of the operands of the dense layers' matmuls, where it is not `dtype` (see `Dense`).
    """

    heads: int
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_norm_epsilon: float = 1e-6
    kernel: str = "plain"
    matmul_dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch tokens width"],
        mask: Mask | None = None,
        train: bool = False,
        positions: Terms = Terms(),  # noqa: B008 (it is immutable)
    ) -> Float[Array, "batch tokens width"]:
        """Mixes tokens.

        Args:
            tokens: of the residual stream, normalised.
            mask: boolean, True where a query (third axis) may attend to a key (fourth); or integers, the number of
                valid tokens of each example, which come first. None for all.
            train: whether attention dropout is on.
            positions: their bias and rotation act here.

        The weights are sown as 'weights' among the intermediates.

        Raises:
            ValueError: the heads do not divide the width.
        """
        batch, count, width = tokens.shape
        if width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {width}")
        lengths = mask if mask is not None and mask.ndim == 1 else None
        watched = self.is_mutable_collection("intermediates")
        dropped = train and self.dropout > 0
        if watched or dropped or (mask is not None and lengths is None):
            queries, keys, values = self._project(tokens, BACKENDS[FALLBACK], positions)
            mask = key_mask(lengths, count) if lengths is not None else mask
            weights = attention_weights(queries, keys, mask, positions.bias)
            self.sow("intermediates", "weights", weights)
            weights = Dropout(self.dropout)(weights, train).astype(self.dtype)
            mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, values).reshape(batch, count, width)
        else:
            mixed = self._attend(tokens, lengths, positions)
        return Dense(width, dtype=self.dtype, matmul_dtype=self.matmul_dtype, name="out")(mixed)[:, :count]

    def shape(
        self,
        tokens: jax.Array,
        mask: Mask | None = None,
        train: bool = False,
        positions: Terms = Terms(),  # noqa: B008 (it is immutable)
    ) -> Shape:
        """What a call with these arguments asks of a backend."""
        return Shape(
            batch=tokens.shape[0],
            tokens=tokens.shape[1],
            heads=self.heads,
            size=tokens.shape[2] // self.heads,
            dtype=jnp.dtype(self.dtype).name,
            bias=positions.bias is not None,
            lengths=mask is not None and mask.ndim == 1,
            transformed=self.qk_norm or positions.rotation is not None,
            dropout=self.dropout > 0,
        )

    def _attend(self, tokens: jax.Array, lengths: jax.Array | None, positions: Terms) -> jax.Array:
        """By the backend; with the padded tokens, where it has any."""
        backend, bias = BACKENDS[self.kernel], positions.bias
        if (bias is not None and not backend.takes_bias) or (lengths is not None and not backend.takes_lengths):
            backend = BACKENDS[FALLBACK]
        plain = bias is None and lengths is None and positions.rotation is None and not self.qk_norm
        if backend.attend_fused is not None and plain:
            return backend.attend_fused(self._dense(3 * tokens.shape[-1])(tokens), self.heads)
        count = tokens.shape[1]
        padding = -count % backend.multiple
        if padding:
            # Padded keys are hidden, padded queries dropped: nothing of them reaches a result or a gradient.
            tokens = jnp.pad(tokens, ((0, 0), (0, padding), (0, 0)))
            if bias is not None:
                hidden = ((0, 0), (0, 0), (0, padding), (0, padding))
                bias = jnp.pad(bias, hidden, constant_values=float(jnp.finfo(self.dtype).min) / 2)
            elif lengths is None:
                lengths = jnp.full(len(tokens), count, jnp.int32)
        mixed = backend.attend(*self._project(tokens, backend, positions), bias, lengths)
        return mixed.reshape(tokens.shape)

    def _project(self, tokens: jax.Array, backend: Backend, positions: Terms) -> tuple[jax.Array, ...]:
        """Queries, keys and values [batch, tokens, heads, size]: normalised and rotated."""
        batch, count, width = tokens.shape
        if backend.attend_fused is None:
            parts = self._dense(3 * width, parts=3)(tokens)
            queries, keys, values = (part.reshape(batch, count, self.heads, -1) for part in parts)
        else:
            queries, keys, values = split(self._dense(3 * width)(tokens), self.heads)
        if self.qk_norm:
            queries = LayerNorm(self.dtype, self.layer_norm_epsilon, name="norm_queries")(queries)
            keys = LayerNorm(self.dtype, self.layer_norm_epsilon, name="norm_keys")(keys)
        if positions.rotation is not None:
            padding = ((0, count - positions.rotation[0].shape[0]), (0, 0))
            rotation = [jnp.pad(part, padding) for part in positions.rotation]
            queries, keys = rotate(queries, *rotation), rotate(keys, *rotation)
        return queries, keys, values

    def _dense(self, features: int, parts: int = 1) -> Dense:
        kernel_init = stacked(nn.initializers.xavier_uniform(), 3)
        about = {"dtype": self.dtype, "matmul_dtype": self.matmul_dtype, "parts": parts}
        return Dense(features, self.qkv_bias, **about, kernel_init=kernel_init, name="qkv")
