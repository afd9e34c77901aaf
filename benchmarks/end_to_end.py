"""The real command: time to the first step, and its speed with everything that belongs to a run.

    python benchmarks/end_to_end.py --config=configs/cifar10.py:cpu --steps=200
    python benchmarks/end_to_end.py --images=20000 --image_size=32 --config.model.variant=S/4 --config.augment.flip=True
    python benchmarks/end_to_end.py --only=speed --images=10240 --config=configs/cifar10.py:lite

start: seconds of `import vit_jax.training.train` (and of Python alone), and until the first record is in metrics.jsonl,
with an empty compile cache and with a filled one.
speed: images per second of the run with data, augmentation, records, evaluation and checkpoints on, from its first
record to its last, in wall-clock time (`whole`; two evaluations and a checkpoint are between), and of its training
alone, as metrics.jsonl has it (`training`), compared with the bare step of the same model and batch, a fixed batch in a
loop, measured in the same turn by another process.
`training_ratio` is training / bare and `ratio` whole / bare, medians of the turns' own; evaluations, which score the
whole test split however few the steps are, count in the latter alone. --config.SECTION.KEY=VALUE goes to the command;
--images uses this many images of noise instead of the config's data set. Two JSON lines, or one with --only.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import numpy as np
import sides
from ml_collections import ConfigDict
from work import Work

from vit_jax import config as options
from vit_jax.data import sources
from vit_jax.data.sources import Source
from vit_jax.models import variants


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the overrides for the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/cifar10.py:cpu", help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="per run (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="runs, each with a bare step (default: %(default)s)")
    parser.add_argument("--images", type=int, help="number of images of noise instead of the config's set")
    parser.add_argument("--image_size", type=int, default=32, help="of these, in pixels (default: %(default)s)")
    parser.add_argument("--only", choices=["start", "speed"], help="measure this alone")
    mine = [argument for argument in arguments if not argument.startswith("--config.")]
    return parser.parse_args(mine), [argument for argument in arguments if argument.startswith("--config.")]


def noise(folder: Path, count: int, size: int) -> list[str]:
    """Writes a set of noise; the overrides that take it."""
    generator = np.random.default_rng(0)
    for split, examples in (("train", count), ("test", max(count // 5, 1))):
        np.save(folder / f"{split}_images.npy", generator.integers(0, 256, (examples, size, size, 3), np.uint8))
        np.save(folder / f"{split}_labels.npy", generator.integers(0, 10, examples))
    return ["--config.data.name=arrays", f"--config.data.dir={folder}", f"--config.data.cache_dir={folder / 'data'}"]


class Command:
    """Runs `python -m vit_jax.main` with a compile cache of its own."""

    def __init__(self, flags: argparse.Namespace, overrides: list[str], folder: Path):
        self.given = [f"--config={flags.config}", *overrides]
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.environment |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
        self.environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}

    def config(self) -> ConfigDict:
        config = options.load(self.given[0].removeprefix("--config="))
        for override in self.given[1:]:
            options.override(config, override.removeprefix("--config."))
        return config

    def run(self, workdir: Path, *overrides: str) -> list[tuple[float, dict[str, Any]]]:
        """Runs it to its end; the records, each with the seconds after which it was there."""
        command = [sys.executable, "-m", "vit_jax.main", *self.given, *overrides, f"--workdir={workdir}"]
        began, seen = time.perf_counter(), []
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=output, stderr=output)
            ended = False
            while not ended:
                ended = process.poll() is not None
                with contextlib.suppress(FileNotFoundError):
                    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
                    whole = [line for line in lines if line.endswith("\n")]
                    seen += [(time.perf_counter() - began, json.loads(line)) for line in whole[len(seen) :]]
                time.sleep(0.005)
            if process.returncode:
                output.seek(0)
                raise SystemExit(output.read())
        return seen


def imports() -> dict[str, float]:
    """Seconds until the trainer is imported, and of Python alone; the least of three."""

    def least(code: str) -> float:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": "."})
            times.append(time.perf_counter() - began)
        return round(min(times), 3)

    return {"imports_s": least("import vit_jax.training.train"), "python_s": least("pass")}


def start(command: Command, folder: Path) -> dict[str, float]:
    """Seconds until the first step is recorded, with an empty compile cache and with a filled one."""
    few = [*length(4), "--config.log.every=1", "--config.train.evaluate_every=0", "--config.checkpoint.every=0"]
    times = {name: command.run(folder / name, *few)[0][0] for name in ("cold", "cached")}
    return {f"first_step_{name}_s": round(seconds, 2) for name, seconds in times.items()}


def length(steps: int) -> list[str]:
    return ["--config.train.epochs=None", f"--config.train.steps={steps}"]


def load(data: ConfigDict) -> Source:
    """The training set; from then on it is decoded, and no run waits for that."""
    where = {"data_dir": data.dir, "cache_dir": data.cache_dir, "image_size": data.image_size}
    return sources.load(data.name, data.train, **where)


def bare(config: ConfigDict, source: Source) -> sides.Side:
    """The bare step of the config's model and batch."""
    fields = variants.fields_of_options(config.model.to_dict())
    sizes = {name: fields[name] for name in ("width", "depth", "heads", "mlp_width", "patch_size")}
    sizes |= {"image_size": source.images.shape[1], "channels": source.images.shape[3]}
    sizes |= {"classes": len(source.class_names)}
    dtype = config.model.dtype
    if dtype == "auto":
        code = "import jax; print('float32' if jax.default_backend() == 'cpu' else 'bfloat16')"
        dtype = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()
    section = config.model.to_dict()
    work = Work("ours", "train", dtype=dtype, batch_size=config.train.batch_size, fields=section, **sizes)
    return sides.Side(work, sys.executable)


def speed(command: Command, flags: argparse.Namespace, folder: Path, source: Source) -> dict[str, Any]:
    """The runs and the bare step, in turns."""
    config = command.config()
    batch, side, turns = config.train.batch_size, bare(config, source), []
    tenth = max(1, flags.steps // 10)
    often = [f"--config.log.every={tenth}", f"--config.train.evaluate_every={flags.steps // 2}"]
    often += [f"--config.checkpoint.every={flags.steps // 2}"]
    for turn in range(flags.turns):
        steps = max(3, round(2 / side.report["step_s"]))
        alone = batch * steps / side.turn(steps)
        seen = command.run(folder / f"run{turn}", *length(flags.steps), *often)
        (first, record), (last, final) = seen[0], seen[-1]
        whole = batch * (final["step"] - record["step"]) / (last - first)
        training = statistics.median(line["images_per_second"] for _, line in seen[1:] if "images_per_second" in line)
        turns.append((whole, training, alone))
    side.close()
    ratios = {"training_ratio": [training / alone for _, training, alone in turns]}
    ratios |= {"ratio": [whole / alone for whole, _, alone in turns]}
    medians = {
        name: round(statistics.median(turn[place] for turn in turns), 1)
        for place, name in enumerate(("whole", "training", "bare"))
    }
    about = {"device": side.report["device"], "batch_size": batch, "steps": flags.steps}
    for name, each in ratios.items():
        medians |= {name: round(statistics.median(each), 3)}
        medians |= {f"{name}_least": round(min(each), 3), f"{name}_most": round(max(each), 3)}
    return about | medians


def main(arguments: list[str]) -> None:
    flags, overrides = parse(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if flags.images:
            overrides = noise(folder, flags.images, flags.image_size) + overrides
        command = Command(flags, overrides, folder)
        config = command.config()
        source = load(config.data)
        given = {"benchmark": "end_to_end", "config": flags.config, "variant": config.model.variant}
        if flags.only != "speed":
            print(json.dumps(given | {"name": "start"} | imports() | start(command, folder)), flush=True)
        if flags.only != "start":
            print(json.dumps(given | {"name": "speed"} | speed(command, flags, folder, source)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
