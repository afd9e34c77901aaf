"""The core of attention, from the fused product to the mixed values: one door to its implementations.

All compute the same function of queries, keys and values that lie side by side in the last axis, heads within each.
`plain` says what it is; the others are there for their speed, each where it has been measured to win
(docs/performance.md), and tests hold them against it. What none of them knows (masks, biases, dropout, looking at the
weights) is computed step by step in `attention`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float

Fused = Float[Array, "batch tokens fused"]
Mixed = Float[Array, "batch tokens width"]


def plain(fused: Fused, heads: int) -> Mixed:
    """softmax(q k^T / sqrt(size)) v of each head (arXiv 2010.11929, appendix A), softmax in float32."""
    queries, keys, values = _split(fused, heads)
    scores = jnp.einsum("bqhd,bkhd->bhqk", queries, keys, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * queries.shape[-1] ** -0.5, axis=-1).astype(fused.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, values).reshape(*fused.shape[:2], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def heads_first(fused: Fused, heads: int) -> Mixed:
    """Heads are brought before tokens once, and stay there: every product is then one that a CPU does well.

    The backward pass is written out: it keeps queries, keys, values and weights, and what all weights of a query share
    comes from the output (arXiv 2205.14135, appendix B.4), not from another pass over the weights.
    """
    return _heads_first(fused, heads)[0]


def _heads_first(fused: Fused, heads: int) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    batch, tokens, width = fused.shape[0], fused.shape[1], fused.shape[2] // 3
    parts = fused.reshape(batch, tokens, 3, heads, width // heads).transpose(2, 0, 3, 1, 4)
    queries, keys, values = parts.reshape(3, batch * heads, tokens, width // heads)
    scores = _product("nqd,nkd->nqk", queries, keys) * queries.shape[-1] ** -0.5
    weights = jax.nn.softmax(scores, axis=-1).astype(fused.dtype)
    mixed = _heads_last(_product("nqk,nkd->nqd", weights, values), heads).astype(fused.dtype)
    return mixed, (queries, keys, values, weights, mixed)


def _heads_first_backward(heads: int, kept: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array]:
    queries, keys, values, weights, mixed = kept
    scale = queries.shape[-1] ** -0.5
    shared = _size_last(gradient * mixed, heads).sum(-1, keepdims=True)
    gradient = _size_last(gradient, heads)
    of_values = _product("nqk,nqd->nkd", weights, gradient)
    of_weights = _product("nqd,nkd->nqk", gradient, values)
    of_scores = (weights * (of_weights - shared) * scale).astype(weights.dtype)
    of_queries = _product("nqk,nkd->nqd", of_scores, keys)
    of_keys = _product("nqk,nqd->nkd", of_scores, queries)
    parts = [_heads_last(part, heads) for part in (of_queries, of_keys, of_values)]
    return (jnp.concatenate(parts, axis=-1).astype(queries.dtype),)


heads_first.defvjp(_heads_first, _heads_first_backward)


def cudnn(fused: Fused, heads: int) -> Mixed:
    """Fused attention by cuDNN: float16 and bfloat16 on NVIDIA's GPUs, heads of a multiple of 8 channels up to 256."""
    mixed = jax.nn.dot_product_attention(*_split(fused, heads), implementation="cudnn")
    return mixed.reshape(*fused.shape[:2], -1)


def pallas(fused: Fused, heads: int) -> Mixed:
    """Our own kernel for GPUs: whole short sequences on the chip, packed in and out (see `pallas_attention`)."""
    from vit_jax.models import pallas_attention

    return pallas_attention.attend_fused(fused, heads)


KERNELS: dict[str, Callable[[Fused, int], Mixed]] = {
    "plain": plain,
    "heads_first": heads_first,
    "cudnn": cudnn,
    "pallas": pallas,
}


def choose(platform: str, size: int, dtype: Dtype) -> str:
    """The kernel for a device and shape, as measured (docs/performance.md).

    Args:
        platform: JAX's name: 'cpu', 'gpu', 'tpu'.
        size: channels of a head.
        dtype: arithmetic.
    """
    if platform == "cpu":
        return "heads_first"
    if platform == "gpu" and jnp.dtype(dtype).itemsize == 2 and size % 8 == 0 and size <= 256:
        return "cudnn"
    return "plain"


def obstacle(name: str, platform: str, tokens: int, size: int, dtype: Dtype) -> str | None:
    """Why a kernel cannot be used there; None where it can."""
    from vit_jax.models import pallas_attention

    half = jnp.dtype(dtype).itemsize == 2
    if name in ("cudnn", "pallas") and platform != "gpu":
        return f"it is for GPUs, and this is a {platform}"
    if name == "cudnn" and not (half and size % 8 == 0 and size <= 256):
        return "it needs bfloat16, and heads of a multiple of 8 channels up to 256"
    if name == "pallas":
        return pallas_attention.obstacle(tokens, size, dtype)
    return None


def _split(fused: Fused, heads: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values [batch, tokens, heads, size]: one transpose for all three."""
    queries, keys, values = jnp.moveaxis(fused.reshape(*fused.shape[:2], 3, heads, -1), 2, 0)
    return queries, keys, values


_product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)


def _size_last(values: Float[Array, "batch tokens width"], heads: int) -> Float[Array, "batchheads tokens size"]:
    batch, tokens, width = values.shape
    parts = values.reshape(batch, tokens, heads, width // heads)
    return parts.transpose(0, 2, 1, 3).reshape(batch * heads, tokens, width // heads)


def _heads_last(values: Float[Array, "batchheads tokens size"], heads: int) -> Float[Array, "batch tokens width"]:
    count, tokens, size = values.shape
    return values.reshape(count // heads, heads, tokens, size).transpose(0, 2, 1, 3).reshape(-1, tokens, heads * size)
