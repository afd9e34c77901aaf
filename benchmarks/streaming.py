"""Training on image files that are decoded while they are read, compared with the same images resident on the device.

    python benchmarks/streaming.py train --dir=/data/tiny_imagenet_val
    python benchmarks/streaming.py decode --dir=/data/tiny_imagenet_val
    python benchmarks/streaming.py memory

train: training steps of Ti/8 at 64 pixels, resident and streamed in turns. Prints one JSON line each; `ratio` of the
streamed one is its speed over that of the resident one, the median over turns, with ratio_min and ratio_max.
decode: images per second that one thread decodes, by our reader (which also converts size and channels) and by Pillow's
open and load alone, in turns.
memory: resident memory of a process that streams 2,000 batches from 1,000 and from 100,000 synthetic JPEGs: after 200
batches and at the end.
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
from vit_jax.config.check import check_config
from vit_jax.data import images, lazy_images, pipeline, sources
from vit_jax.data.sources import Source
from vit_jax.training import setup
from vit_jax.training.step import make_update


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "decode", "memory"])
    parser.add_argument("--dir", help="directory of images (train/CLASS/*)")
    parser.add_argument("--image_size", type=int, default=64, help="pixels (default: %(default)s)")
    parser.add_argument("--variant", default="Ti/8", help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="number of reader threads (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="turns of each side (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=4, help="steps, or hundreds of images, per turn (default: %(default)s)"
    )
    parser.add_argument(
        "--batches", type=int, default=2000, help="number of batches, for memory (default: %(default)s)"
    )
    return parser.parse_args(arguments)


class Side:
    """A run with a resident or streamed training set; a turn is one dispatch of `steps` steps."""

    def __init__(self, name: str, flags: argparse.Namespace):
        config = options.default()
        config.model.update(variant=flags.variant, pooling="mean")
        config.data.update(name="folder", dir=flags.dir, image_size=flags.image_size, workers=flags.workers)
        config.data.update(resident="always" if name == "resident" else "never", decoded=name == "resident")
        config.augment.update(crop_padding=4, flip=True, policy="rand_augment")
        config.train.update(batch_size=flags.batch_size, steps=10**6)
        config.mesh.devices = 1
        check_config(config)
        sources = setup.load_sources(config, {"train": "train"})
        run = setup.assemble(config, setup.check_data(config, ["train"]), sources)
        self.name, self.turns, self.flags = name, [], flags
        feeds, self.rows = run.pipelines["train"], flags.steps
        update = make_update(run)
        self.state, self.examples = run.init_state(0), len(run.sources["train"])
        self.update = update.lower(
            self.state, feeds.abstract_feed(self.rows, flags.batch_size), np.int32(0), np.int32(0)
        ).compile()
        self.feeds = feeds.feeds(self._tables())
        self.turn()

    def _tables(self):
        for dispatch in itertools.count():
            first, size = dispatch * self.rows, self.flags.batch_size
            yield pipeline.train_indices(0, size, first, self.rows, self.rows, self.examples), self.rows

    def turn(self) -> float:
        """Images per second of one dispatch, including reading."""
        began = time.perf_counter()
        self.state, sums = self.update(self.state, next(self.feeds), np.int32(self.rows), np.int32(0))
        jax.block_until_ready(sums)
        return self.rows * self.flags.batch_size / (time.perf_counter() - began)


def train(flags: argparse.Namespace) -> None:
    sides = [Side(name, flags) for name in ("resident", "streamed")]
    for turn in range(flags.turns):
        for side in sides if turn % 2 else sides[::-1]:
            side.turns.append(side.turn())
    for side in sides:
        line = {"name": side.name, "images_per_second": round(statistics.median(side.turns), 1), "turns": flags.turns}
        line |= {"variant": flags.variant, "image_size": flags.image_size, "workers": flags.workers}
        if side.name == "streamed":
            ratios = [b / a for a, b in zip(sides[0].turns, side.turns, strict=True)]
            line |= {"ratio": round(statistics.median(ratios), 3), "ratio_min": round(min(ratios), 3)}
            line["ratio_max"] = round(max(ratios), 3)
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
    """A source of `count` records, which repeat a few JPEGs."""
    generator, stored = np.random.default_rng(0), []
    for _ in range(64):
        file = io.BytesIO()
        Image.fromarray(generator.integers(0, 256, (size // 8, size // 8, 3), np.uint8)).resize((size, size)).save(
            file, "JPEG"
        )
        stored.append(file.getvalue())
    records = lazy_images.Records(count, lambda index, shape, how: (images.decode(stored[index % 64], shape), 0), str)
    encoded = lazy_images.LazyImages(((records, range(count)),), (size, size, 3))
    return Source("synthetic", "train", encoded, np.zeros(count, np.int32), ("0",), (0.5,) * 3, (0.5,) * 3)


def memory(flags: argparse.Namespace) -> None:
    import psutil

    mesh = sharding.make_mesh(1)
    use = jax.jit(lambda feed: feed.images.astype(np.float32).sum())
    for count in (1_000, 100_000):
        source, rows = synthetic(count, flags.image_size), 10
        feeds = pipeline.make(source, mesh, "never", pipeline.Reading(flags.workers))
        steps = range(0, flags.batches, rows)
        tables = ((pipeline.train_indices(0, 64, step, rows, rows, count), rows) for step in steps)
        resident_mb = []
        for feed in feeds.feeds(tables):
            use(feed).block_until_ready()
            resident_mb.append(psutil.Process().memory_info().rss / 2**20)
        early, late = statistics.mean(resident_mb[len(resident_mb) // 10 :][:10]), statistics.mean(resident_mb[-10:])
        line = {"name": "memory", "records": count, "batches": flags.batches, "early_mb": round(early, 1)}
        print(json.dumps(line | {"late_mb": round(late, 1), "growth": round(late / early - 1, 4)}), flush=True)


def main(arguments: list[str]) -> None:
    flags = parse(arguments)
    with tempfile.TemporaryDirectory() as cache:
        # Decoded images are cached for this run only.
        sources.cache.default_dir = lambda: Path(cache)
        {"train": train, "decode": decode, "memory": memory}[flags.what](flags)


if __name__ == "__main__":
    main(sys.argv[1:])
