"""The attention backends: functions from queries, keys and values to weighted means of the values.

All compute the same function. `plain` is the reference; the others are faster, and tests compare them with it. Only
`plain` supports arbitrary masks and access to the weights, for attention dropout and for looking at them.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vit_jax.models import masking

Heads = Float[Array, "batch tokens heads size"]
Fused = Float[Array, "batch tokens fused"]
Mixed = Float[Array, "batch tokens width"]
Bias = Float[Array, "1 heads tokens tokens"]
Lengths = Int[Array, " batch"]

MAX_CUDNN_HEAD_SIZE = {(8, 0): 128, (9, 0): 256}  # by the compute capability from which on it holds


@dataclasses.dataclass(frozen=True)
class Device:
    """The properties of a device that decide which backends it supports.

    Attributes:
        platform: JAX's name of it: 'cpu', 'gpu' or 'tpu'.
        capability: CUDA compute capability, such as (9, 0); None for everything but NVIDIA GPUs.
    """

    platform: str
    capability: tuple[int, int] | None = None

    @classmethod
    def of(cls, device: Any) -> "Device":
        """The properties of a `jax.Device`."""
        major, dot, minor = str(getattr(device, "compute_capability", "")).partition(".")
        known = dot and major.isdigit() and minor.isdigit()  # AMD's are names such as 'gfx942'
        return cls(device.platform, (int(major), int(minor)) if known else None)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of one attention call, and what it requires of a backend.

    Attributes:
        batch: examples per device.
        tokens: tokens per example.
        heads: number of heads.
        size: channels per head.
        dtype: name of the compute dtype.
        bias: whether a bias is added to the scores.
        lengths: whether the number of valid tokens differs between examples.
        transformed: whether queries and keys are normalized or rotated between projection and attention.
        dropout: whether training applies attention dropout, which only 'plain' supports.
    """

    batch: int
    tokens: int
    heads: int
    size: int
    dtype: str
    bias: bool = False
    lengths: bool = False
    transformed: bool = False
    dropout: bool = False


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation.

    Attributes:
        attend: (queries, keys, values, bias, lengths) -> the weighted means of the values. `bias` is added to the
            scaled scores; keys from an example's length on have no weight. Either may be None.
        attend_fused: (fused, heads) -> the same, of queries, keys and values side by side in the last axis, heads
            within each, as one projection leaves them; None if the backend reads the outputs of three projections.
        takes_bias: whether `bias` is supported.
        takes_lengths: whether `lengths` is supported.
        multiple: token counts are padded to a multiple of it (see `attention.Attention`).
    """

    attend: Callable[[Heads, Heads, Heads, Bias | None, Lengths | None], Heads]
    attend_fused: Callable[[Fused, int], Mixed] | None = None
    takes_bias: bool = False
    takes_lengths: bool = False
    multiple: int = 1


def split(fused: Fused, heads: int) -> tuple[Heads, Heads, Heads]:
    """Queries, keys and values of their fused projection: one transpose for all three."""
    queries, keys, values = jnp.moveaxis(fused.reshape(*fused.shape[:2], 3, heads, -1), 2, 0)
    return queries, keys, values


def plain(
    queries: Float[Array, "batch queries heads size"],
    keys: Heads,
    values: Heads,
    bias: Bias | None = None,
    lengths: Lengths | None = None,
    mask: Bool[Array, "#batch #heads #queries tokens"] | None = None,
    on_weights: Callable[[jax.Array], jax.Array] | None = None,
) -> Float[Array, "batch queries heads size"]:
    """softmax(q k^T / sqrt(size) + bias) v of each head (arXiv 2010.11929, appendix A), with the softmax in float32.

    Args:
        queries: may be fewer or more than keys and values.
        keys: see `Backend.attend`, as for the arguments after it.
        values: one for each key.
        bias: added to the scaled scores.
        lengths: number of valid keys of each example.
        mask: True where a query may attend to a key; at most one of `lengths` and `mask` is given.
        on_weights: is called with the weights [batch, heads, queries, keys] and returns those to use.
    """
    if lengths is not None:
        if mask is not None:
            raise ValueError("lengths and mask are both given\n  allowed: at most one of them")
        mask = key_mask(lengths, keys.shape[1])
    weights = attention_weights(queries, keys, mask, bias)
    if on_weights is not None:
        weights = on_weights(weights)
    return jnp.einsum("bhqk,bkhd->bqhd", weights.astype(queries.dtype), values)


def observed(module: nn.Module, weights: jax.Array) -> jax.Array:
    """Sows the weights of a module into 'intermediates', and returns those to use: plus 'perturbations', if given.

    The gradient with respect to a perturbation of zeros is that with respect to the weights.
    """
    module.sow("intermediates", "weights", weights)
    if module.has_variable("perturbations", "weights"):
        weights = weights + module.get_variable("perturbations", "weights")
    return weights


def plain_fused(fused: Fused, heads: int) -> Mixed:
    """`plain`, of a fused projection."""
    return plain(*split(fused, heads)).reshape(*fused.shape[:2], -1)


def key_mask(lengths: Lengths, tokens: int) -> jax.Array:
    """True for the keys [batch, 1, 1, tokens] before each example's length."""
    masking.check_lengths("lengths", lengths, len(lengths))
    return (jnp.arange(tokens) < lengths[:, None])[:, None, None]


def attention_weights(
    queries: Float[Array, "batch queries heads size"],
    keys: Float[Array, "batch keys heads size"],
    mask: jax.Array | None = None,
    bias: Float[Array, "#batch heads queries keys"] | None = None,
) -> Float[Array, "batch heads queries keys"]:
    """Softmax of the scaled scores, always in float32.

    Scores are divided by the square root of the *head* size; then `bias` is added. A key whose `mask` (boolean,
    [#batch, #heads, #queries, keys]) is False has a weight of exactly 0; a query without any key has only zeros.

    Raises:
        TypeError: the mask is not boolean.
        ValueError: the shape of the mask is wrong.
    """
    if mask is not None:
        batch, count, heads, _ = queries.shape
        masking.check_mask("mask", mask, (batch, heads, count, keys.shape[1]))
    scores = jnp.einsum("bqhd,bkhd->bhqk", queries, keys, preferred_element_type=jnp.float32)
    scores = scores * queries.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if mask is None:
        return jax.nn.softmax(scores, axis=-1)
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    return jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0.0)


def _heads_first_attend(
    queries: Heads, keys: Heads, values: Heads, bias: Bias | None = None, lengths: Lengths | None = None
) -> Heads:
    if lengths is not None:
        raise ValueError("heads_first does not support lengths\n  use the backend plain")
    return _heads_first(queries, keys, values, bias)


@jax.custom_vjp
def _heads_first(queries: Heads, keys: Heads, values: Heads, bias: Bias | None) -> Heads:
    """Attention with heads before tokens in all arrays, so that each matmul has a form in which CPUs are fast.

    The backward pass is written by hand: it keeps queries, keys, values and weights, and computes the term that all
    weights of a query share from the output (arXiv 2205.14135, appendix B.4), not by another pass over the weights.
    """
    return _heads_first_forward(queries, keys, values, bias)[0]


def _heads_first_forward(queries: Heads, keys: Heads, values: Heads, bias: Bias | None) -> tuple[jax.Array, tuple]:
    heads = queries.shape[2]
    parts = tuple(_size_last(part.reshape(*part.shape[:2], -1), heads) for part in (queries, keys, values))
    mixed, weights = _weigh(*parts, bias)
    mixed = _heads_last(mixed, heads).astype(queries.dtype).reshape(queries.shape)
    # Without a bias None is kept, as its gradient is None too.
    return mixed, (*parts, weights, mixed, None if bias is None else jnp.zeros((), bias.dtype))


def _heads_first_backward(kept: tuple, gradient: Heads) -> tuple:
    *parts, weights, mixed, bias = kept
    shape, heads = mixed.shape, mixed.shape[2]
    flat = (mixed.reshape(*shape[:2], -1), gradient.reshape(*shape[:2], -1))
    *gradients, of_scores = _gradients(*parts, weights, *flat, heads)
    gradients = [_heads_last(part, heads).astype(gradient.dtype).reshape(shape) for part in gradients]
    if bias is None:
        return (*gradients, None)
    of_scores = of_scores.reshape(-1, heads, *of_scores.shape[1:])
    return (*gradients, of_scores.sum(0, keepdims=True, dtype=jnp.float32).astype(bias.dtype))


_heads_first.defvjp(_heads_first_forward, _heads_first_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def heads_first_fused(fused: Fused, heads: int) -> Mixed:
    """`heads_first`, of a fused projection: one transpose for queries, keys and values."""
    return _heads_first_fused(fused, heads)[0]


def _heads_first_fused(fused: Fused, heads: int) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    batch, tokens, width = fused.shape[0], fused.shape[1], fused.shape[2] // 3
    parts = fused.reshape(batch, tokens, 3, heads, width // heads).transpose(2, 0, 3, 1, 4)
    queries, keys, values = parts.reshape(3, batch * heads, tokens, width // heads)
    mixed, weights = _weigh(queries, keys, values)
    mixed = _heads_last(mixed, heads).astype(fused.dtype)
    return mixed, (queries, keys, values, weights, mixed)


def _heads_first_fused_backward(heads: int, kept: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array]:
    *gradients, _ = _gradients(*kept, gradient, heads)
    parts = [_heads_last(part, heads) for part in gradients]
    return (jnp.concatenate(parts, axis=-1).astype(gradient.dtype),)


heads_first_fused.defvjp(_heads_first_fused, _heads_first_fused_backward)

_matmul = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _weigh(
    queries: jax.Array, keys: jax.Array, values: jax.Array, bias: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Weighted means and weights; all arrays are [batch * heads, tokens, ...]."""
    scores = _matmul("nqd,nkd->nqk", queries, keys) * queries.shape[-1] ** -0.5
    if bias is not None:
        scores = (scores.reshape(-1, *bias.shape[1:]) + bias).reshape(scores.shape)
    weights = jax.nn.softmax(scores, axis=-1).astype(queries.dtype)
    return _matmul("nqk,nkd->nqd", weights, values), weights


def _gradients(
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    weights: jax.Array,
    mixed: jax.Array,
    gradient: jax.Array,
    heads: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of queries, keys, values and scores; `mixed` and its gradient are [batch, tokens, width]."""
    scale = queries.shape[-1] ** -0.5
    shared = _size_last(gradient * mixed, heads).sum(-1, keepdims=True)
    gradient = _size_last(gradient, heads)
    of_values = _matmul("nqk,nqd->nkd", weights, gradient)
    of_weights = _matmul("nqd,nkd->nqk", gradient, values)
    of_scores = (weights * (of_weights - shared) * scale).astype(weights.dtype)
    of_queries = _matmul("nqk,nkd->nqd", of_scores, keys)
    of_keys = _matmul("nqk,nqd->nkd", of_scores, queries)
    return of_queries, of_keys, of_values, of_scores / scale


def _size_last(values: Mixed, heads: int) -> Float[Array, "batchheads tokens size"]:
    batch, tokens, width = values.shape
    parts = values.reshape(batch, tokens, heads, width // heads)
    return parts.transpose(0, 2, 1, 3).reshape(batch * heads, tokens, width // heads)


def _heads_last(values: Float[Array, "batchheads tokens size"], heads: int) -> Mixed:
    count, tokens, size = values.shape
    return values.reshape(count // heads, heads, tokens, size).transpose(0, 2, 1, 3).reshape(-1, tokens, heads * size)


def cudnn(
    queries: Heads, keys: Heads, values: Heads, bias: Bias | None = None, lengths: Lengths | None = None
) -> Heads:
    """Fused attention by cuDNN, in float16 or bfloat16 on NVIDIA GPUs."""
    if lengths is not None:
        masking.check_lengths("lengths", lengths, len(keys))
    more = {} if lengths is None else {"key_value_seq_lengths": lengths.astype(jnp.int32)}
    bias = None if bias is None else bias.astype(queries.dtype)
    return jax.nn.dot_product_attention(queries, keys, values, bias, implementation="cudnn", **more)


def _pallas(config: str | None = None) -> Backend:
    """Our own kernels with one of the configurations of `pallas_attention`; None for the default."""

    def layout() -> Any:
        from vit_jax.models import pallas_attention

        return None if config is None else pallas_attention.CONFIGS[config]

    def attend(queries: Heads, keys: Heads, values: Heads, bias: Bias | None, lengths: Lengths | None) -> Heads:
        from vit_jax.models import pallas_attention

        if bias is not None:
            raise ValueError("the Pallas kernels do not support a bias\n  use the backend plain")
        return pallas_attention.attend(queries, keys, values, lengths, config=layout())

    def attend_fused(fused: Fused, heads: int) -> Mixed:
        from vit_jax.models import pallas_attention

        return pallas_attention.attend_fused(fused, heads, config=layout())

    return Backend(attend, attend_fused, takes_lengths=True)


BACKENDS: dict[str, Backend] = {
    "plain": Backend(plain, plain_fused, takes_bias=True, takes_lengths=True),
    "heads_first": Backend(_heads_first_attend, heads_first_fused, takes_bias=True),
    # cuDNN's backward pass, as JAX calls it, refuses odd token counts.
    "cudnn": Backend(cudnn, takes_bias=True, takes_lengths=True, multiple=2),
    "pallas": _pallas(),
    "pallas_two_pass_64": _pallas("two_pass_64"),
    "pallas_two_pass_32": _pallas("two_pass_32"),
}
FALLBACK = "plain"  # supports every device and every option


def obstacle(name: str, device: Device, shape: Shape) -> str | None:
    """Why a backend cannot compute attention of this shape, forward and backward, on a device; None if it can."""
    backend, half = BACKENDS[name], jnp.dtype(shape.dtype).itemsize == 2
    pallas = name.startswith("pallas")
    if (pallas or name == "cudnn") and device.capability is None:
        found = "an AMD GPU" if device.platform == "gpu" else f"a {device.platform.upper()}"
        return f"it needs an NVIDIA GPU, and this is {found}"
    if (pallas or name == "cudnn") and device.capability < (8, 0):
        return f"it needs compute capability 8.0 or newer, and this GPU has {'.'.join(map(str, device.capability))}"
    if name == "cudnn":
        largest = max(size for since, size in MAX_CUDNN_HEAD_SIZE.items() if since <= device.capability)
        if not half:
            return f"it computes in bfloat16 or float16, and the compute dtype is {shape.dtype}"
        if shape.size % 8 or shape.size > largest:
            return f"it needs heads of a multiple of 8 channels, up to {largest}, and these have {shape.size}"
    if pallas:
        from vit_jax.models import pallas_attention

        if reason := pallas_attention.obstacle(shape.tokens, shape.size, shape.dtype):
            return reason
    if shape.bias and not backend.takes_bias:
        return "it does not support a bias on the scores, which relative positions are"
    if shape.lengths and not backend.takes_lengths:
        return "it does not support examples of different numbers of tokens"
    return None


def default(platform: str) -> str:
    """A backend that supports all shapes on a platform, with all options but bias and lengths, and is not slow."""
    return "heads_first" if platform == "cpu" else FALLBACK


def candidates(device: Device, shapes: Iterable[Shape]) -> list[str]:
    """The backends that may be the fastest on a device and support all of these shapes; never empty.

    On a CPU 'heads_first' is the fastest in all measurements (docs/performance.md). On a GPU one of the fused kernels
    is, which one depends on the shape; the other backends are candidates if no fused kernel supports the shape.
    """
    fused = [name for name in BACKENDS if name not in (FALLBACK, "heads_first")]
    for names in {"cpu": [["heads_first"]], "gpu": [fused, ["heads_first", FALLBACK]]}.get(device.platform, []):
        if able := [name for name in names if not any(obstacle(name, device, shape) for shape in shapes)]:
            return able
    return [FALLBACK]
