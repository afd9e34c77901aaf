"""The backends of attention: from queries, keys and values to their weighted means.

All compute the same function. `plain` is the one to read; the others are there for their speed, and tests compare them
with it. Attention dropout, arbitrary masks and the sowing of attention weights are in `attention`, step by step.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Heads = Float[Array, "batch tokens heads size"]
Fused = Float[Array, "batch tokens fused"]
Mixed = Float[Array, "batch tokens width"]
Bias = Float[Array, "1 heads tokens tokens"]
Lengths = Int[Array, " batch"]

MAX_CUDNN_HEAD_SIZE = {(8, 0): 128, (9, 0): 256}  # by the compute capability from which on it holds


@dataclasses.dataclass(frozen=True)
class Device:
    """What decides which backends a device has.

    Attributes:
        platform: as JAX names it: 'cpu', 'gpu' or 'tpu'.
        capability: CUDA compute capability, as (9, 0); None for everything but NVIDIA GPUs.
    """

    platform: str
    capability: tuple[int, int] | None = None

    @classmethod
    def of(cls, device: Any) -> "Device":
        """That of a `jax.Device`."""
        major, dot, minor = str(getattr(device, "compute_capability", "")).partition(".")
        known = dot and major.isdigit() and minor.isdigit()  # AMD's are names, as 'gfx942'
        return cls(device.platform, (int(major), int(minor)) if known else None)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of one call of attention, and what it needs of a backend.

    Attributes:
        batch: examples, on one device.
        tokens: of an example.
        heads: number of heads.
        size: channels per head.
        dtype: compute dtype, by name.
        bias: whether there is an additive bias on the scores.
        lengths: whether examples have numbers of tokens of their own.
        transformed: whether queries and keys are normalised or rotated between projection and attention.
        dropout: whether weights are dropped in training, which is then step by step.
        vectorized: whether the call is vectorized by `jax.vmap`.
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
    vectorized: bool = False


@dataclasses.dataclass(frozen=True)
class Backend:
    """One implementation.

    Attributes:
        attend: (queries, keys, values, bias, lengths) -> the weighted means of the values. `bias` is added to the
            scaled scores; keys from an example's length on have no weight. Either may be None.
        attend_fused: (fused, heads) -> the same, of queries, keys and values side by side in the last axis, heads
            within each, as one projection leaves them; None where they are to come from three projections.
        takes_bias: whether `bias` may be given.
        takes_lengths: whether `lengths` may be given.
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
    queries: Heads, keys: Heads, values: Heads, bias: Bias | None = None, lengths: Lengths | None = None
) -> Heads:
    """softmax(q k^T / sqrt(size) + bias) v of each head (arXiv 2010.11929, appendix A), softmax in float32."""
    mask = None if lengths is None else key_mask(lengths, keys.shape[1])
    weights = attention_weights(queries, keys, mask, bias).astype(queries.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, values)


def plain_fused(fused: Fused, heads: int) -> Mixed:
    """`plain` of a fused projection."""
    return plain(*split(fused, heads)).reshape(*fused.shape[:2], -1)


def key_mask(lengths: Lengths, tokens: int) -> jax.Array:
    """True for the keys [batch, 1, 1, tokens] before each example's length."""
    return (jnp.arange(tokens) < lengths[:, None])[:, None, None]


def attention_weights(
    queries: Float[Array, "batch queries heads size"],
    keys: Float[Array, "batch keys heads size"],
    mask: jax.Array | None = None,
    bias: Float[Array, "#batch heads queries keys"] | None = None,
) -> Float[Array, "batch heads queries keys"]:
    """Softmax of the scaled scores, in float32 whatever the arguments are.

    Scores are divided by the square root of the *head* size; `bias` is added after that. A key whose `mask` (boolean,
    [#batch, #heads, #queries, keys]) is False has a weight of exactly 0; a query that sees no key has only zeros.
    """
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
    return _heads_first(queries, keys, values, bias)


@jax.custom_vjp
def _heads_first(queries: Heads, keys: Heads, values: Heads, bias: Bias | None) -> Heads:
    """Heads before tokens throughout, so that each matmul has a form in which a CPU is fast.

    The backward pass is written out: it keeps queries, keys, values and weights, and the term that all weights of a
    query share comes from the output (arXiv 2205.14135, appendix B.4), not from another pass over the weights.
    """
    return _heads_first_forward(queries, keys, values, bias)[0]


def _heads_first_forward(queries: Heads, keys: Heads, values: Heads, bias: Bias | None) -> tuple[jax.Array, tuple]:
    heads = queries.shape[2]
    parts = tuple(_size_last(part.reshape(*part.shape[:2], -1), heads) for part in (queries, keys, values))
    mixed, weights = _weigh(*parts, bias)
    mixed = _heads_last(mixed, heads).astype(queries.dtype).reshape(queries.shape)
    # Of no bias, None is kept: its gradient is None as well.
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
    """`heads_first` of a fused projection: one transpose for queries, keys and values."""
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
    more = {} if lengths is None else {"key_value_seq_lengths": lengths.astype(jnp.int32)}
    bias = None if bias is None else bias.astype(queries.dtype)
    return jax.nn.dot_product_attention(queries, keys, values, bias, implementation="cudnn", **more)


def _pallas(config: str | None = None) -> Backend:
    """Our own kernels, in one of their configurations; None for the usual one."""

    def layout() -> Any:
        from vit_jax.models import pallas_attention

        return None if config is None else pallas_attention.CONFIGS[config]

    def attend(queries: Heads, keys: Heads, values: Heads, bias: None, lengths: Lengths | None) -> Heads:
        from vit_jax.models import pallas_attention

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
FALLBACK = "plain"  # runs everywhere, with all options


def obstacle(name: str, device: Device, shape: Shape) -> str | None:
    """Why a backend cannot compute attention of a shape, forward and backward, on a device; None where it can."""
    backend, half = BACKENDS[name], jnp.dtype(shape.dtype).itemsize == 2
    pallas = name.startswith("pallas")
    if (pallas or name == "cudnn") and device.capability is None:
        found = "an AMD GPU" if device.platform == "gpu" else f"a {device.platform.upper()}"
        return f"it needs an NVIDIA GPU, and this is {found}"
    if (pallas or name == "cudnn") and device.capability < (8, 0):
        return f"it needs compute capability 8.0 or newer, and this GPU has {'.'.join(map(str, device.capability))}"
    if name == "cudnn":
        largest = max(size for since, size in MAX_CUDNN_HEAD_SIZE.items() if since <= device.capability)
        if shape.vectorized and jax.__version_info__ < (0, 11):
            return f"jax {jax.__version__} cannot vectorize it over seeds"
        if not half:
            return f"it computes in bfloat16 or float16, and the compute dtype is {shape.dtype}"
        if shape.size % 8 or shape.size > largest:
            return f"it needs heads of a multiple of 8 channels, up to {largest}, and these have {shape.size}"
    if pallas:
        from vit_jax.models import pallas_attention

        if reason := pallas_attention.obstacle(shape.tokens, shape.size, shape.dtype):
            return reason
    if shape.bias and not backend.takes_bias:
        return "it has no bias on the scores, which relative positions are"
    if shape.lengths and not backend.takes_lengths:
        return "it has no examples of different numbers of tokens"
    return None


def default(platform: str) -> str:
    """A backend that computes any shape on a platform with all options but bias and lengths, and is not slow there."""
    return "heads_first" if platform == "cpu" else FALLBACK


def candidates(device: Device, shapes: Iterable[Shape]) -> list[str]:
    """The backends that may be fastest on a device and can compute attention of all these shapes; never empty.

    On a CPU 'heads_first' is the fastest wherever it was measured (docs/performance.md). On a GPU the fused kernels
    are, and which of them depends on the shape; the others are candidates where there is none.
    """
    fused = [name for name in BACKENDS if name not in (FALLBACK, "heads_first")]
    for names in {"cpu": [["heads_first"]], "gpu": [fused, ["heads_first", FALLBACK]]}.get(device.platform, []):
        if able := [name for name in names if not any(obstacle(name, device, shape) for shape in shapes)]:
            return able
    return [FALLBACK]
