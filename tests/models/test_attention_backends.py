"""Every attention backend compared with the plain one, which is compared with numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mostly_slow

from vit_jax import config as options
from vit_jax.models import attention_backends
from vit_jax.models.attention import Attention
from vit_jax.models.attention_backends import BACKENDS, Device, Shape, candidates, obstacle
from vit_jax.models.block_config import BlockConfig
from vit_jax.models.positions import Terms

pytestmark = pytest.mark.usefixtures("quick_compilation")
CPU, TPU = Device("cpu"), Device("tpu")
H200, A100, T4, AMD = Device("gpu", (9, 0)), Device("gpu", (8, 0)), Device("gpu", (7, 5)), Device("gpu")
ON_GPU = jax.default_backend() == "gpu"


def attention_layer(heads, **options):
    return Attention(BlockConfig(heads=heads, mlp_width=1, **options))


def shape(tokens=65, size=64, dtype="bfloat16", **more):
    return Shape(batch=8, tokens=tokens, heads=2, size=size, dtype=dtype, **more)


def draws(*shape, count=1, dtype=jnp.float32):
    chance = np.random.default_rng(shape[1])
    return [jnp.asarray(chance.normal(size=shape), dtype) for _ in range(count)]


def results(function, direction, *arguments):
    """The function's value, and the gradients of its product with a direction."""

    @jax.jit
    def both(direction, *arguments):
        value, pull = jax.vjp(function, *arguments)
        return value, *pull(direction)

    return both(direction, *arguments)


def assert_close(found, wanted, tolerance):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), atol=tolerance, rtol=tolerance)


def available(name, tokens, size, dtype, **more):
    """Skips where this machine cannot run a backend; the tolerance of its numbers."""
    reason = obstacle(name, Device.of(jax.devices()[0]), shape(tokens, size, jnp.dtype(dtype).name, **more))
    if reason:
        pytest.skip(reason)
    return 0.03 if ON_GPU else 5e-6  # half precision, or tensor cores


@pytest.mark.parametrize("name", [name for name in BACKENDS if BACKENDS[name].attend_fused and name != "plain"])
@pytest.mark.parametrize("tokens, heads, size", [(5, 2, 16), (65, 3, 64), (197, 1, 32)])
def test_a_fused_backend_equals_plain_attention_forward_and_backward(name, tokens, heads, size):
    tolerance = available(name, tokens, size, jnp.float32)
    (fused,), (direction,) = draws(2, tokens, 3 * heads * size), draws(2, tokens, heads * size)
    found = results(lambda fused: BACKENDS[name].attend_fused(fused, heads), direction, fused)
    wanted = results(lambda fused: attention_backends.plain_fused(fused, heads), direction, fused)
    assert_close(found, wanted, tolerance)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "plain"])
def test_a_backend_equals_plain_attention_of_queries_keys_and_values_apart(name, biased):
    tokens, heads, size = 18, 2, 16
    dtype = jnp.bfloat16 if name == "cudnn" else jnp.float32
    tolerance = available(name, tokens, size, dtype, bias=biased)
    queries, keys, values, direction = draws(2, tokens, heads, size, count=4, dtype=dtype)
    bias = draws(1, heads, tokens, tokens) if biased else [None]
    found = results(lambda *parts: BACKENDS[name].attend(*parts, None), direction, queries, keys, values, *bias)
    wanted = results(attention_backends.plain, direction, queries, keys, values, *bias)
    assert_close(found, wanted, 3 * tolerance)


def test_plain_attention_by_hand():
    """Two tokens, one head of one channel: every number written out."""
    fused = jnp.array([[[1.0, 2.0, 3.0], [-1.0, 0.5, 5.0]]])  # query, key, value of each
    first = np.exp([1 * 2, 1 * 0.5]) / np.exp([1 * 2, 1 * 0.5]).sum() @ [3, 5]
    second = np.exp([-1 * 2, -1 * 0.5]) / np.exp([-1 * 2, -1 * 0.5]).sum() @ [3, 5]
    np.testing.assert_allclose(attention_backends.plain_fused(fused, 1)[0, :, 0], [first, second], rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 60.0])
def test_extreme_scores_stay_finite(scale):
    (fused,), (direction,) = draws(1, 9, 96), draws(1, 9, 32)
    found, plain = (
        results(lambda fused, attend=BACKENDS[name].attend_fused: attend(fused, 2), direction, scale * fused)
        for name in ("heads_first", "plain")
    )
    np.testing.assert_allclose(found[0], plain[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(found[1], plain[1], rtol=1e-3, atol=1e-4 * scale)


# Attention itself: what a call needs beside queries, keys and values.
CALLS = {
    "bias": {"positions": True},
    "rotation": {"rotation": True},
    "qk_norm": {"qk_norm": True},
    "lengths": {"lengths": True},
}


def call(kernel, dtype, *, positions=False, rotation=False, qk_norm=False, lengths=False):
    """An attention layer over 7 tokens with some of the options: its outputs and the gradients of everything."""
    width, count = 16, 7
    tokens, direction = draws(3, count, width, count=2)
    (bias,) = draws(1, 2, count, count)
    (angles,) = draws(count, 4)
    terms = Terms(bias=bias if positions else None, rotation=(jnp.cos(angles), jnp.sin(angles)) if rotation else None)
    layer = attention_layer(2, dtype=dtype, qk_norm=qk_norm, attention_kernel=kernel)
    mask = jnp.array([7, 3, 1]) if lengths else None
    variables = attention_layer(2, qk_norm=qk_norm).init(jax.random.key(1), tokens)

    def apply(variables, tokens, bias):
        changed = terms if bias is None else terms._replace(bias=bias)
        return layer.apply(variables, tokens.astype(dtype), mask, positions=changed).astype(jnp.float32)

    return results(apply, direction, variables, tokens, terms.bias)


@pytest.mark.parametrize("options", mostly_slow(list(CALLS), 3))
def test_heads_first_attention_computes_every_option_as_plain_does(options):
    assert_close(call("heads_first", jnp.float32, **CALLS[options]), call("plain", jnp.float32, **CALLS[options]), 1e-5)


@pytest.fixture
def as_cudnn(monkeypatch):
    """Replaces cuDNN by a backend with its limits (even token counts); returns the arguments of its last call."""
    arguments = {}

    def attend(queries, keys, values, bias, lengths):
        arguments.update(tokens=queries.shape[1], bias=bias, lengths=lengths)
        assert queries.shape[1] % 2 == 0
        return attention_backends.plain(queries, keys, values, bias, lengths)

    cudnn = BACKENDS["cudnn"]
    monkeypatch.setitem(BACKENDS, "cudnn", attention_backends.Backend(attend, None, True, True, cudnn.multiple))
    return arguments


@pytest.mark.parametrize("options", [None, *CALLS])
def test_a_padded_token_changes_no_number(as_cudnn, options):
    """Seven tokens, where the backend takes even counts alone: outputs and all gradients are those without padding."""
    options = CALLS.get(options, {})
    found, wanted = call("cudnn", jnp.float32, **options), call("plain", jnp.float32, **options)
    assert as_cudnn["tokens"] == 8
    assert_close(found, wanted, 1e-5)
    assert (as_cudnn["lengths"] is None) == ("positions" in options)  # a padded bias hides the padded key itself


def test_even_token_counts_are_not_padded(as_cudnn, draw):
    tokens = draw(2, 6, 16)
    layer = attention_layer(2, attention_kernel="cudnn")
    layer.apply(layer.init(jax.random.key(0), tokens), tokens)
    assert as_cudnn["tokens"] == 6 and as_cudnn["lengths"] is None


def test_three_products_have_the_parameters_and_numbers_of_one(as_cudnn, draw):
    """Queries, keys and values from slices of one kernel: a checkpoint serves every backend."""
    tokens = draw(2, 6, 16)
    apart, fused = attention_layer(2, attention_kernel="cudnn"), attention_layer(2)
    variables = fused.init(jax.random.key(0), tokens)
    jax.tree.map(np.testing.assert_array_equal, variables, apart.init(jax.random.key(0), tokens))
    np.testing.assert_allclose(apart.apply(variables, tokens), fused.apply(variables, tokens), atol=1e-6)


def test_lengths_are_the_mask_that_they_stand_for(draw):
    tokens, lengths = draw(3, 7, 12), jnp.array([7, 3, 1])
    layer = attention_layer(3)
    variables = layer.init(jax.random.key(0), tokens)
    mask = (jnp.arange(7) < lengths[:, None])[:, None, None]
    np.testing.assert_allclose(layer.apply(variables, tokens, lengths), layer.apply(variables, tokens, mask), atol=1e-6)


@pytest.mark.slow
def test_what_no_backend_has_is_computed_step_by_step(draw):
    """A mask, dropout and sown weights, with a backend chosen; and its result where there are none."""
    tokens = draw(2, 7, 12)
    plain, fast = attention_layer(3), attention_layer(3, attention_kernel="heads_first")
    variables = plain.init(jax.random.key(0), tokens)
    np.testing.assert_allclose(fast.apply(variables, tokens), plain.apply(variables, tokens), atol=1e-6)
    mask = jnp.ones((1, 1, 7, 7), bool).at[..., 3].set(False)
    np.testing.assert_array_equal(fast.apply(variables, tokens, mask), plain.apply(variables, tokens, mask))
    _, seen = fast.apply(variables, tokens, mutable=["intermediates"])
    np.testing.assert_allclose(seen["intermediates"]["weights"][0].sum(-1), 1, rtol=1e-6)
    dropping = attention_layer(3, attention_dropout=0.5, attention_kernel="heads_first")
    random = {"dropout": jax.random.key(1)}
    dropped, kept = (dropping.apply(variables, tokens, train=train, rngs=random) for train in (True, False))
    assert np.abs(dropped - kept).max() > 1e-3


TOKENS = (16, 17, 64, 65, 66, 196, 197, 200, 257)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "device, first", [(CPU, "heads_first"), (TPU, "plain"), (AMD, "heads_first"), (T4, "heads_first")]
)
def test_where_there_are_no_fused_kernels_the_candidates_need_none(device, first, dtype, tokens):
    assert candidates(device, [shape(tokens, dtype=dtype)])[0] == first


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("device", [H200, A100])
def test_in_bfloat16_cudnn_is_a_candidate_at_every_token_count(device, tokens):
    assert "cudnn" in candidates(device, [shape(tokens)])
    assert "cudnn" not in candidates(device, [shape(tokens, dtype="float32")])


def test_a_candidate_can_compute_all_shapes():
    assert "cudnn" in candidates(H200, [shape()]) and "cudnn" not in candidates(H200, [shape(), shape(size=12)])


@pytest.mark.parametrize(
    "name, device, shape, words",
    [
        ("cudnn", CPU, shape(), "it needs an NVIDIA GPU, and this is a CPU"),
        ("pallas", TPU, shape(), "it needs an NVIDIA GPU, and this is a TPU"),
        ("cudnn", AMD, shape(), "it needs an NVIDIA GPU, and this is an AMD GPU"),
        ("cudnn", T4, shape(), "compute capability 8.0 or newer, and this GPU has 7.5"),
        ("cudnn", H200, shape(dtype="float32"), "the compute dtype is float32"),
        ("cudnn", H200, shape(size=12), "a multiple of 8 channels, up to 256, and these have 12"),
        ("cudnn", A100, shape(size=256), "up to 128, and these have 256"),
        ("pallas", H200, shape(bias=True), "does not support a bias"),
        ("heads_first", CPU, shape(lengths=True), "different numbers of tokens"),
    ],
)
def test_why_a_backend_cannot_compute_a_shape(name, device, shape, words):
    assert words in obstacle(name, device, shape)


def test_a_device_is_recognised_by_what_jax_says_of_it():
    class Fake:
        def __init__(self, platform, **more):
            self.platform = platform
            self.__dict__.update(more)

    assert Device.of(Fake("gpu", compute_capability="9.0")) == H200
    assert Device.of(Fake("gpu", compute_capability="gfx942")) == AMD
    assert Device.of(Fake("cpu")) == CPU


def test_a_config_may_ask_for_every_backend():
    assert options.OPTIONS["model"]["attention_kernel"].choices == ("auto", *BACKENDS)
