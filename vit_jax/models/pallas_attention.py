"""Attention over short sequences for NVIDIA GPUs: Triton kernels written in Pallas, forward and backward.

The kernels read queries, keys and values where the projection matmul left them and write where the output projection
reads: XLA transposes, splits and concatenates nothing, and scores stay on the chip. As in FlashAttention (arXiv
2205.14135), the backward pass recomputes the weights from the logarithm of the softmax denominator.

Triton blocks have power-of-two sides, so a sequence is split into tiles of that size: 65 tokens are 64 + 16 and 197 are
3 * 64 + 16, not 128 and 256. A tile of fewer than 64 rows would leave Hopper's matmul instruction (64 rows) for slower
ones; its scores are computed transposed, so that it provides the columns ("flipped" below).

JAX 0.11 deprecates the Triton backend of Pallas and says that a future version will remove it; `obstacle` then gives
that as the reason why these kernels cannot be used.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

try:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton
except ImportError:
    pl = triton = None

MAX_TOKENS = 1024
SIZES = (16, 32, 64, 128)
ROWS = 64  # rows of a program's own tile: the M of Hopper's matmul instruction
LOG2_E = math.log2(math.e)
NO_SCORE = -1e30  # the running maximum before the first key; finite, so that differences are never NaN


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernels are laid out; results differ by rounding only.

    Attributes:
        tile: rows per step of the loop over the other operand (keys for queries, queries for keys): 16, 32 or 64.
        stages: software-pipelining depth of those loops: 1 is none, 2 loads the next tile during the matmuls of this.
        single_pass: maximum number of tokens (at most 80) for which one program computes all gradients of a head in
            one pass over the scores. Longer sequences take two: one for queries, one for keys and values.
        warps: warps per program.
    """

    tile: int = 64
    stages: int = 1
    single_pass: int = 80
    warps: int = 4


CONFIGS: dict[str, Config] = {
    "single_pass": Config(),
    "two_pass_64": Config(stages=2, single_pass=0),
    "two_pass_32": Config(tile=32, single_pass=0),
    "two_pass_16": Config(tile=16, single_pass=0),
}


def default_config(size: int, dtype: Dtype) -> Config:
    """The configuration for a head size and compute dtype.

    Chosen by what the compiler reports for an H200, not by the clock: with heads of 64 channels in bfloat16, no kernel
    spills registers, and three to five programs run on a multiprocessor at a time.
    """
    if jnp.dtype(dtype).itemsize > 2:
        return CONFIGS["two_pass_16"]
    return CONFIGS["two_pass_32" if size > 64 else "single_pass"]


def obstacle(tokens: int, size: int, dtype: Dtype) -> str | None:
    """Why the kernels cannot take a sequence length, head size and compute dtype; None where they can."""
    if triton is None:
        return "this version of JAX has no Triton backend for Pallas"
    if tokens > MAX_TOKENS:
        return f"it needs at most {MAX_TOKENS} tokens"
    if size not in SIZES:
        return f"it needs heads of {', '.join(map(str, SIZES[:-1]))} or {SIZES[-1]} channels"
    if jnp.dtype(dtype).name not in ("float16", "bfloat16", "float32"):
        return "it needs float16, bfloat16 or float32"
    return None


def attend_fused(
    fused: Float[Array, "batch tokens fused"], heads: int, *, config: Config | None = None, interpret: bool = False
) -> Float[Array, "batch tokens width"]:
    """softmax(q k^T / sqrt(size)) v for queries, keys and values side by side in the last axis, heads within each.

    Matmul operands have the input's dtype; scores, softmax and sums are float32. float32 matmuls have the precision
    that `jax.default_matmul_precision` sets (TensorFloat-32 where it is not set). Differentiable (reverse mode).

    Args:
        fused: the result of one projection of width 3 * width.
        heads: number of heads; must divide width.
        config: layout of the kernels; None is `default_config`.
        interpret: run on any device without compiling for a GPU, for tests.

    Raises:
        ValueError: the kernels cannot take these shapes (see `obstacle`).
    """
    _batch, tokens, columns = fused.shape
    size, rest = divmod(columns, 3 * heads)
    if rest:
        raise ValueError(f"{columns} columns are not queries, keys and values of {heads} heads")
    call = _call(tokens, heads, size, fused.dtype, True, config, interpret)
    return _attend((fused,), None, call)


def attend(
    queries: Float[Array, "batch tokens heads size"],
    keys: Float[Array, "batch tokens heads size"],
    values: Float[Array, "batch tokens heads size"],
    lengths: Int[Array, " batch"] | None = None,
    *,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "batch tokens heads size"]:
    """`attend_fused` for separate arrays, with an optional number of valid keys per example.

    Args:
        queries: no transpose is needed if the heads of a token are contiguous, as a projection leaves them.
        keys: as queries.
        values: as queries.
        lengths: keys at and after this index get weight 0, and zero gradients. With a length of 0 the output is 0.
        config: see `attend_fused`.
        interpret: see `attend_fused`.

    Raises:
        ValueError: the kernels cannot take these shapes (see `obstacle`).
    """
    batch, tokens, heads, size = queries.shape
    call = _call(tokens, heads, size, queries.dtype, False, config, interpret)
    arrays = tuple(array.reshape(batch, tokens, heads * size) for array in (queries, keys, values))
    return _attend(arrays, lengths, call).reshape(queries.shape)


class _Tile(NamedTuple):
    """Consecutive rows of a sequence; `full` where none of them is after its end."""

    start: int | jax.Array
    count: int
    full: bool

    @property
    def rows(self) -> jax.Array:
        return self.start + jnp.arange(self.count)

    @property
    def flipped(self) -> bool:
        return self.count < ROWS


@dataclasses.dataclass(frozen=True)
class _Call:
    """What a kernel knows when it is compiled. `offsets`: first columns of queries, keys, values in their arrays."""

    tokens: int
    heads: int
    size: int
    offsets: tuple[int, int, int]
    config: Config
    interpret: bool

    @property
    def single_pass(self) -> bool:
        return self.tokens <= self.config.single_pass

    @property
    def programs(self) -> int:
        """Programs per head."""
        return 1 if self.single_pass else pl.cdiv(self.tokens, ROWS)

    @property
    def scale(self) -> float:
        return self.size**-0.5

    def tiles(self, count: int) -> list[_Tile]:
        """Tiles of `count` rows that cover the sequence; the last may be shorter: a power of two, at least 16."""
        whole, rest = divmod(self.tokens, count)
        tiles = [_Tile(index * count, count, True) for index in range(whole)]
        if rest:
            last = max(16, pl.next_power_of_2(rest))
            tiles.append(_Tile(whole * count, last, last == rest))
        return tiles

    def position(self) -> tuple[jax.Array, jax.Array, _Tile]:
        """Example and head of the running program, and its own tile if there are several programs per head."""
        program = pl.program_id(0)
        head = lax.rem(lax.div(program, self.programs), self.heads)
        own = _Tile(lax.rem(program, self.programs) * ROWS, ROWS, self.tokens % ROWS == 0)
        return lax.div(program, self.programs * self.heads), head, own


def _call(
    tokens: int, heads: int, size: int, dtype: Dtype, fused: bool, config: Config | None, interpret: bool
) -> _Call:
    if reason := obstacle(tokens, size, dtype):
        raise ValueError(f"the Pallas attention kernels cannot be used for {tokens} tokens and {dtype}: {reason}")
    width = heads * size
    offsets = (0, width, 2 * width) if fused else (0, 0, 0)
    return _Call(tokens, heads, size, offsets, config or default_config(size, dtype), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(arrays: tuple[jax.Array, ...], lengths: jax.Array | None, call: _Call) -> jax.Array:
    return _forward(arrays, lengths, call)[0]


def _forward(arrays: tuple[jax.Array, ...], lengths: jax.Array | None, call: _Call) -> tuple[jax.Array, tuple]:
    batch = arrays[0].shape[0]
    outputs = [
        jax.ShapeDtypeStruct((batch, call.tokens, call.heads * call.size), arrays[0].dtype),
        jax.ShapeDtypeStruct((batch, call.heads, call.tokens), jnp.float32),
    ]
    mixed, log_sums = _launch(_forward_kernel, "attention_forward", call, lengths, _three(arrays), outputs)
    return mixed, (arrays, lengths, mixed, log_sums)


def _backward(call: _Call, kept: tuple, gradient: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
    arrays, lengths, mixed, log_sums = kept
    outputs = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
    launch = functools.partial(_launch, call=call, lengths=lengths)
    if call.single_pass:
        inputs = (*_three(arrays), gradient, log_sums)
        return launch(_single_pass_kernel, "attention_backward", inputs=inputs, outputs=outputs), None
    inputs = (*_three(arrays), gradient, log_sums, mixed)
    of_queries, shared = launch(
        _queries_kernel, "attention_backward_queries", inputs=inputs, outputs=[outputs[0], log_sums]
    )
    inputs = (*_three(arrays), gradient, log_sums, shared)
    launch = functools.partial(launch, _keys_kernel, "attention_backward_keys")
    if len(arrays) == 1:  # the gradients of keys and values go into the array that holds those of queries
        return launch(inputs=(*inputs, of_queries), outputs=outputs, in_place=True), None
    return (of_queries, *launch(inputs=inputs, outputs=outputs[1:])), None


_attend.defvjp(_forward, _backward)


def _three(arrays: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """Queries, keys and values: one array (or reference) is all three."""
    return arrays * 3 if len(arrays) == 1 else arrays


def _launch(
    kernel: Callable,
    name: str,
    call: _Call,
    lengths: jax.Array | None,
    inputs: tuple[jax.Array, ...],
    outputs: list,
    in_place: bool = False,
) -> tuple[jax.Array, ...]:
    """Runs a kernel with `call.programs` programs per head; each sees its example's part of inputs and outputs.

    With `in_place`, the last input's buffer becomes the first output, and the kernel overwrites parts of it.
    """
    per_example = call.heads * call.programs
    if lengths is not None:
        inputs = (lengths, *inputs)

    def example(array: Any) -> Any:
        return pl.BlockSpec((None, *array.shape[1:]), lambda program: (lax.div(program, per_example), 0, 0))

    def run(*inputs: jax.Array) -> tuple[jax.Array, ...]:
        batch = inputs[0].shape[0]
        in_specs = [example(array) for array in inputs]
        if lengths is not None:
            in_specs[0] = pl.BlockSpec((batch,), lambda program: (0,))
        results = pl.pallas_call(
            functools.partial(_call_kernel, kernel, call, lengths is not None, len(inputs)),
            grid=(batch * per_example,),
            in_specs=in_specs,
            out_specs=[example(output) for output in outputs],
            out_shape=[jax.ShapeDtypeStruct((batch, *output.shape[1:]), output.dtype) for output in outputs],
            input_output_aliases={len(inputs) - 1: 0} if in_place else {},
            compiler_params=triton.CompilerParams(num_warps=call.config.warps, num_stages=call.config.stages),
            interpret=call.interpret,
            name=name,
        )(*inputs)
        return tuple(results)

    return _per_example(run, [array.ndim for array in inputs], len(outputs))(*inputs)


def _per_example(run: Callable, ranks: list[int], outputs: int) -> Callable:
    """Makes a function of arrays [batch, ...], whose results are [batch, a, b], partition and vectorise by example.

    XLA cannot look into a kernel: without this, every device would gather the whole batch.
    """

    def partition(mesh: jax.sharding.Mesh, arguments: tuple, results: tuple) -> tuple:
        specs = [getattr(argument.sharding, "spec", ()) for argument in arguments]
        sharding = NamedSharding(mesh, PartitionSpec(next((spec[0] for spec in specs if spec and spec[0]), None)))
        return mesh, run, (sharding,) * len(results), (sharding,) * len(arguments)

    def axes(array: int, rank: int) -> str:
        return " ".join(["batch", *(f"axis{array}x{axis}" for axis in range(1, rank))])

    left = ", ".join(axes(array, rank) for array, rank in enumerate(ranks))
    right = ", ".join(axes(len(ranks) + array, 3) for array in range(outputs))
    partitioned = custom_partitioning(run)
    partitioned.def_partition(partition=partition, sharding_rule=f"{left} -> {right}")
    vectorised = custom_vmap(partitioned)

    @vectorised.def_vmap
    def merge(size: int, batched: list[bool], *inputs: jax.Array) -> tuple[tuple[jax.Array, ...], tuple[bool, ...]]:
        inputs = [
            x if mapped else jnp.broadcast_to(x, (size, *x.shape)) for x, mapped in zip(inputs, batched, strict=True)
        ]
        results = vectorised(*(array.reshape(-1, *array.shape[2:]) for array in inputs))
        return tuple(array.reshape(size, -1, *array.shape[1:]) for array in results), (True,) * outputs

    return vectorised


def _call_kernel(kernel: Callable, call: _Call, has_lengths: bool, inputs: int, *refs: Any) -> None:
    """kernel(call, head, own tile, number of keys, inputs, outputs)."""
    index, head, own = call.position()
    keys = jnp.minimum(triton.load(refs[0].at[index]), call.tokens) if has_lengths else call.tokens
    kernel(call, head, own, keys, refs[has_lengths:inputs], refs[inputs:])


def _load(ref: Any, tile: _Tile, column: jax.Array | int, size: int) -> jax.Array:
    """Rows of a tile, columns from `column` on; rows after the end of the sequence are 0."""
    place = ref.at[tile.rows[:, None], (column + jnp.arange(size))[None, :]]
    if tile.full:
        return triton.load(place)
    mask = jnp.broadcast_to((tile.rows < ref.shape[0])[:, None], (tile.count, size))
    return triton.load(place, mask=mask, other=0.0)


def _store(ref: Any, tile: _Tile, column: jax.Array | int, values: jax.Array, flipped: bool) -> None:
    """Writes values [rows, size], or [size, rows] where flipped, without rows after the end of the sequence."""
    size = values.shape[0 if flipped else 1]
    axis = int(flipped)  # of the rows
    place = ref.at[_along(tile.rows, axis), _along(column + jnp.arange(size), 1 - axis)]
    mask = None if tile.full else jnp.broadcast_to(_along(tile.rows < ref.shape[0], axis), values.shape)
    triton.store(place, values.astype(ref.dtype), mask=mask)


def _load_row(ref: Any, head: jax.Array, tile: _Tile) -> jax.Array:
    """One number per token of a [heads, tokens] array; 0 after the end of the sequence."""
    if tile.full:
        return triton.load(ref.at[head, tile.rows])
    return triton.load(ref.at[head, tile.rows], mask=tile.rows < ref.shape[1], other=0.0)


def _store_row(ref: Any, head: jax.Array, tile: _Tile, values: jax.Array) -> None:
    triton.store(ref.at[head, tile.rows], values, mask=None if tile.full else tile.rows < ref.shape[1])


def _along(vector: jax.Array, axis: int) -> jax.Array:
    """A vector that runs along an axis of a matrix."""
    return vector[:, None] if axis == 0 else vector[None, :]


def _pair(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Inner products of [m, size] and [n, size]: [m, n], float32."""
    return lax.dot_general(rows, columns, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _combine(weights: jax.Array, axis: int, rows: jax.Array, flipped: bool) -> jax.Array:
    """Sums `rows` [n, size], weighted along `axis` of `weights`: [other, size], or [size, other] where flipped."""
    weights = weights.astype(rows.dtype)
    left, right, contracted = (rows, weights, (0, axis)) if flipped else (weights, rows, (axis, 0))
    contracted = tuple((axis,) for axis in contracted)
    return lax.dot_general(left, right, (contracted, ((), ())), preferred_element_type=jnp.float32)


def _exp2(call: _Call, scores: jax.Array, shift: jax.Array) -> jax.Array:
    """exp(scale * scores) * 2^shift as two instructions per score.

    `jnp.exp2` takes seven in Triton: XLA fuses no multiplication with an addition, and subnormal results are rescaled.
    Here they become 0.
    """
    factor = call.scale * LOG2_E
    if call.interpret:
        return jnp.exp2(scores * factor + shift)
    return triton.elementwise_inline_asm(
        "{ .reg .f32 power; fma.rn.f32 power, $1, $2, $3; ex2.approx.ftz.f32 $0, power; }",
        args=[scores, jnp.full_like(scores, factor), jnp.broadcast_to(shift, scores.shape)],
        constraints="=f,f,f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(scores.shape, scores.dtype)],
    )[0]


def _mask_keys(values: jax.Array, tile: _Tile, axis: int, keys: jax.Array | int, fill: float) -> jax.Array:
    """Replaces what belongs to keys at and after the index `keys`."""
    if tile.full and isinstance(keys, int):
        return values
    return jnp.where(_along(tile.rows < keys, axis), values, fill)


def _loop(call: _Call, step: Callable, carry: Any) -> Any:
    """step(tile, carry) over tiles of `config.tile` rows that cover the sequence."""
    tiles = call.tiles(call.config.tile)
    count = call.config.tile
    whole = sum(tile.full and tile.count == count for tile in tiles)
    if whole > 1:
        carry = lax.fori_loop(0, whole, lambda index, carry: step(_Tile(index * count, count, True), carry), carry)
        tiles = tiles[whole:]
    for tile in tiles:
        carry = step(tile, carry)
    return carry


def _forward_kernel(
    call: _Call, head: jax.Array, own: _Tile, count: jax.Array | int, inputs: tuple, outputs: tuple
) -> None:
    """Mixed values of queries, and log2 of their softmax denominators (of scores times log2 e)."""
    columns = [offset + head * call.size for offset in call.offsets]

    def load(tiles: list[_Tile]) -> list[tuple[_Tile, jax.Array, jax.Array]]:
        """Keys and values of tiles."""
        return [(tile, *(_load(inputs[i], tile, columns[i], call.size) for i in (1, 2))) for tile in tiles]

    def attend_tiles(queries: jax.Array, loaded: list, carry: tuple | None) -> tuple[jax.Array, ...]:
        """Running maximum [rows], sum [rows] and mixed values [rows, size] after some more tiles of keys."""
        scores = [_mask_keys(_pair(queries, keys), tile, 1, count, -jnp.inf) for tile, keys, _ in loaded]
        maximum = functools.reduce(jnp.maximum, [jnp.max(part, axis=1) for part in scores]) * (call.scale * LOG2_E)
        maximum = jnp.maximum(maximum, NO_SCORE if carry is None else carry[0])
        weights = [_exp2(call, part, -maximum[:, None]) for part in scores]
        total = sum(jnp.sum(part, axis=1) for part in weights)
        mixed = sum(_combine(part, 1, values, False) for part, (_, _, values) in zip(weights, loaded, strict=True))
        if carry is None:
            return maximum, total, mixed
        rescale = jnp.exp2(carry[0] - maximum)
        return maximum, carry[1] * rescale + total, carry[2] * rescale[:, None] + mixed

    def step(queries: jax.Array, tile: _Tile, carry: tuple) -> tuple[jax.Array, ...]:
        return attend_tiles(queries, load([tile]), carry)

    everything = load(call.tiles(ROWS)) if call.single_pass else None
    for tile in call.tiles(ROWS) if call.single_pass else [own]:
        queries = _load(inputs[0], tile, columns[0], call.size)
        if everything:
            maximum, total, mixed = attend_tiles(queries, everything, None)
        else:
            zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
            carry = jnp.full(ROWS, NO_SCORE, jnp.float32), zeros(ROWS), zeros(queries.shape)
            maximum, total, mixed = _loop(call, functools.partial(step, queries), carry)
        total = jnp.maximum(total, 1)  # it is less only if no key is valid: the maximum's own weight is 1
        _store(outputs[0], tile, head * call.size, mixed * (1 / total)[:, None], False)
        _store_row(outputs[1], head, tile, maximum + jnp.log(total) * LOG2_E)


def _shift(call: _Call, log_sums: jax.Array) -> jax.Array:
    """The shift for which `_exp2` gives weights times scale: the scale of all gradients of scores is then applied."""
    return math.log2(call.scale) - log_sums


def _single_pass_kernel(
    call: _Call, head: jax.Array, own: _Tile, count: jax.Array | int, inputs: tuple, outputs: tuple
) -> None:
    """All gradients of one head, for at most two tiles.

    What all scores of a query share, sum(gradient * output) (FlashAttention, appendix B.4), is computed as
    sum(weights * gradients of weights). Matmuls are in the order that keeps few registers in use: 168 per thread at 65
    tokens of size 64, which lets three programs run on a multiprocessor at a time.
    """
    columns = [offset + head * call.size for offset in call.offsets]
    tiles = call.tiles(ROWS)
    keys, queries, values = ([_load(inputs[i], t, columns[i], call.size) for t in tiles] for i in (1, 0, 2))
    gradients = [_load(inputs[3], tile, head * call.size, call.size) for tile in tiles]
    shifts = [_shift(call, _load_row(inputs[4], head, tile)) for tile in tiles]
    to_queries, to_keys, to_values = _three(outputs)
    of_keys, of_values = [0.0] * len(tiles), [0.0] * len(tiles)
    for tile, query, gradient, shift in zip(tiles, queries, gradients, shifts, strict=True):
        axis = int(tile.flipped)  # of queries
        pair = (lambda rows, columns: _pair(columns, rows)) if tile.flipped else _pair
        weights = [_exp2(call, pair(query, key), _along(shift, axis)) for key in keys]
        weights = [_mask_keys(part, other, 1 - axis, count, 0.0) for part, other in zip(weights, tiles, strict=True)]
        of_weights = [pair(gradient, value) for value in values]
        parts = list(zip(weights, of_weights, strict=True))
        shared = sum(jnp.sum(part * of_part, axis=1 - axis) for part, of_part in parts) / call.scale
        of_scores = [(part * (of_part - _along(shared, axis))).astype(query.dtype) for part, of_part in parts]
        of_query = sum(_combine(part, 1 - axis, key, tile.flipped) for part, key in zip(of_scores, keys, strict=True))
        _store(to_queries, tile, columns[0], of_query, tile.flipped)
        for index, other in enumerate(tiles):
            of_values[index] += _combine(weights[index], axis, gradient, other.flipped)
        for index, other in enumerate(tiles):
            of_keys[index] += _combine(of_scores[index], axis, query, other.flipped)
    for index, tile in enumerate(tiles):
        _store(to_keys, tile, columns[1], of_keys[index], tile.flipped)
        _store(to_values, tile, columns[2], of_values[index] / call.scale, tile.flipped)


def _queries_kernel(
    call: _Call, head: jax.Array, own: _Tile, count: jax.Array | int, inputs: tuple, outputs: tuple
) -> None:
    """Gradients of one tile of queries, and sum(gradient * output) of each, which `_keys_kernel` needs."""
    columns = [offset + head * call.size for offset in call.offsets]
    queries = _load(inputs[0], own, columns[0], call.size)
    gradient = _load(inputs[3], own, head * call.size, call.size)
    mixed = _load(inputs[5], own, head * call.size, call.size)
    shift = _shift(call, _load_row(inputs[4], head, own))[:, None]
    shared = jnp.sum(gradient.astype(jnp.float32) * mixed.astype(jnp.float32), axis=1)
    _store_row(outputs[1], head, own, shared)

    def add(tile: _Tile, total: jax.Array) -> jax.Array:
        keys = _load(inputs[1], tile, columns[1], call.size)
        values = _load(inputs[2], tile, columns[2], call.size)
        weights = _mask_keys(_exp2(call, _pair(queries, keys), shift), tile, 1, count, 0.0)
        of_weights = _pair(gradient, values)
        return total + _combine(weights * (of_weights - shared[:, None]), 1, keys, False)

    total = _loop(call, add, jnp.zeros(queries.shape, jnp.float32))
    _store(outputs[0], own, columns[0], total, False)


def _keys_kernel(
    call: _Call, head: jax.Array, own: _Tile, count: jax.Array | int, inputs: tuple, outputs: tuple
) -> None:
    """Gradients of one tile of keys and values. Scores are transposed: matmuls then take weights from registers."""
    columns = [offset + head * call.size for offset in call.offsets]
    keys = _load(inputs[1], own, columns[1], call.size)
    values = _load(inputs[2], own, columns[2], call.size)

    def add(tile: _Tile, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        queries = _load(inputs[0], tile, columns[0], call.size)
        gradient = _load(inputs[3], tile, head * call.size, call.size)
        shift = _shift(call, _load_row(inputs[4], head, tile))[None, :]
        shared = _load_row(inputs[5], head, tile)[None, :]
        weights = _exp2(call, _pair(keys, queries), shift)
        of_values = totals[1] + _combine(weights, 1, gradient, False)
        of_scores = weights * (_pair(values, gradient) - shared)
        return totals[0] + _combine(of_scores, 1, queries, False), of_values

    zeros = jnp.zeros(keys.shape, jnp.float32)
    of_keys, of_values = _loop(call, add, (zeros, zeros))
    if not isinstance(count, int):
        of_keys, of_values = (_mask_keys(total, own, 0, count, 0.0) for total in (of_keys, of_values))
    to_keys, to_values = outputs * 2 if len(outputs) == 1 else outputs
    _store(to_keys, own, columns[1], of_keys, False)
    _store(to_values, own, columns[2], of_values / call.scale, False)
