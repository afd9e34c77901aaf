"""The MLP of a block: two dense layers around a GELU, or around a gate."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

from vit_jax.models.activations import gelu
from vit_jax.models.dense import Dense, stacked
from vit_jax.models.dropout import Dropout


class MlpBlock(nn.Module):
    """Two dense layers with a GELU between.

    Attributes:
        hidden: width of the layer between.
        dropout: rate after each of the two layers in training.
        dtype: arithmetic of the products.
        gelu: 'tanh' (as the published code computes it) or 'exact' (by erf, as PyTorch does unless told).
        matmul_dtype: see `Dense`.
    """

    hidden: int
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    gelu: str = "tanh"
    matmul_dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "batch tokens width"], train: bool = False
    ) -> Float[Array, "batch tokens width"]:
        given = {"dtype": self.dtype, "matmul_dtype": self.matmul_dtype, "bias_init": nn.initializers.normal(1e-6)}
        hidden = Dense(self.hidden, **given, name="up")(tokens)
        hidden = gelu(hidden, self.gelu)
        hidden = Dropout(self.dropout)(hidden, train)
        outputs = Dense(tokens.shape[-1], **given, name="down")(hidden)
        return Dropout(self.dropout)(outputs, train)


class SwigluBlock(nn.Module):
    """SwiGLU (arXiv 2002.05202, eq. 6): down(silu(gate(x)) * up(x)), gate and up being one product, gate first.

    For the parameters of an `MlpBlock`, take two thirds of its hidden width.

    Attributes:
        hidden: width of gate and up, each.
        dropout: rate after the gated product and after the last layer in training.
        dtype: arithmetic of the products.
        matmul_dtype: see `Dense`.
    """

    hidden: int
    dropout: float = 0.0
    dtype: Dtype = jnp.float32
    matmul_dtype: Dtype | None = None

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "batch tokens width"], train: bool = False
    ) -> Float[Array, "batch tokens width"]:
        given = {"dtype": self.dtype, "matmul_dtype": self.matmul_dtype}
        kernel_init = stacked(nn.initializers.xavier_uniform(), 2)
        fused = Dense(2 * self.hidden, **given, kernel_init=kernel_init, name="gate_up")(tokens)
        gate, up = jnp.split(fused, 2, axis=-1)
        hidden = Dropout(self.dropout)(jax.nn.silu(gate) * up, train)
        outputs = Dense(tokens.shape[-1], **given, name="down")(hidden)
        return Dropout(self.dropout)(outputs, train)


MLPS = {"gelu": MlpBlock, "swiglu": SwigluBlock}
