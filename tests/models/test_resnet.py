import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models import variants
from vit_jax.models.resnet import BottleneckUnit, ResNetStem, StandardizedConvolution, stem_output
from vit_jax.models.vit import token_grid


def same(size, kernel, stride):
    """The SAME padding before and after the input."""
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


@pytest.mark.parametrize(("size", "stride"), [(1, 1), (3, 1), (3, 2), (7, 2)])
def test_convolution_standardises_its_kernel_and_pads_same(draw, randomise, size, stride):
    images = draw(1, 8, 7, 2)
    module = StandardizedConvolution(3, size, stride)
    kernel = randomise(module, images)["params"]["kernel"]
    with jax.default_matmul_precision("highest"):
        outputs = module.apply({"params": {"kernel": kernel}}, images)
    kernel = np.float64(kernel)
    kernel = (kernel - kernel.mean((0, 1, 2))) / (kernel.std((0, 1, 2)) + 1e-5)
    padded = np.pad(np.float64(images), ((0, 0), same(8, size, stride), same(7, size, stride), (0, 0)))
    for row in range(outputs.shape[1]):
        for column in range(outputs.shape[2]):
            window = padded[0, row * stride :, column * stride :][:size, :size]
            np.testing.assert_allclose(outputs[0, row, column], np.tensordot(window, kernel, 3), atol=1e-4)


@pytest.mark.parametrize("units", [(), (1,), (1, 2), (1, 1, 1)])
@pytest.mark.parametrize("size", [(32, 32), (33, 70), (16, 5)])
def test_the_map_has_the_size_that_is_foretold(units, size):
    module = ResNetStem(units, 32)
    images = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    outputs, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), images)
    assert outputs.shape == (2, *stem_output(units, 32, size))


@pytest.mark.slow
def test_a_unit_starts_as_its_residual(draw):
    images = jnp.abs(draw(1, 3, 3, 128))
    module = BottleneckUnit(32)
    variables = jax.jit(module.init)(jax.random.key(0), images)
    np.testing.assert_array_equal(jax.jit(module.apply)(variables, images), images)


def test_sixteen_pixels_are_one_token_of_r50_b16(small):
    fields = {key: variants.fields("R50+B/16")[key] for key in ("stem", "patch_size")}
    assert token_grid(small(**fields), (16, 16)) == (1, 1)
    assert token_grid(small(**fields), (224, 160)) == (14, 10)


def test_what_does_not_fit_is_refused(small, draw):
    model = small(stem=(), stem_width=32, patch_size=8)
    with pytest.raises(
        ValueError, match="the stem's feature map of an image of 48x64 is 12x16: a patch of 8 does not divide"
    ):
        token_grid(model, (48, 64))
    with pytest.raises(ValueError, match="needs images"):
        model.init(jax.random.key(0), draw(1, 4, 8))
