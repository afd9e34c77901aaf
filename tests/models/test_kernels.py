"""Every kernel of attention against the one that is plain to read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.models import kernels, pallas_attention
from vit_jax.models.attention import Attention

ON_GPU = jax.default_backend() == "gpu"


def weigh(kernel, fused, heads, direction):
    """The mixed values, and the gradient of their product with a direction."""
    mixed, pull = jax.vjp(lambda fused: kernel(fused, heads), fused)
    return mixed, pull(direction)[0]


def draws(batch, tokens, width, dtype=jnp.float32):
    chance = np.random.default_rng(tokens)
    shapes = (batch, tokens, 3 * width), (batch, tokens, width)
    return [jnp.asarray(chance.normal(size=shape), dtype) for shape in shapes]


@pytest.mark.parametrize("name", [name for name in kernels.KERNELS if name != "plain"])
@pytest.mark.parametrize("tokens, heads, size", [(5, 2, 16), (65, 3, 64), (197, 1, 32)])
def test_a_kernel_is_the_plain_one_forward_and_backward(name, tokens, heads, size):
    fused, direction = draws(2, tokens, heads * size, jnp.bfloat16 if name == "cudnn" else jnp.float32)
    kernel, tolerance = kernels.KERNELS[name], 5e-6
    if name == "pallas" and not ON_GPU:
        kernel = lambda fused, heads: pallas_attention.attend_fused(fused, heads, interpret=True)  # noqa: E731
    elif kernels.obstacle(name, jax.default_backend(), tokens, size, fused.dtype):
        pytest.skip(kernels.obstacle(name, jax.default_backend(), tokens, size, fused.dtype))
    if ON_GPU:
        tolerance = 0.03  # half precision, or tensor cores
    mixed, gradient = weigh(kernel, fused, heads, direction)
    plain_mixed, plain_gradient = weigh(kernels.plain, fused, heads, direction)
    np.testing.assert_allclose(mixed.astype(np.float32), plain_mixed.astype(np.float32), atol=tolerance)
    np.testing.assert_allclose(gradient.astype(np.float32), plain_gradient.astype(np.float32), atol=tolerance)


def test_the_plain_kernel_by_hand():
    """Two tokens, one head of one channel: every number written out."""
    fused = jnp.array([[[1.0, 2.0, 3.0], [-1.0, 0.5, 5.0]]])  # query, key, value of each
    first = np.exp([1 * 2, 1 * 0.5]) / np.exp([1 * 2, 1 * 0.5]).sum() @ [3, 5]
    second = np.exp([-1 * 2, -1 * 0.5]) / np.exp([-1 * 2, -1 * 0.5]).sum() @ [3, 5]
    np.testing.assert_allclose(kernels.plain(fused, 1)[0, :, 0], [first, second], rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_extreme_scores_stay_finite(scale):
    fused, direction = draws(1, 9, 32)
    mixed, gradient = weigh(kernels.heads_first, scale * fused, 2, direction)
    plain = weigh(kernels.plain, scale * fused, 2, direction)
    np.testing.assert_allclose(mixed, plain[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradient, plain[1], rtol=1e-3, atol=1e-4 * scale)


def test_what_a_kernel_does_not_know_is_computed_step_by_step(draw):
    """A mask, dropout and a look at the weights, with a kernel chosen; and its result where there are none."""
    tokens = draw(2, 7, 12)
    plain, fast = Attention(3), Attention(3, kernel="heads_first")
    variables = plain.init(jax.random.key(0), tokens)
    np.testing.assert_allclose(fast.apply(variables, tokens), plain.apply(variables, tokens), atol=1e-6)
    mask = jnp.ones((1, 1, 7, 7), bool).at[..., 3].set(False)
    np.testing.assert_array_equal(fast.apply(variables, tokens, mask), plain.apply(variables, tokens, mask))
    _, seen = fast.apply(variables, tokens, mutable=["intermediates"])
    np.testing.assert_allclose(seen["intermediates"]["weights"][0].sum(-1), 1, rtol=1e-6)
    dropping = Attention(3, dropout=0.5, kernel="heads_first")
    apply = lambda train: dropping.apply(variables, tokens, train=train, rngs={"dropout": jax.random.key(1)})  # noqa: E731
    assert np.abs(apply(True) - apply(False)).max() > 1e-3


@pytest.mark.parametrize(
    "platform, size, dtype, name",
    [
        ("cpu", 64, "float32", "heads_first"),
        ("gpu", 64, "bfloat16", "cudnn"),
        ("gpu", 60, "bfloat16", "plain"),
        ("gpu", 64, "float32", "plain"),
        ("tpu", 64, "bfloat16", "plain"),
    ],
)
def test_what_is_chosen_can_be_used(platform, size, dtype, name):
    assert kernels.choose(platform, size, dtype) == name
    assert kernels.obstacle(name, platform, 65, size, dtype) is None


@pytest.mark.parametrize(
    "name, platform, tokens, size, words",
    [
        ("cudnn", "cpu", 65, 64, "this is a cpu"),
        ("pallas", "tpu", 65, 64, "this is a tpu"),
        ("pallas", "gpu", 1025, 64, "at most 1024 tokens"),
        ("pallas", "gpu", 65, 80, "heads of 16, 32, 64 or 128"),
        ("cudnn", "gpu", 65, 12, "multiple of 8"),
    ],
)
def test_why_a_kernel_cannot_be_used(name, platform, tokens, size, words):
    assert words in kernels.obstacle(name, platform, tokens, size, jnp.bfloat16)
