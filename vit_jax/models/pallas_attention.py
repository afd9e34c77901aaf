"""Attention over short sequences for GPUs: one program a head and image, its whole sequence in one block.

A program reads its head's queries, keys and values where the fused product has left them and writes where the output
product will read: nothing is transposed, and the scores never leave the chip. The backward pass computes them again,
block by block of queries. As FlashAttention (arXiv 2205.14135), for sequences so short that keys need no blocks.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

MOST_TOKENS = 256
BLOCK = 64  # queries at a time in the backward pass, and in a forward pass of more than 128 tokens


def fits(tokens: int, size: int) -> bool:
    """Whether a sequence and a head are of a size that this kernel takes."""
    return tokens <= MOST_TOKENS and size in (16, 32, 64, 128)


def attend(
    fused: Float[Array, "batch tokens fused"], heads: int, interpret: bool = False
) -> Float[Array, "batch tokens width"]:
    """Attention of queries, keys and values side by side in the last axis, heads within each.

    Args:
        fused: their product; arithmetic is in its type, scores and softmax in float32.
        heads: number of heads.
        interpret: run the program step by step on any device, to test it.
    """
    return _attend(fused, heads, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attend(fused: jax.Array, heads: int, interpret: bool) -> jax.Array:
    return _forward(fused, heads, interpret)[0]


def _forward(fused: jax.Array, heads: int, interpret: bool) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    batch, tokens, width = fused.shape[0], fused.shape[1], fused.shape[2] // 3
    block = min(_padded(tokens), 128 if tokens <= 128 else BLOCK)
    mixed, log_sums = pl.pallas_call(
        functools.partial(_forward_program, tokens=tokens, width=width, size=width // heads, block=block),
        grid=(batch, heads, pl.cdiv(tokens, block)),
        in_specs=[_whole(tokens, 3 * width)],
        out_specs=[_whole(tokens, width), pl.BlockSpec((None, None, tokens), lambda b, h, q: (b, h, 0))],
        out_shape=[
            jax.ShapeDtypeStruct((batch, tokens, width), fused.dtype),
            jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32),
        ],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="attention_forward",
    )(fused)
    return mixed, (fused, mixed, log_sums)


def _backward(heads: int, interpret: bool, kept: tuple[jax.Array, ...], gradient: jax.Array) -> tuple[jax.Array]:
    fused, mixed, log_sums = kept
    batch, tokens, width = mixed.shape
    whole = functools.partial(_whole, axes=2)
    return (
        pl.pallas_call(
            functools.partial(_backward_program, tokens=tokens, width=width, size=width // heads),
            grid=(batch, heads),
            in_specs=[
                whole(tokens, 3 * width),
                whole(tokens, width),
                pl.BlockSpec((None, None, tokens), lambda b, h: (b, h, 0)),
                whole(tokens, width),
            ],
            out_specs=whole(tokens, 3 * width),
            out_shape=jax.ShapeDtypeStruct(fused.shape, fused.dtype),
            compiler_params=triton.CompilerParams(num_warps=8, num_stages=1),
            interpret=interpret,
            name="attention_backward",
        )(fused, mixed, log_sums, gradient),
    )


_attend.defvjp(_forward, _backward)


def _whole(tokens: int, width: int, axes: int = 3) -> pl.BlockSpec:
    """An image's array; programs pick their part of it themselves."""
    return pl.BlockSpec((None, tokens, width), lambda *place: (place[0], 0, 0))


def _padded(tokens: int) -> int:
    """Blocks are powers of two, and products have at least 16 rows."""
    return max(16, pl.next_power_of_2(tokens))


def _load(ref, rows: jax.Array, start: jax.Array | int, size: int) -> jax.Array:
    """Rows beyond the last are those of the last, once more."""
    rows = jnp.minimum(rows, ref.shape[0] - 1)
    return triton.load(ref.at[rows[:, None], (start + jnp.arange(size))[None, :]])


def _store(ref, rows: jax.Array, start: jax.Array | int, values: jax.Array, mask: jax.Array) -> None:
    place = ref.at[rows[:, None], (start + jnp.arange(values.shape[1]))[None, :]]
    triton.store(place, values.astype(ref.dtype), mask=jnp.broadcast_to(mask[:, None], values.shape))


def _rows(start: jax.Array | int, count: int, tokens: int) -> tuple[jax.Array, jax.Array]:
    """The rows of a block, and which of them there are."""
    rows = start + jnp.arange(count)
    return rows, rows < tokens


def _scores(queries: jax.Array, keys: jax.Array, there: jax.Array) -> jax.Array:
    scores = triton.dot(queries, keys.T) * queries.shape[1] ** -0.5
    return jnp.where(there[None, :], scores, -jnp.inf)


def _forward_program(fused_ref, mixed_ref, log_sums_ref, *, tokens: int, width: int, size: int, block: int) -> None:
    first = pl.program_id(1) * size
    rows, is_query = _rows(pl.program_id(2) * block, block, tokens)
    columns, is_key = _rows(0, _padded(tokens), tokens)
    queries = _load(fused_ref, rows, first, size)
    keys = _load(fused_ref, columns, width + first, size)
    values = _load(fused_ref, columns, 2 * width + first, size)
    scores = _scores(queries, keys, is_key)
    largest = jnp.max(scores, axis=1)
    weights = jnp.exp(scores - largest[:, None])
    sums = jnp.sum(weights, axis=1)
    mixed = triton.dot(weights.astype(values.dtype), values) / sums[:, None]
    _store(mixed_ref, rows, first, mixed, is_query)
    triton.store(log_sums_ref.at[rows], largest + jnp.log(sums), mask=is_query)


def _backward_program(
    fused_ref, mixed_ref, log_sums_ref, gradient_ref, out_ref, *, tokens: int, width: int, size: int
) -> None:
    first = pl.program_id(1) * size
    columns, is_key = _rows(0, _padded(tokens), tokens)
    keys = _load(fused_ref, columns, width + first, size)
    values = _load(fused_ref, columns, 2 * width + first, size)
    block = min(BLOCK, _padded(tokens))

    def add(index: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows, is_query = _rows(index * block, block, tokens)
        queries = _load(fused_ref, rows, first, size)
        gradient = jnp.where(is_query[:, None], _load(gradient_ref, rows, first, size), 0)
        mixed = _load(mixed_ref, rows, first, size)
        log_sums = triton.load(log_sums_ref.at[jnp.minimum(rows, tokens - 1)])
        weights = jnp.exp(_scores(queries, keys, is_key) - log_sums[:, None])
        of_values = triton.dot(weights.astype(gradient.dtype).T, gradient)
        # What all weights of a query share (FlashAttention, appendix B.4).
        shared = jnp.sum(gradient.astype(jnp.float32) * mixed.astype(jnp.float32), axis=1)
        of_scores = weights * (triton.dot(gradient, values.T) - shared[:, None]) * size**-0.5
        of_scores = of_scores.astype(keys.dtype)
        _store(out_ref, rows, first, triton.dot(of_scores, keys), is_query)
        return sums[0] + triton.dot(of_scores.T, queries), sums[1] + of_values

    zeros = jnp.zeros((_padded(tokens), size), jnp.float32)
    of_keys, of_values = jax.lax.fori_loop(0, pl.cdiv(tokens, block), add, (zeros, zeros))
    _store(out_ref, columns, width + first, of_keys, is_key)
    _store(out_ref, columns, 2 * width + first, of_values, is_key)
