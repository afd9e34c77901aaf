"""Multi-head self-attention (arXiv 2010.11929, appendix A): one fused product for queries, keys and values."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float

from vit_jax.models.dense import Dense, stacked
from vit_jax.models.dropout import Dropout
from vit_jax.models.kernels import KERNELS
from vit_jax.models.norm import LayerNorm
from vit_jax.models.positions import Terms, rotate


def attention_weights(
    queries: Float[Array, "batch queries heads size"],
    keys: Float[Array, "batch keys heads size"],
    mask: Bool[Array, "#batch #heads #queries keys"] | None = None,
    bias: Float[Array, "#batch heads queries keys"] | None = None,
) -> Float[Array, "batch heads queries keys"]:
    """Softmax of the scaled scores, in float32 whatever the arguments are.

    Scores are divided by the square root of the *head* size; `bias` is added to them after that. A key whose mask is
    False gets a weight of exactly 0; a query that may see no key at all gets zeros everywhere, not an average over
    what is hidden from it.
    """
    scores = jnp.einsum("bqhd,bkhd->bhqk", queries, keys, preferred_element_type=jnp.float32)
    scores = scores * queries.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if mask is None:
        return jax.nn.softmax(scores, axis=-1)
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    return jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0.0)


class Attention(nn.Module):
    """Multi-head self-attention over tokens.

    Attributes:
        heads: number of heads; they share the width evenly.
        dropout: rate at which attention weights are dropped in training.
        dtype: arithmetic of the products; softmax is in float32.
        qkv_bias: whether queries, keys and values have a bias.
        qk_norm: whether queries and keys pass a LayerNorm over each head's channels (arXiv 2302.05442, section 2).
        layer_norm_epsilon: of that LayerNorm.
        kernel: of `kernels.KERNELS`; what it does not know is computed step by step whatever it is.
        product_dtype: of the operands of the dense layers' products, where it is not `dtype` (see `Dense`).
    """

    heads: int
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_norm_epsilon: float = 1e-6
    kernel: str = "plain"
    product_dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch tokens width"],
        mask: Bool[Array, "#batch #heads #queries tokens"] | None = None,
        train: bool = False,
        positions: Terms = Terms(),  # noqa: B008 (it is immutable)
    ) -> Float[Array, "batch tokens width"]:
        """Mixes tokens; `mask` is True where a query (third axis) may see a key (fourth).

        Of `positions`, the bias and the rotation act here. The weights are sown as 'weights' among the intermediates.

        Raises:
            ValueError: the heads do not divide the width.
        """
        width = tokens.shape[-1]
        if width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {width}")
        kernel_init = stacked(nn.initializers.xavier_uniform(), 3)
        arithmetic = {"dtype": self.dtype, "product_dtype": self.product_dtype}
        fused = Dense(3 * width, self.qkv_bias, **arithmetic, kernel_init=kernel_init, name="qkv")(tokens)
        watched = self.is_mutable_collection("intermediates")
        rate = self.dropout if train else 0.0
        if mask is None and positions == Terms() and not (self.qk_norm or watched or rate):
            mixed = KERNELS[self.kernel](fused, self.heads)
        else:
            mixed = self._step_by_step(fused, mask, train, positions)
        return Dense(width, **arithmetic, name="out")(mixed)

    def _step_by_step(
        self, fused: Float[Array, "batch tokens fused"], mask: jax.Array | None, train: bool, positions: Terms
    ) -> Float[Array, "batch tokens width"]:
        batch, count, width = fused.shape[0], fused.shape[1], fused.shape[2] // 3
        # One transpose brings all three into the layout that the batched products read.
        queries, keys, values = jnp.moveaxis(fused.reshape(batch, count, 3, self.heads, width // self.heads), 2, 0)
        if self.qk_norm:
            queries = LayerNorm(self.dtype, self.layer_norm_epsilon, name="norm_queries")(queries)
            keys = LayerNorm(self.dtype, self.layer_norm_epsilon, name="norm_keys")(keys)
        if positions.rotation is not None:
            queries, keys = rotate(queries, *positions.rotation), rotate(keys, *positions.rotation)
        weights = attention_weights(queries, keys, mask, positions.bias)
        self.sow("intermediates", "weights", weights)
        weights = Dropout(self.dropout)(weights, train).astype(self.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, values).reshape(batch, count, width)
