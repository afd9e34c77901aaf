"""What a training step needs of a device's memory: by batch size, with and without computing blocks again.

    python benchmarks/memory.py --variant=B/16 --image_size=224 --batch_sizes=64,256 --remat=none,dots_no_batch,full
    python benchmarks/memory.py --variant=B/16 --image_size=224 --limit=16

The trainer's own step is compiled, not run: `planned_mb` is what the compiler plans, state and results included. One
JSON line for each kind of `remat` and batch size. On an accelerator a step is run as well: `peak_mb` is the device's
own count, where it is above that of what was run before (lines come in the order of what is planned).

`largest`, in a line of its own for each kind, is what `config.train.batch_size=auto` would find on a device of --limit
GiB (by default this one's; a CPU has none). `scan` is on wherever remat is: without it, XLA on a CPU undoes it.
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
from vit_jax.training import auto_batch_size
from vit_jax.training.setup import Run
from vit_jax.training.step import make_update

MB = 2**20


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="Ti/4", help="size and patch size (default: %(default)s)")
    parser.add_argument("--depth", type=int, help="encoder blocks (default: the variant's)")
    parser.add_argument("--image_size", type=int, default=32, help="pixels a side (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--batch_sizes", default="32,128", help="images a step (default: %(default)s)")
    parser.add_argument("--remat", default="none,full,dots,dots_no_batch", help="kinds (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="(default: %(default)s)")
    parser.add_argument("--limit", type=float, help="GiB of a device, for `largest` (default: this one's, if any)")
    return parser.parse_args(arguments)


def run_of(flags: argparse.Namespace, remat: str) -> Run:
    fields = variants.fields(flags.variant) | ({"depth": flags.depth} if flags.depth else {})
    given = {"image_size": flags.image_size, "classes": flags.classes, "dtype": flags.dtype}
    # The set is of eight images: what is resident is not what is measured here.
    options = {"variant": flags.variant, "depth": fields["depth"], "remat": remat, "scan": remat != "none"}
    work = Work("ours_trainer", "train", batch_size=8, fields=options, **fields, **given)
    return jax_sides.run_of(work, jax_sides.built(work))


def peak(run: Run, batch_size: int) -> int | None:
    """The device's own count after a step; None on a CPU."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return None
    update = make_update(run.applied, run.optimizer, run.augment, run.config, run.mesh)
    feed = run.feeds("train").feed(np.zeros((jax_sides.ROWS, batch_size), np.int32))
    jax.block_until_ready(update(run.initial_state(), feed, np.int32(1)))
    return device.memory_stats()["peak_bytes_in_use"]


def largest(run: Run, limit: float) -> int | None:
    """The largest batch that fits into `limit` bytes, of at most 2^16."""
    feeds, shape = run.feeds("train"), run.image_shape

    def estimated(batch_size: int) -> bool:
        return sum(training_bytes(run.model, shape[:2], shape[2], batch_size).values()) <= limit

    return auto_batch_size.largest(
        lambda size: auto_batch_size.planned_bytes(run, feeds, size) <= limit,
        auto_batch_size.ladder(1, 2**16),
        estimated,
    )


def main(arguments: list[str]) -> None:
    flags = parse(arguments)
    device = jax.devices()[0].device_kind
    given = {"benchmark": "memory", "device": device, "variant": flags.variant, "image_size": flags.image_size}
    given |= {"dtype": flags.dtype}
    run = functools.cache(lambda remat: run_of(flags, remat))
    planned = []
    for remat in flags.remat.split(","):
        for size in map(int, flags.batch_sizes.split(",")):
            planned.append((auto_batch_size.planned_bytes(run(remat), run(remat).feeds("train"), size), remat, size))
    highest = 0
    for needed, remat, size in sorted(planned):
        line = given | {"remat": remat, "batch_size": size, "planned_mb": round(needed / MB, 1)}
        measured = peak(run(remat), size)
        if measured is not None and measured > highest:
            highest = measured
            line["peak_mb"] = round(measured / MB, 1)
        print(json.dumps(line), flush=True)
    limit = flags.limit * 2**30 if flags.limit else auto_batch_size.limit(run("none").mesh)
    for remat in flags.remat.split(",") if limit else ():
        line = given | {"remat": remat, "limit_gib": round(limit / 2**30, 1)}
        print(json.dumps(line | {"largest": largest(run(remat), auto_batch_size.SHARE * limit)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
