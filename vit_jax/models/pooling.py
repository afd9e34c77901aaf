"""From tokens to one vector an image, and from there to logits."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vit_jax.models.dense import Dense

POOLINGS = {
    "token": lambda tokens, extra: tokens[:, 0],
    "mean": lambda tokens, extra: tokens[:, extra:].mean(axis=1),
}


class Head(nn.Module):
    """The linear classifier, zero at the start (arXiv 2010.11929, section 3.2), in float32.

    Attributes:
        classes: number of logits.
        pre_logits: width of a Dense + tanh layer before it, as in pre-training; None for none.
    """

    classes: int
    pre_logits: int | None = None

    @nn.compact
    def __call__(self, features: Float[Array, "batch width"]) -> Float[Array, "batch classes"]:
        features = features.astype(jnp.float32)
        if self.pre_logits is not None:
            features = jnp.tanh(
                Dense(self.pre_logits, kernel_init=nn.initializers.lecun_normal(), name="pre_logits")(features)
            )
        return Dense(self.classes, kernel_init=nn.initializers.zeros, name="logits")(features)
