"""A straightforward Vision Transformer in Flax's own layers: a baseline of train_step.py."""

import flax.linen as nn
import jax.numpy as jnp


class Block(nn.Module):
    heads: int
    mlp_width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(y, y)
        y = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(x)
        y = nn.gelu(nn.Dense(self.mlp_width, dtype=self.dtype)(y))
        return x + nn.Dense(x.shape[-1], dtype=self.dtype)(y)


class PlainViT(nn.Module):
    """Patch convolution, class token, position embedding, blocks, LayerNorm, head."""

    classes: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, images, train=False):
        size = (self.patch_size, self.patch_size)
        x = nn.Conv(self.width, size, size, padding="VALID", dtype=self.dtype)(images)
        x = x.reshape(x.shape[0], -1, self.width)
        token = self.param("token", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(token.astype(x.dtype), (x.shape[0], 1, 1)), x], axis=1)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, *x.shape[1:])).astype(x.dtype)
        for _ in range(self.depth):
            x = Block(self.heads, self.mlp_width, self.dtype)(x)
        x = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype)(x)[:, 0]
        return nn.Dense(self.classes, kernel_init=nn.initializers.zeros)(x.astype(jnp.float32))
