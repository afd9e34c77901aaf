"""The stem of hybrids: a ResNet whose feature map is split into patches (arXiv 2010.11929, section 3.1 and B.2).

It is the ResNet v2 of BiT (arXiv 1912.11370): weight-standardized convolutions and GroupNorm in bottleneck units. All
padding is SAME, which at stride 2 pads more at the end than at the start.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float, Num

from vit_jax.models.norm import EPSILON

EXPANSION = 4  # output channels of a unit per inner channel
GROUPS = 32


class StandardizedConvolution(nn.Module):
    """A convolution without bias whose kernel is standardized over height, width and inputs (arXiv 1903.10520).

    As in the published code, 1e-5 is added to the standard deviation, not to the variance.

    Attributes:
        features: number of output channels.
        size: height and width of the kernel.
        stride: stride in both directions.
        dtype: compute dtype of the convolution; the kernel is float32 and is standardized in float32.
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

    @nn.nowrap
    def matmul_flops(self, shape: tuple[int, ...]) -> int:
        """FLOPs of the convolution for images of this shape."""
        batch, height, width, channels = shape
        outputs = batch * -(-height // self.stride) * -(-width // self.stride) * self.features
        return 2 * outputs * self.size**2 * channels


class GroupNorm(nn.Module):
    """GroupNorm with 32 groups and statistics in float32.

    Attributes:
        dtype: dtype of the result.
        scale_init: initializer of the scale.
    """

    dtype: Dtype = jnp.float32
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, images: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        norm = nn.GroupNorm(GROUPS, epsilon=EPSILON, dtype=jnp.float32, scale_init=self.scale_init, name="norm")
        nn.share_scope(self, norm)
        return norm(images).astype(self.dtype)


class BottleneckUnit(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a residual connection, which is projected if the shape changes.

    Attributes:
        features: number of inner channels; the output has four times as many.
        stride: stride of the 3x3 convolution and the projection.
        dtype: compute dtype.
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
        # With zero scales a unit is initially the identity (or the projection).
        images = step(images, 3, wide, 1, scale_init=nn.initializers.zeros)
        return nn.relu(residual + images)


class ResNetStem(nn.Module):
    """7x7/2 convolution, 3x3/2 max-pool, then stages of bottleneck units; stages after the first halve the feature map.

    Attributes:
        units: number of bottleneck units of each stage; () for only the convolution and the pooling.
        width: channels of the first convolution, a multiple of 32; each stage has twice the channels of the one before.
        dtype: compute dtype.
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
    """Height, width and channels of the output of `ResNetStem` for images of (height, width) `image_size`."""
    height, across = image_size
    for _ in range(2 + max(len(units) - 1, 0)):
        height, across = -(-height // 2), -(-across // 2)
    return height, across, EXPANSION * width * 2 ** (len(units) - 1) if units else width


def stem_activation_bytes(units: tuple[int, ...], width: int, image_size: tuple[int, int], dtype: Dtype) -> int:
    """An estimate of the bytes of one image that the stem's backward pass reads."""
    height, across, _ = stem_output((), width, image_size)
    # Each unit keeps about seven maps of its inner width, among them the inputs and outputs of its norms.
    maps = 8 + 14 * sum(count / 2**stage for stage, count in enumerate(units))
    return int(jnp.dtype(dtype).itemsize * height * across * width * maps)
