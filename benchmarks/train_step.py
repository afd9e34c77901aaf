"""Speed of a training step: ours, compared with other implementations of the same size with the same optimizer.

    python benchmarks/train_step.py --variant=Ti/4 --image_size=32 --batch_size=128
    python benchmarks/train_step.py --variant=B/16 --image_size=224 --batch_size=256 --dtypes=bfloat16
    python benchmarks/train_step.py --sides=ours,timm_compile --torch_python=/path/to/python --data=cifar10

--sides are the implementations to compare: ours (a bare training step, with the compiler options and memory settings of
training), ours_trainer (the step of `python -m vit_jax.main`: many per dispatch, from uint8 images), plain_flax (the
same model in Flax's own layers), torch (the same in PyTorch), timm and transformers; torch and timm also as
NAME_compile (torch.compile). In bfloat16, the PyTorch sides run under autocast; torch_autocast uses it in the float32
comparison too. All use the same parameters, batch, loss and AdamW (fused in PyTorch); `losses` of the first steps show
that they compute the same (except that ours_trainer does not apply weight decay to biases).

Each side runs in a separate process; they take turns (A B A B), so that other load on the machine affects all of them.
Prints one JSON line per side and compute dtype: images_per_second and step_ms (medians over turns), spread_ms, mfu
(from three times the FLOPs of the forward pass's matmuls, if the device's peak is known), compile_s, peak_memory_mb (of
the device; on CPU of the process), waiting (cores that it used while other sides were measured), and for all but ours
`ratio`, the speedup of ours (or else of ours_trainer) over this side: the median over turns, with ratio_min and
ratio_max. For a side that fails the line has `error`.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import numpy as np
import sides as comparing
from sides import Side
from work import Work

from vit_jax.models.summary import forward_flops
from vit_jax.models.vit import VisionTransformer
from vit_jax.runtime import hardware


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    comparing.add_flags(parser, variant="Ti/4", image_size=32)
    parser.add_argument("--batch_size", type=int, default=128, help="images per step (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="steps per turn (default: as --seconds allows)")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="approximate length of a turn (default: %(default)s)"
    )
    parser.add_argument("--data", help="a dataset instead of noise, such as cifar10 (with its own image size)")
    return parser.parse_args(arguments)


def write_images(name: str, batches: int, batch_size: int, image_size: int, directory: str) -> Path:
    """Writes the first images of a dataset's training split; the path of the file."""
    from vit_jax.data import sources

    source = sources.load(name, "train", image_size=image_size)
    indices = np.arange(batches * batch_size)
    path = Path(directory) / "images.npz"
    np.savez(path, images=source.read(indices), labels=source.labels[indices])
    return path


def mfu(work: Work, device: str, images_per_second: float) -> dict[str, float]:
    """Model FLOPs utilization, if the peak of the device is known."""
    peak = hardware.peak(device)
    if peak is None:
        return {}
    model = VisionTransformer(classes=work.classes, **work.model())
    flops = 3 * forward_flops(model, (work.image_size, work.image_size), 3)
    return {"mfu": round(images_per_second * flops / peak, 4)}


def describe(side: Side, work: Work, seconds: list[float]) -> dict:
    """The JSON line of a side; `seconds` are per step, one value for each turn."""
    step = statistics.median(seconds)
    return {
        "device": side.report["device"],
        "library": side.report["library"],
        "images_per_second": round(work.batch_size / step, 1),
        "step_ms": round(1e3 * step, 2),
        "spread_ms": round(1e3 * (max(seconds) - min(seconds)), 2),
        **mfu(work, side.report["device"], work.batch_size / step),
        "compile_s": side.report["compile_s"],
        "peak_memory_mb": side.report["peak_memory_mb"],
        "waiting": side.waiting(),
        "losses": side.report["losses"],
    }


def compare(flags: argparse.Namespace, dtype: str, names: list[str], images: str | None) -> None:
    """Compares all sides in one compute dtype and prints their lines."""
    if dtype == "bfloat16":
        names = [name for name in names if name != "torch_autocast"]  # the same as torch there
    more = {"images": images, "batches": 4 if images else 1}
    works = {name: comparing.work_of(flags, name, "train", dtype, flags.batch_size, **more) for name in names}
    opened, errors = comparing.open_all(list(works.values()), flags.torch_python)
    count = {
        side.name: flags.steps or min(1000, max(1, round(flags.seconds / side.report["step_s"]))) for side in opened
    }
    errors |= comparing.take_turns(opened, flags.turns, lambda side: count[side.name])
    times = {side.name: [seconds / count[side.name] for seconds in side.turns] for side in opened}
    for name in names:
        line = {"benchmark": "train_step", "name": name, "variant": flags.variant, "depth": works[name].depth}
        line |= {"image_size": flags.image_size, "batch_size": flags.batch_size, "dtype": dtype}
        line |= {"data": flags.data or "noise"}
        if name in errors:
            print(json.dumps(line | {"error": errors[name]}), flush=True)
            continue
        side = next(side for side in opened if side.name == name)
        line |= describe(side, works[name], times[name])
        reference = "ours" if "ours" in times else "ours_trainer"
        if name != reference and reference in times:
            ratio = comparing.ratio(times[reference], times[name])
            line |= {"ratio": ratio.median, "ratio_min": ratio.minimum, "ratio_max": ratio.maximum}
        print(json.dumps(line), flush=True)
    for side in opened:
        side.close()


def main(arguments: list[str]) -> None:
    flags = parse(arguments)
    names = comparing.chosen(flags)
    with tempfile.TemporaryDirectory() as directory:
        images = str(write_images(flags.data, 4, flags.batch_size, flags.image_size, directory)) if flags.data else None
        for dtype in flags.dtypes.split(","):
            compare(flags, dtype, names, images)


if __name__ == "__main__":
    main(sys.argv[1:])
