"""Attention over short sequences for NVIDIA GPUs: Triton kernels written in Pallas, forward and backward.

The kernels read queries, keys and values where the projection matmul left them and write where the output projection
reads: XLA transposes, splits and concatenates nothing, and scores stay on the chip. As in FlashAttention (arXiv
2205.14135), the backward pass recomputes the weights from the logarithm of the softmax denominator.

The kernels themselves are in `pallas_kernels`; here is how they are called, differentiated and divided among devices.

JAX 0.11 deprecates the Triton backend of Pallas and says that a future version will remove it; `obstacle` then gives
that as the reason why these kernels cannot be used.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from vit_jax.models import masking
from vit_jax.models.pallas_kernels import (
    Call,
    Config,
    forward_kernel,
    keys_kernel,
    pl,
    queries_kernel,
    single_pass_kernel,
    three,
    triton,
)

MAX_TOKENS = 1024
SIZES = (16, 32, 64, 128)


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
    if lengths is not None:
        masking.check_lengths("lengths", lengths, batch)
    call = _call(tokens, heads, size, queries.dtype, False, config, interpret)
    arrays = tuple(array.reshape(batch, tokens, heads * size) for array in (queries, keys, values))
    return _attend(arrays, lengths, call).reshape(queries.shape)


def _call(
    tokens: int, heads: int, size: int, dtype: Dtype, fused: bool, config: Config | None, interpret: bool
) -> Call:
    if reason := obstacle(tokens, size, dtype):
        raise ValueError(f"the Pallas attention kernels cannot be used for {tokens} tokens and {dtype}: {reason}")
    width = heads * size
    offsets = (0, width, 2 * width) if fused else (0, 0, 0)
    return Call(tokens, heads, size, offsets, config or default_config(size, dtype), interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _attend(arrays: tuple[jax.Array, ...], lengths: jax.Array | None, call: Call) -> jax.Array:
    return _forward(arrays, lengths, call)[0]


def _forward(arrays: tuple[jax.Array, ...], lengths: jax.Array | None, call: Call) -> tuple[jax.Array, tuple]:
    batch = arrays[0].shape[0]
    outputs = [
        jax.ShapeDtypeStruct((batch, call.tokens, call.heads * call.size), arrays[0].dtype),
        jax.ShapeDtypeStruct((batch, call.heads, call.tokens), jnp.float32),
    ]
    mixed, log_sums = _launch(forward_kernel, "attention_forward", call, lengths, three(arrays), outputs)
    return mixed, (arrays, lengths, mixed, log_sums)


def _backward(call: Call, kept: tuple, gradient: jax.Array) -> tuple[tuple[jax.Array, ...], None]:
    arrays, lengths, mixed, log_sums = kept
    outputs = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
    launch = functools.partial(_launch, call=call, lengths=lengths)
    if call.single_pass:
        inputs = (*three(arrays), gradient, log_sums)
        return launch(single_pass_kernel, "attention_backward", inputs=inputs, outputs=outputs), None
    inputs = (*three(arrays), gradient, log_sums, mixed)
    of_queries, shared = launch(
        queries_kernel, "attention_backward_queries", inputs=inputs, outputs=[outputs[0], log_sums]
    )
    inputs = (*three(arrays), gradient, log_sums, shared)
    launch = functools.partial(launch, keys_kernel, "attention_backward_keys")
    if len(arrays) == 1:  # the gradients of keys and values go into the array that holds those of queries
        return launch(inputs=(*inputs, of_queries), outputs=outputs, in_place=True), None
    return (of_queries, *launch(inputs=inputs, outputs=outputs[1:])), None


_attend.defvjp(_forward, _backward)


def _launch(
    kernel: Callable,
    name: str,
    call: Call,
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


def _call_kernel(kernel: Callable, call: Call, has_lengths: bool, inputs: int, *refs: Any) -> None:
    """kernel(call, head, own tile, number of keys, inputs, outputs)."""
    index, head, own = call.position()
    keys = jnp.minimum(triton.load(refs[0].at[index]), call.tokens) if has_lengths else call.tokens
    kernel(call, head, own, keys, refs[has_lengths:inputs], refs[inputs:])
