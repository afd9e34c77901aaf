"""The MLP of an encoder block: two dense layers with a GELU or a gate in between."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.models.activations import gelu
from vit_jax.models.block_config import BlockConfig
from vit_jax.models.dense import Dense, stacked
from vit_jax.models.dropout import Dropout


class Mlp(nn.Module):
    """Base class of the MLPs.

    Attributes:
        config: options of the block; `mlp_width`, `dropout`, `gelu`, `dtype` and `matmul_dtype` are read here.

    A class says whether it `uses_gelu`, and for the memory estimate how many arrays of the hidden width the backward
    pass reads (`hidden_arrays`) and how many of those are outputs of matmuls (`hidden_matmuls`).
    """

    config: BlockConfig
    uses_gelu = False
    hidden_arrays = 4
    hidden_matmuls = 1

    @nn.nowrap
    def _normed(self, hidden: jax.Array) -> jax.Array:
        return self.config.make_norm("norm")(hidden) if self.config.mlp_norm else hidden

    @nn.nowrap
    def activation_bytes(self, tokens: int, width: int) -> int:
        """Bytes of one image that the backward pass reads: the input, and arrays of the hidden width."""
        item = jnp.dtype(self.config.dtype).itemsize
        return tokens * item * (width + self.hidden_arrays * self.config.mlp_width)

    @nn.nowrap
    def matmul_bytes(self, tokens: int, width: int) -> int:
        """Bytes of the outputs of all matmuls for one image."""
        item = jnp.dtype(self.config.dtype).itemsize
        return tokens * item * (width + self.hidden_matmuls * self.config.mlp_width)


class MlpBlock(Mlp):
    """Two dense layers with a GELU in between."""

    uses_gelu = True

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "batch tokens width"], train: bool = False
    ) -> Float[Array, "batch tokens width"]:
        config = self.config
        dtypes = {"dtype": config.dtype, "matmul_dtype": config.matmul_dtype}
        bias_init = nn.initializers.normal(1e-6)
        hidden = Dense(config.mlp_width, **dtypes, bias_init=bias_init, name="up")(tokens)
        hidden = gelu(hidden, config.gelu)
        hidden = self._normed(Dropout(config.dropout)(hidden, train))
        outputs = Dense(tokens.shape[-1], **dtypes, bias_init=bias_init, name="down")(hidden)
        return Dropout(config.dropout)(outputs, train)


class SwigluBlock(Mlp):
    """SwiGLU (arXiv 2002.05202, eq. 6): down(silu(gate(x)) * up(x)).

    `gate` and `up` are one matmul, gate first, and each is `mlp_width` wide. Two thirds of the hidden width of an
    `MlpBlock` give the same number of parameters.
    """

    hidden_arrays = 5
    hidden_matmuls = 2

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "batch tokens width"], train: bool = False
    ) -> Float[Array, "batch tokens width"]:
        config = self.config
        dtypes = {"dtype": config.dtype, "matmul_dtype": config.matmul_dtype}
        kernel_init = stacked(nn.initializers.xavier_uniform(), 2)
        fused = Dense(2 * config.mlp_width, **dtypes, kernel_init=kernel_init, name="gate_up")(tokens)
        gate, up = jnp.split(fused, 2, axis=-1)
        hidden = self._normed(Dropout(config.dropout)(jax.nn.silu(gate) * up, train))
        outputs = Dense(tokens.shape[-1], **dtypes, name="down")(hidden)
        return Dropout(config.dropout)(outputs, train)


MLPS: dict[str, type[Mlp]] = {"gelu": MlpBlock, "swiglu": SwigluBlock}
