"""Speed of a training step on random images: ours, and beside it the model as most would write it with Flax.

    python benchmarks/train_step.py --variant=Ti/4 --image_size=32 --batch_size=128
    python benchmarks/train_step.py --only=ours --dtype=bfloat16

Both sides get the same step (AdamW, softmax cross-entropy, donated state), and take turns, A B A B, so that what else
the machine does falls on both. Prints one JSON line a side: images_per_second and step_ms (medians over the turns),
compile_s, peak_memory_mb (of the device; on CPU of the whole process so far, so compare with --only), and for ours
`ratio`, the median over the turns of its speed divided by the other's.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import jax
import jax.numpy as jnp
import optax
from plain_flax import PlainViT

from vit_jax.models import variants
from vit_jax.models.vit import VisionTransformer
from vit_jax.training.losses import cross_entropy


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="Ti/4", help="size and patch size (default: %(default)s)")
    parser.add_argument("--image_size", type=int, default=32, help="pixels a side (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=128, help="images a step (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="(default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each side (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="steps a turn (default: %(default)s)")
    parser.add_argument("--only", choices=["ours", "plain_flax"], help="measure one side alone")
    return parser.parse_args(arguments)


class Side:
    """One implementation: compiled, with a state of its own, ready to take steps."""

    def __init__(self, name: str, model, flags: argparse.Namespace):
        self.name, self.turns = name, []
        shape = (flags.batch_size, flags.image_size, flags.image_size, 3)
        self.images = jax.random.normal(jax.random.key(1), shape)
        self.targets = jax.nn.one_hot(jax.random.randint(jax.random.key(2), shape[:1], 0, flags.classes), flags.classes)
        optimizer = optax.adamw(1e-3, weight_decay=0.05)
        parameters = jax.jit(model.init)(jax.random.key(0), self.images[:1])["params"]
        self.state = (parameters, optimizer.init(parameters))

        def step(state, images, targets):
            parameters, moments = state

            def loss(parameters):
                return cross_entropy(model.apply({"params": parameters}, images, train=True), targets).mean()

            value, gradients = jax.value_and_grad(loss)(parameters)
            updates, moments = optimizer.update(gradients, moments, parameters)
            return (optax.apply_updates(parameters, updates), moments), value

        began = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(self.state, self.images, self.targets)
        self.step = lowered.compile()
        self.compile_s = time.perf_counter() - began
        self.run(1)

    def run(self, steps: int) -> float:
        """Seconds a step."""
        began = time.perf_counter()
        for _ in range(steps):
            self.state, value = self.step(self.state, self.images, self.targets)
        jax.block_until_ready((self.state, value))
        return (time.perf_counter() - began) / steps


def peak_memory_mb() -> float:
    stats = jax.local_devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"] / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main(arguments: list[str]) -> None:
    flags = parse(arguments)
    fields, dtype = variants.fields(flags.variant), jnp.dtype(flags.dtype)
    models = {
        "ours": VisionTransformer(classes=flags.classes, dtype=dtype, **fields),
        "plain_flax": PlainViT(classes=flags.classes, dtype=dtype, **fields),
    }
    sides, memory = [], {}
    for name, model in models.items():
        if flags.only in (None, name):
            sides.append(Side(name, model, flags))
            memory[name] = peak_memory_mb()
    for _ in range(flags.turns):
        for side in sides:
            side.turns.append(side.run(flags.steps))
    for side in sides:
        step = statistics.median(side.turns)
        line = {
            "name": side.name,
            "variant": flags.variant,
            "image_size": flags.image_size,
            "batch_size": flags.batch_size,
            "dtype": flags.dtype,
            "device": jax.devices()[0].device_kind,
            "images_per_second": round(flags.batch_size / step, 1),
            "step_ms": round(1e3 * step, 1),
            "spread_ms": round(1e3 * (max(side.turns) - min(side.turns)), 1),
            "compile_s": round(side.compile_s, 1),
            "peak_memory_mb": round(memory[side.name]),
        }
        if side.name == "ours" and len(sides) == 2:
            line["ratio"] = round(statistics.median(b / a for a, b in zip(side.turns, sides[1].turns, strict=True)), 3)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
