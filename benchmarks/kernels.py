"""What the device does with the parts of the model, one by one: products, attention, LayerNorm, GELU.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --widths=384 --rows=8192 --dtypes=float32

matmul: `rows` tokens through the MLP's first layer (width -> 4 width): forward, and the two backward products, by the
tokens (dx) and by the kernel (dw); TFLOP/s. attention: heads of 64, at 65 and 197 tokens, by kernel, forward
and with the backward pass; ms and TFLOP/s of its two products (six with the backward pass). layer_norm, gelu: GB/s, of
the arrays that must be read or written (two, with the backward pass five). One JSON line each; `error` if one refuses.
"""

import argparse
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

from vit_jax.models import kernels
from vit_jax.models.norm import LayerNorm


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", default="192,384,768,1024", help="(default: %(default)s)")
    parser.add_argument("--rows", type=int, default=65536, help="tokens in all (default: %(default)s)")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="(default: %(default)s)")
    parser.add_argument("--tokens", default="65,197", help="of an image, for attention (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.3, help="to measure each for (default: %(default)s)")
    return parser.parse_args(arguments)


def timed(function: Callable[..., Any], arguments: tuple[jax.Array, ...], seconds: float) -> float:
    """Seconds a call, the median of five rounds; calls follow each other without waiting."""
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


def short(number: float) -> float:
    return float(f"{number:.4g}")


def say(seconds: float, name: str, **values: Any) -> None:
    device = jax.devices()[0].device_kind
    print(json.dumps({"benchmark": name, "device": device, **values, "ms": short(1e3 * seconds)}), flush=True)


def matmul(rows: int, width: int, dtype: str, seconds: float) -> None:
    tokens, kernel, back = (
        draw(*shape, dtype=dtype) for shape in ((rows, width), (width, 4 * width), (rows, 4 * width))
    )
    products = {
        "forward": (lambda a, b: a @ b, (tokens, kernel)),
        "dx": (lambda a, b: a @ b.T, (back, kernel)),
        "dw": (lambda a, b: a.T @ b, (tokens, back)),
    }
    for name, (product, arguments) in products.items():
        took = timed(product, arguments, seconds)
        rate = 2 * rows * width * 4 * width / took / 1e12
        say(took, "matmul", product=name, width=width, rows=rows, dtype=dtype, tflops=short(rate))


def passes_of(function: Callable, argument: jax.Array, cotangent: jax.Array) -> dict[str, tuple[Callable, tuple]]:
    """The function forward, and with its backward pass."""

    def both(argument: jax.Array, cotangent: jax.Array) -> Any:
        result, pull = jax.vjp(function, argument)
        return result, pull(cotangent)

    return {"forward": (function, (argument,)), "both": (both, (argument, cotangent))}


def attention(rows: int, tokens: int, width: int, dtype: str, seconds: float) -> None:
    heads, batch = max(1, width // 64), max(1, rows // tokens)
    fused, cotangent = draw(batch, tokens, 3 * width, dtype=dtype), draw(batch, tokens, width, dtype=dtype)
    for name, kernel in kernels.KERNELS.items():
        if kernels.obstacle(name, jax.default_backend(), tokens, 64, jnp.dtype(dtype)) is not None:
            continue
        for passes, (run, arguments) in passes_of(lambda x, kernel=kernel: kernel(x, heads), fused, cotangent).items():
            about = {"implementation": name, "passes": passes, "tokens": tokens, "width": width, "dtype": dtype}
            try:
                took = timed(run, arguments, seconds)
            except Exception as error:
                device = jax.devices()[0].device_kind
                said = " ".join(str(error).split())[:200]
                print(json.dumps({"benchmark": "attention", "device": device, **about, "error": said}), flush=True)
                continue
            products = 2 if passes == "forward" else 6
            rate = products * 2 * batch * heads * tokens**2 * 64 / took / 1e12
            say(took, "attention", **about, tflops=short(rate))


def elementwise(rows: int, width: int, dtype: str, seconds: float) -> None:
    tokens, hidden = draw(rows, width, dtype=dtype), draw(rows, 4 * width, dtype=dtype)
    norm = LayerNorm(jnp.dtype(dtype))
    parameters = norm.init(jax.random.key(0), tokens[:1])
    functions = {"layer_norm": (lambda x: norm.apply(parameters, x), tokens), "gelu": (jax.nn.gelu, hidden)}
    for name, (function, array) in functions.items():
        for passes, (run, arguments) in passes_of(function, array, array).items():
            took = timed(run, arguments, seconds)
            # Read x, write y; then read x and the cotangent, write its own.
            moved = (2 if passes == "forward" else 5) * array.nbytes
            say(took, name, passes=passes, width=width, rows=rows, dtype=dtype, gb_s=short(moved / took / 1e9))


def main(arguments: list[str]) -> None:
    flags = parse(arguments)
    for dtype in flags.dtypes.split(","):
        for width in map(int, flags.widths.split(",")):
            matmul(flags.rows, width, dtype, flags.seconds)
            for tokens in map(int, flags.tokens.split(",")):
                attention(flags.rows, tokens, width, dtype, flags.seconds)
            elementwise(flags.rows, width, dtype, flags.seconds)


if __name__ == "__main__":
    main(sys.argv[1:])
