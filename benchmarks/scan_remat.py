"""Effect of scan and remat on compile time, planned memory and speed of a training step; prints JSON lines.

  python benchmarks/scan_remat.py
  python benchmarks/scan_remat.py --variant=B/16 --image_size=224 --batch_size=64 --depth 12 24 --dtype=bfloat16

`trace_seconds` is the time of tracing and `compile_seconds` that of the compiler; `temporary_mib` is the memory in the
compiler's plan, without arguments and results; `step_seconds` is the minimum of --steps runs.
"""

import argparse
import itertools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp

from vit_jax.models import variants
from vit_jax.models.summary import training_bytes
from vit_jax.models.vit import VisionTransformer


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="Ti/4", help="size and patch size (default: Ti/4)")
    parser.add_argument("--image_size", type=int, default=32, help="height and width in pixels (default: 32)")
    parser.add_argument("--batch_size", type=int, default=32, help="images per step (default: 32)")
    parser.add_argument(
        "--depth", type=int, nargs="+", default=[12, 24], help="numbers of encoder blocks (default: 12 24)"
    )
    parser.add_argument("--dtype", default="float32", help="compute dtype (default: float32)")
    parser.add_argument("--steps", type=int, default=3, help="number of timed steps; 0: only compile (default: 3)")
    return parser.parse_args()


def measure(model: VisionTransformer, images: jax.Array, steps: int) -> dict[str, float]:
    """Compiles the gradient of a loss and times it."""

    def loss(parameters, images, key):
        logits = model.apply({"params": parameters}, images, train=True, rngs={"dropout": key})
        return jnp.square(logits - 1).mean()

    key = jax.random.key(0)
    shapes = jax.eval_shape(model.init, key, images)["params"]
    started = time.perf_counter()
    lowered = jax.jit(jax.grad(loss)).lower(shapes, images, key)
    traced = time.perf_counter()
    compiled = lowered.compile()
    finished = time.perf_counter()
    plan = compiled.memory_analysis()
    result = {
        "trace_seconds": round(traced - started, 2),
        "compile_seconds": round(finished - traced, 2),
        "temporary_mib": round(plan.temp_size_in_bytes / 2**20, 1),
    }
    if steps:
        parameters = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.01, leaf.dtype), shapes)
        times = []
        for _ in range(steps + 1):
            started = time.perf_counter()
            jax.block_until_ready(compiled(parameters, images, key))
            times.append(time.perf_counter() - started)
        result["step_seconds"] = round(min(times[1:]), 4)
    return result


def main() -> None:
    flags = parse()
    device = jax.devices()[0].device_kind
    size = (flags.image_size, flags.image_size)
    images = jnp.ones((flags.batch_size, *size, 3), jnp.float32)
    for depth, scan, remat in itertools.product(flags.depth, (False, True), (False, True)):
        fields = {**variants.fields(flags.variant), "depth": depth, "scan": scan, "remat": remat}
        model = VisionTransformer(classes=10, dtype=jnp.dtype(flags.dtype), **fields)
        estimated = training_bytes(model, size, 3, flags.batch_size)["activations"]
        line = {key: getattr(flags, key) for key in ("variant", "image_size", "batch_size", "dtype")}
        line |= {"device": device, "depth": depth, "scan": scan, "remat": remat}
        measured = measure(model, images, flags.steps)
        print(json.dumps({**line, **measured, "estimated_mib": round(estimated / 2**20, 1)}), flush=True)


if __name__ == "__main__":
    main()
