"""Training on a folder of images that are decoded as they are read, beside the same set resident on the device.

    python benchmarks/streaming.py train --dir=/data/tiny_imagenet_val
    python benchmarks/streaming.py decode --dir=/data/tiny_imagenet_val
    python benchmarks/streaming.py memory

train: steps of Ti/8 at 64 pixels, the two ways taking turns; one JSON line a way, and for the streamed one `ratio`, the
median over the turns of its speed divided by the resident one's.
decode: images a second that one thread decodes, ours (with size and channels seen to) and Pillow's open and load alone,
taking turns.
memory: resident memory of a process that streams 2,000 batches out of 100,000 synthetic JPEGs, and out of 1,000: after
200 batches and at the end.
"""

import argparse
import io
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import jax
import numpy as np
from PIL import Image

from vit_jax import config as options
from vit_jax import sharding
from vit_jax.data import images, lazy_images, pipeline, sources
from vit_jax.data.sources import Source
from vit_jax.training import setup
from vit_jax.training.step import make_update


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "decode", "memory"])
    parser.add_argument("--dir", help="a folder of images (train/CLASS/*)")
    parser.add_argument("--image_size", type=int, default=64, help="pixels (default: %(default)s)")
    parser.add_argument("--variant", default="Ti/8", help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="threads that read ahead (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each side (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=4, help="steps, or hundreds of images, a turn (default: %(default)s)"
    )
    parser.add_argument("--batches", type=int, default=2000, help="of memory (default: %(default)s)")
    return parser.parse_args(arguments)


class Way:
    """A run whose training set is resident or streamed, a dispatch of `steps` at a time."""

    def __init__(self, name: str, flags: argparse.Namespace):
        config = options.default()
        config.model.update(variant=flags.variant, pooling="mean")
        config.data.update(name="folder", dir=flags.dir, image_size=flags.image_size, workers=flags.workers)
        config.data.update(resident="always" if name == "resident" else "never", decoded=name == "resident")
        config.augment.update(crop_padding=4, flip=True, policy="rand_augment")
        config.train.update(batch_size=flags.batch_size, steps=10**6)
        config.mesh.devices = 1
        options.check(config)
        run = setup.build(config, setup.check_data(config, ["train"]), {"train": "train"})
        self.name, self.turns, self.flags = name, [], flags
        feeds, self.rows = run.feeds("train"), flags.steps
        update = make_update(run.model, run.optimizer, run.augment, config, run.mesh)
        self.state, self.examples = run.initial_state(), len(run.sources["train"])
        self.update = update.lower(self.state, feeds.abstract_feed(self.rows, flags.batch_size), np.int32(0)).compile()
        self.feeds = feeds.feeds(self._tables())
        self.turn()

    def _tables(self):
        for dispatch in itertools.count():
            first, size = dispatch * self.rows, self.flags.batch_size
            yield pipeline.train_indices(0, size, first, self.rows, self.rows, self.examples), self.rows

    def turn(self) -> float:
        """Images a second of one dispatch, reading included."""
        began = time.perf_counter()
        self.state, sums = self.update(self.state, next(self.feeds), np.int32(self.rows))
        jax.block_until_ready(sums)
        return self.rows * self.flags.batch_size / (time.perf_counter() - began)


def train(flags: argparse.Namespace) -> None:
    ways = [Way(name, flags) for name in ("resident", "streamed")]
    for turn in range(flags.turns):
        for way in ways if turn % 2 else ways[::-1]:
            way.turns.append(way.turn())
    for way in ways:
        line = {"name": way.name, "images_per_second": round(statistics.median(way.turns), 1), "turns": flags.turns}
        line |= {"variant": flags.variant, "image_size": flags.image_size, "workers": flags.workers}
        if way.name == "streamed":
            ratios = [b / a for a, b in zip(ways[0].turns, way.turns, strict=True)]
            line |= {"ratio": round(statistics.median(ratios), 3), "least": round(min(ratios), 3)}
            line["most"] = round(max(ratios), 3)
        print(json.dumps(line), flush=True)


def decode(flags: argparse.Namespace) -> None:
    files = [path.read_bytes() for path in sorted(Path(flags.dir).glob("train/*/*"))[: 100 * flags.steps]]
    shape = (flags.image_size, flags.image_size, 3)

    def by_pillow(encoded: bytes) -> None:
        with Image.open(io.BytesIO(encoded)) as image:
            image.load()

    sides = {"ours": lambda encoded: images.decode(encoded, shape), "pillow": by_pillow}
    speeds = {name: [] for name in sides}
    for _ in range(flags.turns):
        for name, side in sides.items():
            began = time.perf_counter()
            for encoded in files:
                side(encoded)
            speeds[name].append(len(files) / (time.perf_counter() - began))
    for name, turns in speeds.items():
        line = {"name": name, "images_per_second": round(statistics.median(turns)), "threads": 1}
        if name == "ours":
            ratio = statistics.median(a / b for a, b in zip(turns, speeds["pillow"], strict=True))
            line["ratio_to_pillow"] = round(ratio, 3)
        print(json.dumps(line), flush=True)


def synthetic(count: int, size: int) -> Source:
    """So many records, each one of a few JPEGs."""
    generator, stored = np.random.default_rng(0), []
    for _ in range(64):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (size // 8, size // 8, 3), np.uint8)).resize((size, size)).save(
            file, "JPEG"
        )
        stored.append(file.getvalue())
    records = lazy_images.Records(count, lambda place, shape: (images.decode(stored[place % 64], shape), 0), str)
    encoded = lazy_images.Encoded(((records, range(count)),), (size, size, 3))
    return Source("synthetic", "train", encoded, np.zeros(count, np.int32), ("0",), (0.5,) * 3, (0.5,) * 3)


def memory(flags: argparse.Namespace) -> None:
    import psutil

    mesh = sharding.make_mesh(1)
    use = jax.jit(lambda feed: feed.images.astype(np.float32).sum())
    for count in (1_000, 100_000):
        source, rows = synthetic(count, flags.image_size), 10
        made = pipeline.make(source, mesh, "never", pipeline.Reading(flags.workers))
        steps = range(0, flags.batches, rows)
        tables = ((pipeline.train_indices(0, 64, step, rows, rows, count), rows) for step in steps)
        seen = []
        for feed in made.feeds(tables):
            use(feed).block_until_ready()
            seen.append(psutil.Process().memory_info().rss / 2**20)
        early, late = statistics.mean(seen[len(seen) // 10 :][:10]), statistics.mean(seen[-10:])
        line = {"name": "memory", "records": count, "batches": flags.batches, "early_mb": round(early, 1)}
        print(json.dumps(line | {"late_mb": round(late, 1), "growth": round(late / early - 1, 4)}), flush=True)


def main(arguments: list[str]) -> None:
    flags = parse(arguments)
    with tempfile.TemporaryDirectory() as cache:
        # What is kept decoded is kept for this run alone.
        sources.cache.default_dir = lambda: Path(cache)
        {"train": train, "decode": decode, "memory": memory}[flags.what](flags)


if __name__ == "__main__":
    main(sys.argv[1:])
