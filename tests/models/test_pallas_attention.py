"""The Pallas attention kernels, interpreted on a CPU, compared with a float64 NumPy implementation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vit_jax.models import pallas_attention
from vit_jax.models.pallas_attention import CONFIGS, attend, attend_fused, obstacle

BATCH = 2
LONG = pytest.param(130, marks=pytest.mark.slow)  # the kernels for sequences of more than 80 tokens
pytestmark = pytest.mark.usefixtures("quick_compilation")


def reference(queries, keys, values, direction, lengths):
    """Attention output [batch, tokens, heads, size] and the gradients of sum(output * direction), in float64."""
    queries, keys, values, direction = (np.float64(array) for array in (queries, keys, values, direction))
    scale = queries.shape[-1] ** -0.5
    valid = np.arange(queries.shape[1]) < np.asarray(lengths)[:, None, None, None]
    scores = np.where(valid, np.einsum("bqhd,bkhd->bhqk", queries, keys) * scale, -np.inf)
    maximum = scores.max(-1, keepdims=True)
    weights = np.exp(scores - np.where(np.isfinite(maximum), maximum, 0))
    weights /= np.maximum(weights.sum(-1, keepdims=True), 1e-300)
    of_weights = np.einsum("bqhd,bkhd->bhqk", direction, values)
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdims=True)) * scale
    return (
        np.einsum("bhqk,bkhd->bqhd", weights, values),
        np.einsum("bhqk,bkhd->bqhd", of_scores, keys),
        np.einsum("bhqk,bqhd->bkhd", of_scores, queries),
        np.einsum("bhqk,bqhd->bkhd", weights, direction),
    )


def draw(tokens, heads, size, dtype=jnp.float32, scale=1.0):
    """Queries, keys, values and an output gradient [batch, tokens, heads, size]."""
    generator = np.random.default_rng(tokens)
    return [jnp.asarray(scale * generator.normal(size=(BATCH, tokens, heads, size)), dtype) for _ in range(4)]


@functools.partial(jax.jit, static_argnames=("config",))
def run(queries, keys, values, direction, lengths=None, config=None):
    """Output and gradients of `attend`."""
    function = functools.partial(attend, lengths=lengths, config=config, interpret=True)
    output, pull = jax.vjp(function, queries, keys, values)
    return output, *pull(direction)


@functools.partial(jax.jit, static_argnames=("config",))
def run_fused(queries, keys, values, direction, config=None):
    """Output and gradients of `attend_fused`, in the form that `run` gives them."""
    batch, tokens, heads, _ = queries.shape
    fused = jnp.concatenate([array.reshape(batch, tokens, -1) for array in (queries, keys, values)], -1)
    function = functools.partial(attend_fused, heads=heads, config=config, interpret=True)
    output, pull = jax.vjp(function, fused)
    gradients = jnp.split(pull(direction.reshape(output.shape))[0], 3, axis=-1)
    return [array.reshape(queries.shape) for array in (output, *gradients)]


def assert_close(actual, expected, tolerance):
    """Maximum error relative to the largest magnitude of each array."""
    for name, one, other in zip(("output", "queries", "keys", "values"), actual, expected, strict=True):
        one, other = np.float64(one), np.float64(other)
        assert np.isfinite(one).all(), name
        assert np.abs(one - other).max() <= tolerance * max(np.abs(other).max(), 1e-3), name


@pytest.mark.parametrize(
    "tokens, heads, size, config",
    [
        (5, 2, 16, "single_pass"),
        (16, 2, 16, "single_pass"),
        (17, 1, 64, "single_pass"),
        pytest.param(65, 2, 64, "single_pass", marks=pytest.mark.slow),
        (65, 2, 16, "two_pass_64"),
        pytest.param(197, 1, 16, "single_pass", marks=pytest.mark.slow),
        pytest.param(197, 2, 64, "two_pass_32", marks=pytest.mark.slow),
        pytest.param(257, 1, 16, "two_pass_64", marks=pytest.mark.slow),
        (65, 1, 64, "two_pass_16"),
    ],
)
def test_values_and_gradients(tokens, heads, size, config):
    arrays = draw(tokens, heads, size)
    expected = reference(*arrays, [tokens] * BATCH)
    assert_close(run_fused(*arrays, config=CONFIGS[config]), expected, 2e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config, tokens, lengths", [(name, 70, (0, 66)) for name in CONFIGS] + [("two_pass_64", 130, (999, 65))]
)
def test_keys_after_the_length_are_ignored(config, tokens, lengths):
    """Also where no key is valid: the output and the gradients are then 0."""
    arrays = draw(tokens, 1, 16)
    results = run(*arrays, jnp.array(lengths, jnp.int32), config=CONFIGS[config])
    assert_close(results, reference(*arrays, lengths), 2e-6)
    for name, result in zip(("keys", "values"), results[2:], strict=True):
        for example, length in enumerate(lengths):
            assert not np.any(result[example, length:]), name


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [20, LONG])
def test_separate_and_fused_inputs_give_equal_results(tokens):
    arrays = draw(tokens, 3, 16)
    for one, other in zip(run(*arrays), run_fused(*arrays), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("tokens", [65, LONG])
def test_bfloat16(tokens):
    """Weights and gradients of scores are rounded to 8 bits before the matmuls, the results after them."""
    arrays = draw(tokens, 1, 64, jnp.bfloat16)
    results = run(*arrays)
    assert all(result.dtype == jnp.bfloat16 for result in results)
    assert_close(results, reference(*arrays, [tokens] * BATCH), 0.01)


@pytest.mark.parametrize("config", ["single_pass", "two_pass_32"])
def test_large_scores_stay_finite(config):
    """Scores of about 1,000, of both signs: without a running maximum, exp would overflow or all weights be 0."""
    arrays = draw(65, 1, 16, scale=12.0)
    assert_close(run(*arrays, config=CONFIGS[config]), reference(*arrays, [65] * BATCH), 1e-3)


@pytest.mark.skipif(len(jax.devices()) < 2, reason="needs two devices")
@pytest.mark.parametrize("tokens", [20, LONG])
def test_every_device_computes_its_own_examples(tokens):
    arrays = draw(tokens, 1, 16)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    spread = [jax.device_put(array, NamedSharding(mesh, PartitionSpec("data"))) for array in arrays]
    compiled = run_fused.lower(*spread, config=CONFIGS["single_pass"]).compile()
    assert "all-gather" not in compiled.as_text()
    assert_close(compiled(*spread), run_fused(*arrays, config=CONFIGS["single_pass"]), 1e-6)


@pytest.mark.slow
def test_vmap():
    arrays = draw(20, 1, 16)
    pairs = [jnp.stack([array, -array]) for array in arrays[:3]] + [arrays[3]]
    results = jax.vmap(run, in_axes=(0, 0, 0, None))(*pairs)
    for index, sign in enumerate((1, -1)):
        expected = run(*(sign * array for array in arrays[:3]), arrays[3])
        assert_close([result[index] for result in results], expected, 1e-6)


@pytest.mark.parametrize("config", CONFIGS)
def test_lowering_for_a_gpu(lower_for_gpu, config):
    def both(queries, keys, values, gradient, lengths):
        function = functools.partial(attend, lengths=lengths, config=CONFIGS[config])
        output, pull = jax.vjp(function, queries, keys, values)
        return output, pull(gradient)

    array = jax.ShapeDtypeStruct((3, 65, 2, 64), jnp.bfloat16)
    text = lower_for_gpu(both, array, array, array, array, jax.ShapeDtypeStruct((3,), jnp.int32))
    assert text.count("xla.gpu.triton") == (2 if config == "single_pass" else 3)


@pytest.mark.parametrize(
    "tokens, size, dtype, words",
    [
        (1025, 64, "bfloat16", "at most 1024 tokens"),
        (65, 80, "bfloat16", "16, 32, 64 or 128 channels"),
        (65, 64, "float64", "float16, bfloat16 or float32"),
    ],
)
def test_what_the_kernels_cannot_take(tokens, size, dtype, words):
    assert words in obstacle(tokens, size, dtype)
    assert obstacle(257, 64, "bfloat16") is None


@pytest.mark.parametrize("columns, words", [(3 * 2 * 80, "16, 32, 64 or 128 channels"), (100, "100 columns")])
def test_shapes_that_are_refused(columns, words):
    with pytest.raises(ValueError, match=words):
        attend_fused(jnp.zeros((1, 65, columns)), 2, interpret=True)


def test_a_jax_without_the_triton_backend(monkeypatch):
    monkeypatch.setattr(pallas_attention, "triton", None)
    assert "no Triton backend" in obstacle(65, 64, "bfloat16")
