"""Speed of the augmentation, compared with host pipelines for the same recipe, and its share of a training step.

    python benchmarks/augment.py --images=/data/cifar-10-batches-bin/test_batch.bin
    python benchmarks/augment.py --turns=9 --only=ours,pillow

The recipe: random crop with padding 4, flip, RandAugment (2 operations, magnitude 9, deviation 0.5), random erasing
with noise (probability 0.25), alternating mixup 0.8 and cutmix 1.0, at 32 pixels. The sides:

    ours     on the device, compiled: from uint8 images to the normalized, mixed batch
    pillow   the same in Pillow and NumPy, in a multiprocessing pool of 2 processes
    timm     torchvision's and timm's transforms, random erasing and mixing in a DataLoader with 2 workers;
             skipped, with a message on standard error, if torch, torchvision or timm is not installed
    step     a whole training step of Ti/4 (batch 128, AdamW), without augmentation

They take turns, so that other load on the machine affects all of them. Prints one JSON line per side: images_per_second
(median over turns), and for ours the ratio to each other side (the median of the ratios of the turns).
"""

import argparse
import json
import multiprocessing
import random
import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SIDE, CLASSES, FILL = 32, 10, (125, 123, 114)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, help="a file of CIFAR-10's binary version (default: smoothed noise)")
    parser.add_argument("--batch_size", type=int, default=128, help="(default: %(default)s)")
    parser.add_argument("--turns", type=int, default=7, help="turns of each side (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=40, help="batches per turn (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes of the host pipelines (default: %(default)s)")
    parser.add_argument("--variant", default="Ti/4", help="model of the training step (default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="(default: %(default)s)")
    parser.add_argument("--only", default="ours,pillow,timm,step", help="sides to measure (default: %(default)s)")
    return parser.parse_args(arguments)


def load(flags: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels: of the file, or of noise that is smoothed to resemble images."""
    if flags.images:
        records = np.fromfile(flags.images, np.uint8).reshape(-1, 3073)
        return np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), records[:, 0]
    generator = np.random.default_rng(0)
    small = [Image.fromarray(generator.integers(0, 256, (8, 8, 3), np.uint8)).resize((SIDE, SIDE)) for _ in range(2000)]
    return np.stack([np.asarray(image) for image in small]), generator.integers(0, CLASSES, 2000).astype(np.uint8)


# --- ours -----------------------------------------------------------------------------------------------------------


class Ours:
    """Augments a batch of uint8 images that is on the device."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, flags: argparse.Namespace):
        import jax

        from vit_jax.data.augment import Augment

        recipe = {"crop_padding": 4, "flip": True, "policy": "rand_augment", "erasing": 0.25, "erasing_mode": "noise"}
        augment = Augment(MEAN, STD, dtype=flags.dtype, mixup=0.8, cutmix=1.0, **recipe)
        self.jax, self.size = jax, flags.batch_size
        self.images = jax.device_put(images[: self.size])
        self.targets = jax.nn.one_hot(labels[: self.size], CLASSES)
        self.run = jax.jit(augment)
        self.turn(2)

    def turn(self, batches: int) -> float:
        """Images per second."""
        keys = self.jax.block_until_ready(self.jax.random.split(self.jax.random.key(0), batches))
        began = time.perf_counter()
        for key in keys:
            batch = self.run(key, self.images, self.targets)
        self.jax.block_until_ready(batch)
        return batches * self.size / (time.perf_counter() - began)


class Step:
    """Training steps of a model on a batch that is on the device."""

    def __init__(self, flags: argparse.Namespace):
        from jax_sides import Bare
        from work import Work

        from vit_jax.models import variants

        sizes = {"batch_size": flags.batch_size, "image_size": SIDE, "classes": CLASSES, "dtype": flags.dtype}
        self.side, self.size = Bare(Work("ours", "train", **variants.fields(flags.variant), **sizes)), flags.batch_size

    def turn(self, batches: int) -> float:
        """Images per second."""
        steps = max(1, batches // 40)
        return steps * self.size / self.side.turn(steps)


# --- Pillow and NumPy -----------------------------------------------------------------------------------------------


def affine(image: Image.Image, entries: tuple) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, entries, Image.Resampling.BILINEAR, fillcolor=FILL)


def operations(share: float, sign: float) -> list:
    factor = max(0.1, 1 + 0.9 * share * sign)
    add = [min(255, k + int(110 * share)) if k < 128 else k for k in range(256)] * 3
    return [
        ImageOps.autocontrast,
        ImageOps.equalize,
        ImageOps.invert,
        lambda i: i.rotate(30 * share * sign, Image.Resampling.BILINEAR, fillcolor=FILL),
        lambda i: ImageOps.posterize(i, max(1, 4 - int(4 * share))),
        lambda i: ImageOps.solarize(i, 256 - int(256 * share)),
        lambda i: i.point(add),
        lambda i: ImageEnhance.Color(i).enhance(factor),
        lambda i: ImageEnhance.Contrast(i).enhance(factor),
        lambda i: ImageEnhance.Brightness(i).enhance(factor),
        lambda i: ImageEnhance.Sharpness(i).enhance(factor),
        lambda i: affine(i, (1, 0.3 * share * sign, 0, 0, 1, 0)),
        lambda i: affine(i, (1, 0, 0, 0.3 * share * sign, 1, 0)),
        lambda i: affine(i, (1, 0, 0.45 * share * sign * SIDE, 0, 1, 0)),
        lambda i: affine(i, (1, 0, 0, 0, 1, 0.45 * share * sign * SIDE)),
    ]


def augment_by_pillow(pixels: np.ndarray) -> np.ndarray:
    """The recipe for one image, without mixing."""
    top, left = random.randrange(9), random.randrange(9)
    image = Image.fromarray(np.pad(pixels, ((4, 4), (4, 4), (0, 0)))[top : top + SIDE, left : left + SIDE])
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for _ in range(2):
        if random.random() < 0.5:
            share = min(max(random.gauss(9, 0.5), 0), 10) / 10
            image = random.choice(operations(share, random.choice((-1, 1))))(image)
    pixels = (np.asarray(image, np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
    if random.random() < 0.25:
        area, ratio = random.uniform(0.02, 1 / 3) * SIDE**2, 3.3 ** random.uniform(-1, 1)
        high, wide = (min(SIDE - 1, round((area * r) ** 0.5)) for r in (ratio, 1 / ratio))
        top, left = random.randrange(SIDE - high + 1), random.randrange(SIDE - wide + 1)
        pixels[top : top + high, left : left + wide] = np.random.standard_normal((high, wide, 3))
    return pixels


def batch_by_pillow(work: tuple[int, np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Augments a batch and mixes it with itself in reverse order, as timm does."""
    seed, images, targets = work
    random.seed(seed)
    np.random.seed(seed)
    batch, cut = np.stack([augment_by_pillow(image) for image in images]), random.random() < 0.5
    share = np.random.beta(*((1.0, 1.0) if cut else (0.8, 0.8)))
    if cut:
        half = int(SIDE * np.sqrt(1 - share)) // 2
        (top, bottom), (left, right) = (np.clip([c - half, c + half], 0, SIDE) for c in np.random.randint(SIDE, size=2))
        batch[:, top:bottom, left:right] = batch[::-1, top:bottom, left:right].copy()
        share = 1 - (bottom - top) * (right - left) / SIDE**2
    else:
        batch = share * batch + (1 - share) * batch[::-1]
    return batch.astype(np.float32), share * targets + (1 - share) * targets[::-1]


class Pillow:
    """Augments batches in a pool of processes; each task is one batch."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, flags: argparse.Namespace):
        self.size, self.images = flags.batch_size, images[: flags.batch_size]
        self.targets = np.eye(CLASSES, dtype=np.float32)[labels[: flags.batch_size]]
        self.pool = multiprocessing.get_context("spawn").Pool(flags.workers)
        self.turn(2 * flags.workers)

    def turn(self, batches: int) -> float:
        """Images per second."""
        work = [(k, self.images, self.targets) for k in range(batches)]
        began = time.perf_counter()
        for _ in self.pool.imap(batch_by_pillow, work):
            pass
        return batches * self.size / (time.perf_counter() - began)

    def close(self) -> None:
        self.pool.terminate()


# --- torchvision and timm -------------------------------------------------------------------------------------------


class TorchDataset:
    """An endless dataset of torch."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        from timm.data.auto_augment import rand_augment_transform
        from timm.data.random_erasing import RandomErasing
        from torchvision import transforms

        policy = rand_augment_transform("rand-m9-n2-mstd0.5-inc1", {"translate_pct": 0.45, "img_mean": FILL})
        erase = RandomErasing(0.25, mode="pixel", device="cpu")
        parts = [transforms.RandomCrop(SIDE, 4), transforms.RandomHorizontalFlip(), policy, transforms.ToTensor()]
        self.transform = transforms.Compose([*parts, transforms.Normalize(MEAN, STD), erase])
        self.images, self.labels = images, labels.astype(np.int64)

    def __len__(self) -> int:
        return 1_000_000_000

    def __getitem__(self, index: int):
        index %= len(self.images)
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


class Collate:
    """Collates examples as torch does and mixes them as timm does, in the workers."""

    def __init__(self):
        from timm.data.mixup import Mixup

        self.mixup = Mixup(0.8, 1.0, num_classes=CLASSES)

    def __call__(self, examples: list):
        from torch.utils.data import default_collate

        images, labels = default_collate(examples)
        return self.mixup(images, labels)


class Timm:
    """Batches of a DataLoader with worker processes."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, flags: argparse.Namespace):
        import torch
        from torch.utils.data import DataLoader

        torch.set_num_threads(1)
        self.size, self.prefetched = flags.batch_size, 2 * flags.workers
        context = {"num_workers": flags.workers, "multiprocessing_context": "spawn"}
        self.batches = iter(DataLoader(TorchDataset(images, labels), self.size, collate_fn=Collate(), **context))
        self.turn(2)

    def turn(self, batches: int) -> float:
        """Images per second; batches that the workers prepared before the turn are not counted."""
        for _ in range(self.prefetched):
            next(self.batches)
        began = time.perf_counter()
        for _ in range(batches):
            next(self.batches)
        return batches * self.size / (time.perf_counter() - began)


def make(name: str, images: np.ndarray, labels: np.ndarray, flags: argparse.Namespace):
    if name == "step":
        return Step(flags)
    try:
        return {"ours": Ours, "pillow": Pillow, "timm": Timm}[name](images, labels, flags)
    except ModuleNotFoundError as error:
        if name != "timm":
            raise
        print(f"skipped: timm ({error})", file=sys.stderr)
        return None


def main(arguments: list[str]) -> None:
    flags = parse(arguments)
    images, labels = load(flags)
    sides = {name: make(name, images, labels, flags) for name in flags.only.split(",")}
    sides = {name: side for name, side in sides.items() if side is not None}
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(flags.turns):
        for name, side in sides.items():
            speeds[name].append(side.turn(flags.batches))
    for name, turns in speeds.items():
        line = {"name": name, "images_per_second": round(statistics.median(turns), 1), "batch_size": flags.batch_size}
        line |= {"slowest": round(min(turns), 1), "fastest": round(max(turns), 1), "turns": flags.turns}
        if name in ("pillow", "timm"):
            line["workers"] = flags.workers
        if name == "ours":
            ratios = {o: statistics.median(a / b for a, b in zip(turns, speeds[o], strict=True)) for o in speeds}
            line |= {f"ratio_to_{other}": round(ratio, 2) for other, ratio in ratios.items() if other != name}
            if "step" in speeds:
                line["share_of_step"] = round(1 / ratios["step"], 4)
        print(json.dumps(line), flush=True)
    if "pillow" in sides:
        sides["pillow"].close()


if __name__ == "__main__":
    main(sys.argv[1:])
