"""Cost of checkpoints for the training loop: python benchmarks/saving.py [--variant=B/16] [--saves=5].

Prints one JSON line: for how many seconds a save blocks the loop (it copies the state; the rest runs in the
background), after how many seconds the checkpoint is on disk, the seconds of a restore that verifies every digest, and
the share of time for which the loop is blocked if it saves once per minute. How much the background work slows training
down depends on the number of free cores.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import optax

from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.models import variants
from vit_jax.models.vit import VisionTransformer
from vit_jax.training import setup


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="B/16", help="size and patch size (default: %(default)s)")
    parser.add_argument("--image_size", type=int, default=224, help="height and width in pixels (default: %(default)s)")
    parser.add_argument("--saves", type=int, default=5, help="number of saves (default: %(default)s)")
    parser.add_argument("--dir", help="directory to save in (default: the system's directory for temporary files)")
    flags = parser.parse_args(arguments)
    model = VisionTransformer(classes=1000, **variants.fields(flags.variant))

    def create() -> dict[str, Any]:
        parameters = setup.init_parameters(model, (flags.image_size, flags.image_size, 3), 0)
        return {"step": jnp.int32(0), "parameters": parameters, "optimizer": optax.adam(1e-3).init(parameters)}

    current = jax.block_until_ready(jax.jit(create)())
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), current)
    blocked, saved, restored = [], [], []
    with (
        tempfile.TemporaryDirectory(dir=flags.dir) as directory,
        CheckpointManager(Path(directory), keep=1) as checkpoints,
    ):
        for step in range(1, flags.saves + 1):
            current = {**current, "step": jnp.int32(step)}
            began = time.perf_counter()
            checkpoints.save(current, {})
            blocked.append(time.perf_counter() - began)
            checkpoints.wait()
            saved.append(time.perf_counter() - began)
            began = time.perf_counter()
            jax.block_until_ready(checkpoints.restore(like))
            restored.append(time.perf_counter() - began)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(current))
    line = {
        "name": "saving",
        "variant": flags.variant,
        "state_mb": round(size / 2**20),
        "device": jax.devices()[0].device_kind,
        "loop_blocked_s": round(statistics.median(blocked), 3),
        "loop_blocked_max_s": round(max(blocked), 3),
        "on_disk_s": round(statistics.median(saved), 2),
        "restored_s": round(statistics.median(restored), 2),
        "blocked_share_at_one_save_per_minute": round(statistics.median(blocked) / 60, 5),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
