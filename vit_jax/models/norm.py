"""Layer normalisation, and the learned scale of a residual branch."""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float


class LayerNorm(nn.Module):
    """Layer normalisation, statistics in float32, result in `dtype`.

    Attributes:
        dtype: of the result.
        epsilon: added to the variance; 1e-6 in the published code, 1e-12 in some files of other projects.
    """

    dtype: Dtype = jnp.float32
    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, tokens: Float[Array, "*leading width"]) -> Float[Array, "*leading width"]:
        norm = nn.LayerNorm(epsilon=self.epsilon, dtype=jnp.float32, name="norm")
        nn.share_scope(self, norm)
        return norm(tokens).astype(self.dtype)


class LayerScale(nn.Module):
    """A learned factor for each channel of a residual branch, small at the start (arXiv 2103.17239, section 3).

    Attributes:
        initial: its value at the start.
    """

    initial: float

    @nn.compact
    def __call__(self, branch: Float[Array, "*leading width"]) -> Float[Array, "*leading width"]:
        scale = self.param("scale", nn.initializers.constant(self.initial), (branch.shape[-1],), jnp.float32)
        return branch * scale.astype(branch.dtype)
