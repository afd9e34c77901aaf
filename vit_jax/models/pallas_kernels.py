"""The bodies of the attention kernels in `pallas_attention`, and how a sequence is split into tiles.

Triton blocks have power-of-two sides, so a sequence is split into tiles of that size: 65 tokens are 64 + 16 and 197 are
3 * 64 + 16, not 128 and 256. A tile of fewer than 64 rows would leave Hopper's matmul instruction (64 rows) for slower
ones; its scores are computed transposed, so that it provides the columns ("flipped" below).
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

try:
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton
except ImportError:  # JAX intends to remove it
    pl = triton = None

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


class Tile(NamedTuple):
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
class Call:
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

    def tiles(self, count: int) -> list[Tile]:
        """Tiles of `count` rows that cover the sequence; the last may be shorter: a power of two, at least 16."""
        whole, rest = divmod(self.tokens, count)
        tiles = [Tile(index * count, count, True) for index in range(whole)]
        if rest:
            last = max(16, pl.next_power_of_2(rest))
            tiles.append(Tile(whole * count, last, last == rest))
        return tiles

    def position(self) -> tuple[jax.Array, jax.Array, Tile]:
        """Example and head of the running program, and its own tile if there are several programs per head."""
        program = pl.program_id(0)
        head = lax.rem(lax.div(program, self.programs), self.heads)
        own = Tile(lax.rem(program, self.programs) * ROWS, ROWS, self.tokens % ROWS == 0)
        return lax.div(program, self.programs * self.heads), head, own


def three(arrays: tuple[Any, ...]) -> tuple[Any, Any, Any]:
    """Queries, keys and values: one array (or reference) is all three."""
    return arrays * 3 if len(arrays) == 1 else arrays


def _load(ref: Any, tile: Tile, column: jax.Array | int, size: int) -> jax.Array:
    """Rows of a tile, columns from `column` on; rows after the end of the sequence are 0."""
    indices = ref.at[tile.rows[:, None], (column + jnp.arange(size))[None, :]]
    if tile.full:
        return triton.load(indices)
    mask = jnp.broadcast_to((tile.rows < ref.shape[0])[:, None], (tile.count, size))
    return triton.load(indices, mask=mask, other=0.0)


def _store(ref: Any, tile: Tile, column: jax.Array | int, values: jax.Array, flipped: bool) -> None:
    """Writes values [rows, size], or [size, rows] where flipped, without rows after the end of the sequence."""
    size = values.shape[0 if flipped else 1]
    axis = int(flipped)  # of the rows
    indices = ref.at[_along(tile.rows, axis), _along(column + jnp.arange(size), 1 - axis)]
    mask = None if tile.full else jnp.broadcast_to(_along(tile.rows < ref.shape[0], axis), values.shape)
    triton.store(indices, values.astype(ref.dtype), mask=mask)


def _load_row(ref: Any, head: jax.Array, tile: Tile) -> jax.Array:
    """One number per token of a [heads, tokens] array; 0 after the end of the sequence."""
    if tile.full:
        return triton.load(ref.at[head, tile.rows])
    return triton.load(ref.at[head, tile.rows], mask=tile.rows < ref.shape[1], other=0.0)


def _store_row(ref: Any, head: jax.Array, tile: Tile, values: jax.Array) -> None:
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


def _exp2(call: Call, scores: jax.Array, shift: jax.Array) -> jax.Array:
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


def _mask_keys(values: jax.Array, tile: Tile, axis: int, keys: jax.Array | int, fill: float) -> jax.Array:
    """Replaces what belongs to keys at and after the index `keys`."""
    if tile.full and isinstance(keys, int):
        return values
    return jnp.where(_along(tile.rows < keys, axis), values, fill)


def _loop(call: Call, step: Callable, carry: Any) -> Any:
    """step(tile, carry) over tiles of `config.tile` rows that cover the sequence."""
    tiles = call.tiles(call.config.tile)
    count = call.config.tile
    whole = sum(tile.full and tile.count == count for tile in tiles)
    if whole > 1:
        carry = lax.fori_loop(0, whole, lambda index, carry: step(Tile(index * count, count, True), carry), carry)
        tiles = tiles[whole:]
    for tile in tiles:
        carry = step(tile, carry)
    return carry


def forward_kernel(
    call: Call, head: jax.Array, own: Tile, count: jax.Array | int, inputs: tuple, outputs: tuple
) -> None:
    """Mixed values of queries, and log2 of their softmax denominators (of scores times log2 e)."""
    columns = [offset + head * call.size for offset in call.offsets]

    def load(tiles: list[Tile]) -> list[tuple[Tile, jax.Array, jax.Array]]:
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

    def step(queries: jax.Array, tile: Tile, carry: tuple) -> tuple[jax.Array, ...]:
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


def _shift(call: Call, log_sums: jax.Array) -> jax.Array:
    """The shift for which `_exp2` gives weights times scale: the scale of all gradients of scores is then applied."""
    return math.log2(call.scale) - log_sums


def single_pass_kernel(
    call: Call, head: jax.Array, own: Tile, count: jax.Array | int, inputs: tuple, outputs: tuple
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
    to_queries, to_keys, to_values = three(outputs)
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


def queries_kernel(
    call: Call, head: jax.Array, own: Tile, count: jax.Array | int, inputs: tuple, outputs: tuple
) -> None:
    """Gradients of one tile of queries, and sum(gradient * output) of each, which `keys_kernel` needs."""
    columns = [offset + head * call.size for offset in call.offsets]
    queries = _load(inputs[0], own, columns[0], call.size)
    gradient = _load(inputs[3], own, head * call.size, call.size)
    mixed = _load(inputs[5], own, head * call.size, call.size)
    shift = _shift(call, _load_row(inputs[4], head, own))[:, None]
    shared = jnp.sum(gradient.astype(jnp.float32) * mixed.astype(jnp.float32), axis=1)
    _store_row(outputs[1], head, own, shared)

    def add(tile: Tile, total: jax.Array) -> jax.Array:
        keys = _load(inputs[1], tile, columns[1], call.size)
        values = _load(inputs[2], tile, columns[2], call.size)
        weights = _mask_keys(_exp2(call, _pair(queries, keys), shift), tile, 1, count, 0.0)
        of_weights = _pair(gradient, values)
        return total + _combine(weights * (of_weights - shared[:, None]), 1, keys, False)

    total = _loop(call, add, jnp.zeros(queries.shape, jnp.float32))
    _store(outputs[0], own, columns[0], total, False)


def keys_kernel(call: Call, head: jax.Array, own: Tile, count: jax.Array | int, inputs: tuple, outputs: tuple) -> None:
    """Gradients of one tile of keys and values. Scores are transposed: matmuls then take weights from registers."""
    columns = [offset + head * call.size for offset in call.offsets]
    keys = _load(inputs[1], own, columns[1], call.size)
    values = _load(inputs[2], own, columns[2], call.size)

    def add(tile: Tile, totals: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
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
