"""The hybrids' stem: a ResNet whose feature map is cut into patches (arXiv 2010.11929, section 3.1 and B.2).

It is ResNet v2 of BiT (arXiv 1912.11370): weight-standardised convolutions and GroupNorm, in bottleneck units. Padding
is SAME throughout, which at stride 2 pads more behind than before.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float, Num

EXPANSION = 4  # a unit's output channels for each of its inner ones
GROUPS = 32


class StandardizedConvolution(nn.Module):
    """A convolution without bias whose kernel is standardised over height, width and input (arXiv 1903.10520).

    1e-5 is added to the standard deviation itself, as the published code does, not to the variance.

    Attributes:
        features: output channels.
        size: height and width of the kernel.
        stride: of the output on the input.
        dtype: arithmetic of the product; the kernel is float32 and is standardised so.
    """

    features: int
    size: int
    stride: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns features"]:
        shape = (self.size, self.size, images.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        kernel = kernel - kernel.mean(axis=(0, 1, 2))
        kernel = kernel / (kernel.std(axis=(0, 1, 2)) + 1e-5)
        return jax.lax.conv_general_dilated(
            images.astype(self.dtype),
            kernel.astype(self.dtype),
            window_strides=(self.stride, self.stride),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class GroupNorm(nn.Module):
    """Group normalisation in 32 groups, epsilon 1e-6, statistics in float32, result in `dtype`.

    Attributes:
        dtype: of the result.
        scale_init: initialiser of the scale.
    """

    dtype: Dtype = jnp.float32
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, images: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        norm = nn.GroupNorm(GROUPS, epsilon=1e-6, dtype=jnp.float32, scale_init=self.scale_init, name="norm")
        nn.share_scope(self, norm)
        return norm(images).astype(self.dtype)


class BottleneckUnit(nn.Module):
    """1x1, 3x3 and 1x1 convolutions around a residual, which is projected where the shape changes.

    Attributes:
        features: inner channels; the output has four times as many.
        stride: of the 3x3 convolution and the projection.
        dtype: arithmetic.
    """

    features: int
    stride: int = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns features"]:
        def step(images, name, features, size, stride=1, scale_init=nn.initializers.ones):
            images = StandardizedConvolution(features, size, stride, self.dtype, name=f"convolution_{name}")(images)
            return GroupNorm(self.dtype, scale_init, name=f"norm_{name}")(images)

        residual, wide = images, EXPANSION * self.features
        if images.shape[-1] != wide or self.stride != 1:
            residual = step(images, "projection", wide, 1, self.stride)
        images = nn.relu(step(images, 1, self.features, 1))
        images = nn.relu(step(images, 2, self.features, 3, self.stride))
        # A unit starts as its residual alone.
        images = step(images, 3, wide, 1, scale_init=nn.initializers.zeros)
        return nn.relu(residual + images)


class ResNetStem(nn.Module):
    """7x7/2 convolution, 3x3/2 max-pool, then stages of bottleneck units; each stage after the first halves the map.

    Attributes:
        units: bottleneck units of each stage; () is the convolution and the pool alone.
        width: channels of the first convolution, a multiple of 32; each stage has twice its predecessor's.
        dtype: arithmetic.
    """

    units: tuple[int, ...]
    width: int = 64
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, images: Num[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns features"]:
        images = StandardizedConvolution(self.width, 7, 2, self.dtype, name="convolution_root")(
            images.astype(self.dtype)
        )
        images = nn.relu(GroupNorm(self.dtype, name="norm_root")(images))
        images = nn.max_pool(images, (3, 3), strides=(2, 2), padding="SAME")
        for stage, count in enumerate(self.units):
            for unit in range(count):
                stride = 2 if stage > 0 and unit == 0 else 1
                name = f"stage_{stage}_unit_{unit}"
                images = BottleneckUnit(self.width * 2**stage, stride, self.dtype, name=name)(images)
        return images


def stem_output(units: tuple[int, ...], width: int, image_size: tuple[int, int]) -> tuple[int, int, int]:
    """Height, width and channels of what `ResNetStem` makes of images of (height, width) `image_size`."""
    height, across = image_size
    for _ in range(2 + max(len(units) - 1, 0)):
        height, across = -(-height // 2), -(-across // 2)
    return height, across, EXPANSION * width * 2 ** (len(units) - 1) if units else width


def stem_flops(units: tuple[int, ...], width: int, image_size: tuple[int, int], channels: int) -> int:
    """Floating-point operations of the stem's convolutions for one image, a multiply-add counted as two."""
    total = 2 * -(-image_size[0] // 2) * -(-image_size[1] // 2) * 7 * 7 * channels * width
    height, across, inputs = stem_output((), width, image_size)
    for stage, count in enumerate(units):
        inner = width * 2**stage
        wide = EXPANSION * inner
        for unit in range(count):
            before = height * across
            if stage > 0 and unit == 0:
                height, across = -(-height // 2), -(-across // 2)
            after = height * across
            total += 2 * (before * inputs * inner + after * (9 * inner * inner + inner * wide))
            total += 2 * after * inputs * wide if unit == 0 else 0
            inputs = wide
    return total
