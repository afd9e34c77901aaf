"""What saving costs the training loop: python benchmarks/saving.py [--variant=B/16] [--saves=5].

Prints one JSON line: the seconds for which a save holds the loop up (the state is copied, the rest happens behind), the
seconds until it is on the disk, the seconds of a restore with every digest compared, and, at one save a minute, the
share of the time that the loop stands still. How much slower it runs meanwhile depends on the cores that are free.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import optax

from vit_jax.checkpoint.manager import Checkpoints
from vit_jax.models import variants
from vit_jax.models.vit import VisionTransformer
from vit_jax.objectives import losses
from vit_jax.training import state


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="B/16")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--dir", help="where to save (default: the system's temporary folder)")
    flags = parser.parse_args(arguments)
    model = VisionTransformer(classes=1000, **variants.fields(flags.variant))

    def create() -> state.TrainState:
        parameters = state.initialize(model, (flags.image_size, flags.image_size, 3), 0)
        return state.create(parameters, optax.adam(1e-3), False, losses.metric_names({"label": 1.0}))

    current = jax.block_until_ready(jax.jit(create)())
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), current)
    held, landed, restored = [], [], []
    with tempfile.TemporaryDirectory(dir=flags.dir) as folder, Checkpoints(Path(folder), keep=1) as checkpoints:
        for step in range(1, flags.saves + 1):
            current = current.replace(step=jnp.asarray(step, jnp.int32))
            began = time.perf_counter()
            checkpoints.save(current, {})
            held.append(time.perf_counter() - began)
            checkpoints.wait()
            landed.append(time.perf_counter() - began)
            began = time.perf_counter()
            jax.block_until_ready(checkpoints.restore(like))
            restored.append(time.perf_counter() - began)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(current))
    line = {
        "name": "saving",
        "variant": flags.variant,
        "state_mb": round(size / 2**20),
        "device": jax.devices()[0].device_kind,
        "loop_held_s": round(statistics.median(held), 3),
        "loop_held_most_s": round(max(held), 3),
        "on_disk_s": round(statistics.median(landed), 2),
        "restored_s": round(statistics.median(restored), 2),
        "held_share_at_one_a_minute": round(statistics.median(held) / 60, 5),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
