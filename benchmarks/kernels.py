"""Speed of the parts of the model on this device: matmuls, attention, LayerNorm, GELU.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --widths=384 --rows=8192 --dtypes=float32
    python benchmarks/kernels.py --check --widths=384 --tokens=64,65,197,200

matmul: the first layer of the MLP (width -> 4 width) for `rows` tokens: the forward pass, and the two matmuls of the
backward pass, which give the gradients of the input (dx) and of the kernel (dw); in TFLOP/s. attention: heads of 64, at
65 and 197 tokens, for each backend, forward and with the backward pass; ms and TFLOP/s of its two matmuls (six with the
backward pass). layer_norm, gelu: GB/s of the arrays that must be read or written (two; five with the backward pass).
Prints JSON lines, with `error` if an implementation fails.

--check compares the value and the gradient of every attention backend of this device with plain attention in float32,
instead of measuring. It exits with status 1 if one fails or differs by more than rounding can explain.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import jax
import jax.numpy as jnp

from vit_jax.errors import one_line
from vit_jax.models.activations import gelu
from vit_jax.models.attention_backends import BACKENDS, Backend, Device, Shape, obstacle, plain_fused, split
from vit_jax.models.norm import LayerNorm

# Relative errors that rounding explains: in bfloat16 plain attention has 0.004 (measured on an H200); float32 matmuls
# may round their operands to TF32.
TOLERANCE = {"bfloat16": 0.015, "float32": 0.003}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="192,384,768,1024", help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, default=65536, help="number of tokens (default: %(default)s)")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="(default: %(default)s)")
    parser.add_argument("--tokens", default="65,197", help="per image, for attention (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.3, help="length of each measurement (default: %(default)s)")
    parser.add_argument(
        "--check", action="store_true", help="compare attention backends with float32 instead of measuring"
    )
    return parser.parse_args(arguments)


def timed(function: Callable[..., Any], arguments: tuple[jax.Array, ...], seconds: float) -> float:
    """Seconds per call, the median of five rounds; calls are not waited for."""
    run = jax.jit(function)
    jax.block_until_ready(run(*arguments))

    def rounds(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            result = run(*arguments)
        jax.block_until_ready(result)
        return (time.perf_counter() - began) / count

    count = max(1, int(seconds / 5 / max(rounds(3), 1e-7)))
    return statistics.median(rounds(count) for _ in range(5))


def draw(*shape: int, dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(len(shape)), shape, jnp.float32).astype(dtype)


def rounded(number: float) -> float:
    return float(f"{number:.4g}")


def report(seconds: float, name: str, **values: Any) -> None:
    device = jax.devices()[0].device_kind
    print(json.dumps({"benchmark": name, "device": device, **values, "ms": rounded(1e3 * seconds)}), flush=True)


def matmul(rows: int, width: int, dtype: str, seconds: float) -> None:
    tokens, kernel, back = (
        draw(*shape, dtype=dtype) for shape in ((rows, width), (width, 4 * width), (rows, 4 * width))
    )
    matmuls = {
        "forward": (lambda a, b: a @ b, (tokens, kernel)),
        "dx": (lambda a, b: a @ b.T, (back, kernel)),
        "dw": (lambda a, b: a.T @ b, (tokens, back)),
    }
    for name, (function, arguments) in matmuls.items():
        took = timed(function, arguments, seconds)
        rate = 2 * rows * width * 4 * width / took / 1e12
        report(took, "matmul", operation=name, width=width, rows=rows, dtype=dtype, tflops=rounded(rate))


def passes_of(function: Callable, argument: jax.Array, cotangent: jax.Array) -> dict[str, tuple[Callable, tuple]]:
    """The forward pass of a function, and forward and backward pass together."""

    def both(argument: jax.Array, cotangent: jax.Array) -> Any:
        result, pull = jax.vjp(function, argument)
        return result, pull(cotangent)

    return {"forward": (function, (argument,)), "both": (both, (argument, cotangent))}


def attention(rows: int, tokens: int, width: int, dtype: str, seconds: float) -> None:
    heads, batch = max(1, width // 64), max(1, rows // tokens)
    fused, cotangent = draw(batch, tokens, 3 * width, dtype=dtype), draw(batch, tokens, width, dtype=dtype)
    for name, kernel in usable(batch, tokens, heads, dtype).items():
        for passes, (run, arguments) in passes_of(lambda x, kernel=kernel: kernel(x, heads), fused, cotangent).items():
            about = {"implementation": name, "passes": passes, "tokens": tokens, "width": width, "dtype": dtype}
            try:
                took = timed(run, arguments, seconds)
            except Exception as error:
                device = jax.devices()[0].device_kind
                message = one_line(error)
                line = {"benchmark": "attention", "device": device, **about, "error": message}
                print(json.dumps(line), flush=True)
                continue
            num_matmuls = 2 if passes == "forward" else 6
            rate = num_matmuls * 2 * batch * heads * tokens**2 * 64 / took / 1e12
            report(took, "attention", **about, tflops=rounded(rate))


def usable(batch: int, tokens: int, heads: int, dtype: str) -> dict[str, Callable]:
    """The attention backends for heads of 64 on this device, each as a function of the fused qkv array."""
    device, shape = Device.of(jax.devices()[0]), Shape(batch, tokens, heads, 64, dtype)
    return {name: from_fused(backend) for name, backend in BACKENDS.items() if obstacle(name, device, shape) is None}


def from_fused(backend: Backend) -> Callable[[jax.Array, int], jax.Array]:
    """A backend as a function of the fused qkv array, with the padding that it needs.

    Backends with separate queries, keys and values get them from three matmuls in the model; here they are copied.
    """

    def attend(fused: jax.Array, heads: int) -> jax.Array:
        if backend.attend_fused is not None:
            return backend.attend_fused(fused, heads)
        batch, count, width = fused.shape[0], fused.shape[1], fused.shape[2] // 3
        padding = -count % backend.multiple
        lengths = jnp.full(batch, count, jnp.int32) if padding else None
        parts = split(jnp.pad(fused, ((0, 0), (0, padding), (0, 0))), heads)
        return backend.attend(*parts, None, lengths).reshape(batch, -1, width)[:, :count]

    return attend


def check(rows: int, tokens: int, width: int, dtype: str) -> bool:
    """Compares every attention backend with plain attention in float32; whether all are correct."""
    heads, batch = max(1, width // 64), max(1, rows // tokens)
    fused, cotangent = draw(batch, tokens, 3 * width, dtype=dtype), draw(batch, tokens, width, dtype=dtype)

    def both(kernel: Callable, *arguments: jax.Array) -> tuple[jax.Array, jax.Array]:
        value, pull = jax.vjp(lambda x: kernel(x, heads), arguments[0])
        return value, pull(arguments[1])[0]

    with jax.default_matmul_precision("highest"):
        exact = jax.jit(lambda *arrays: both(plain_fused, *arrays))(*(x.astype("float32") for x in (fused, cotangent)))
    about = {"benchmark": "attention_check", "device": jax.devices()[0].device_kind}
    about |= {"tokens": tokens, "width": width, "dtype": dtype}
    all_correct = True
    for name, kernel in usable(batch, tokens, heads, dtype).items():
        line = about | {"implementation": name}
        try:
            found = jax.jit(lambda *arrays, kernel=kernel: both(kernel, *arrays))(fused, cotangent)
            errors = [rounded(float(difference(*pair))) for pair in zip(found, exact, strict=True)]
            line |= {"value_error": errors[0], "gradient_error": errors[1], "correct": max(errors) < TOLERANCE[dtype]}
        except Exception as error:
            line |= {"correct": False, "error": one_line(error)}
        all_correct &= line["correct"]
        print(json.dumps(line), flush=True)
    return all_correct


def difference(found: jax.Array, exact: jax.Array) -> jax.Array:
    """Norm of the difference relative to the norm of the exact value; infinite if any value is not finite."""
    error = jnp.linalg.norm((found.astype("float32") - exact).ravel()) / jnp.linalg.norm(exact.ravel())
    return jnp.where(jnp.isfinite(error), error, jnp.inf)


def elementwise(rows: int, width: int, dtype: str, seconds: float) -> None:
    tokens, hidden = draw(rows, width, dtype=dtype), draw(rows, 4 * width, dtype=dtype)
    norm = LayerNorm(jnp.dtype(dtype))
    parameters = norm.init(jax.random.key(0), tokens[:1])
    functions = {"layer_norm": (lambda x: norm.apply(parameters, x), tokens), "gelu": (gelu, hidden)}
    for name, (function, array) in functions.items():
        for passes, (run, arguments) in passes_of(function, array, array).items():
            took = timed(run, arguments, seconds)
            # Reads x and writes y; then reads x and the cotangent and writes the gradient.
            moved = (2 if passes == "forward" else 5) * array.nbytes
            report(took, name, passes=passes, width=width, rows=rows, dtype=dtype, gb_s=rounded(moved / took / 1e9))


def main(arguments: list[str]) -> None:
    flags = parse(arguments)
    if flags.check:
        sizes = itertools.product(map(int, flags.tokens.split(",")), map(int, flags.widths.split(",")))
        cases = itertools.product(sizes, flags.dtypes.split(","))
        correct = [check(flags.rows, *size, dtype) for size, dtype in cases]
        raise SystemExit(0 if all(correct) else 1)
    for dtype in flags.dtypes.split(","):
        for width in map(int, flags.widths.split(",")):
            matmul(flags.rows, width, dtype, flags.seconds)
            for tokens in map(int, flags.tokens.split(",")):
                attention(flags.rows, tokens, width, dtype, flags.seconds)
            elementwise(flags.rows, width, dtype, flags.seconds)


if __name__ == "__main__":
    main(sys.argv[1:])
