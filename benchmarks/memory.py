"""Memory of a training step on the device: by batch size, with and without rematerialization of blocks.

    python benchmarks/memory.py --variant=B/16 --image_size=224 --batch_sizes=64,256 --remat=none,dots_no_batch,full
    python benchmarks/memory.py --variant=B/16 --image_size=224 --limit=16

The step of the trainer is compiled: `planned_mb` is the memory in the compiler's plan, including state and results.
Prints one JSON line for each kind of `remat` and batch size. On an accelerator the step also runs once: `peak_mb` is
the device's own peak, if it exceeds that of the steps before (lines are in the order of planned memory).

`largest`, in a separate line for each kind, is the batch size that `config.train.batch_size=auto` would choose on a
device with --limit GiB (default: the memory of this device; a CPU has no limit). `scan` is on if remat is: without it,
XLA undoes remat on a CPU.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import jax
import jax_sides
import numpy as np
from work import Work

from vit_jax.models import variants
from vit_jax.models.summary import training_bytes
from vit_jax.runtime import memory
from vit_jax.training import auto_batch_size
from vit_jax.training.setup import Experiment
from vit_jax.training.step import make_update

MB = 2**20


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="Ti/4", help="size and patch size (default: %(default)s)")
    parser.add_argument("--depth", type=int, help="encoder blocks (default: the variant's)")
    parser.add_argument("--image_size", type=int, default=32, help="height and width in pixels (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--batch_sizes", default="32,128", help="images per step (default: %(default)s)")
    parser.add_argument("--remat", default="none,full,dots,dots_no_batch", help="kinds (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="(default: %(default)s)")
    parser.add_argument(
        "--limit", type=float, help="memory of the device in GiB, for `largest` (default: that of this device)"
    )
    return parser.parse_args(arguments)


def run_of(flags: argparse.Namespace, remat: str) -> Experiment:
    fields = variants.fields(flags.variant) | ({"depth": flags.depth} if flags.depth else {})
    sizes = {"image_size": flags.image_size, "classes": flags.classes, "dtype": flags.dtype}
    # The resident dataset has only eight images, because it is not what is measured here.
    options = {"variant": flags.variant, "depth": fields["depth"], "remat": remat, "scan": remat != "none"}
    work = Work("ours_trainer", "train", batch_size=8, fields=options, **fields, **sizes)
    return jax_sides.experiment_of(work, jax_sides.built(work))


def peak(run: Experiment, batch_size: int) -> int | None:
    """Peak bytes of the device after a step; None on a CPU."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return None
    update = make_update(run)
    feed = run.pipelines["train"].feed(np.zeros((jax_sides.ROWS, batch_size), np.int32))
    jax.block_until_ready(update(run.init_state(0), feed, np.int32(1), np.int32(0)))
    return device.memory_stats()["peak_bytes_in_use"]


def largest(run: Experiment, limit: float) -> int | None:
    """The largest batch size up to 2^16 that fits into `limit` bytes."""
    feeds, shape = run.pipelines["train"], run.image_shape

    def estimated(batch_size: int) -> bool:
        return sum(training_bytes(run.model, shape[:2], shape[2], batch_size).values()) <= limit

    return auto_batch_size.largest(
        lambda size: auto_batch_size.planned_bytes(run, feeds, size) <= limit,
        auto_batch_size.candidate_sizes(1, 2**16),
        estimated,
    )


def main(arguments: list[str]) -> None:
    flags = parse(arguments)
    device = jax.devices()[0].device_kind
    about = {"benchmark": "memory", "device": device, "variant": flags.variant, "image_size": flags.image_size}
    about |= {"dtype": flags.dtype}
    run = functools.cache(lambda remat: run_of(flags, remat))
    planned = []
    for remat in flags.remat.split(","):
        for size in map(int, flags.batch_sizes.split(",")):
            planned.append(
                (auto_batch_size.planned_bytes(run(remat), run(remat).pipelines["train"], size), remat, size)
            )
    highest = 0
    for needed, remat, size in sorted(planned):
        line = about | {"remat": remat, "batch_size": size, "planned_mb": round(needed / MB, 1)}
        measured = peak(run(remat), size)
        if measured is not None and measured > highest:
            highest = measured
            line["peak_mb"] = round(measured / MB, 1)
        print(json.dumps(line), flush=True)
    limit = flags.limit * 2**30 if flags.limit else memory.device_memory_limit(jax.local_devices()[0])
    for remat in flags.remat.split(",") if limit else ():
        line = about | {"remat": remat, "limit_gib": round(limit / 2**30, 1)}
        print(json.dumps(line | {"largest": largest(run(remat), memory.SHARE * limit)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
