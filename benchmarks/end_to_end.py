"""Time to the first step and speed of the training command, with data, evaluation and checkpoints.

    python benchmarks/end_to_end.py --config=configs/cifar10.py:cpu --steps=200
    python benchmarks/end_to_end.py --images=20000 --image_size=32 --config.model.variant=S/4 --config.augment.flip=True
    python benchmarks/end_to_end.py --only=speed --images=10240 --config=configs/cifar10.py:lite

start: seconds of `import vit_jax.training.train` (and of starting Python), and seconds until the first record is in
metrics.jsonl, with an empty and with a filled compilation cache. speed: images per second of a run with data,
augmentation, metrics, evaluation and checkpoints: in wall-clock time from the first record to the last, which includes
two evaluations and a checkpoint (`whole`), and of training alone, from metrics.jsonl (`training`). Compared with the
bare step of the same model on a fixed batch (`bare`), measured in the same turn by another process. `training_ratio` is
training / bare and `ratio` is whole / bare: medians over turns, with minimum (_min) and maximum (_max). Evaluations use
the whole test split, however few the training steps are.

--config.SECTION.KEY=VALUE is passed to the command; --images=N uses N images of noise instead of the config's dataset.
Prints two JSON lines, or one with --only.
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
    parser.add_argument("--steps", type=int, default=200, help="steps per run (default: %(default)s)")
    parser.add_argument(
        "--turns", type=int, default=3, help="number of runs, each with a bare step (default: %(default)s)"
    )
    parser.add_argument("--images", type=int, help="number of images of noise, instead of the config's dataset")
    parser.add_argument(
        "--image_size", type=int, default=32, help="height and width of these in pixels (default: %(default)s)"
    )
    parser.add_argument("--only", choices=["start", "speed"], help="measure only this")
    own = [argument for argument in arguments if not argument.startswith("--config.")]
    return parser.parse_args(own), [argument for argument in arguments if argument.startswith("--config.")]


def write_noise(directory: Path, count: int, size: int) -> list[str]:
    """Writes a dataset of noise; the overrides that select it."""
    generator = np.random.default_rng(0)
    for split, examples in (("train", count), ("test", max(count // 5, 1))):
        np.save(directory / f"{split}_images.npy", generator.integers(0, 256, (examples, size, size, 3), np.uint8))
        np.save(directory / f"{split}_labels.npy", generator.integers(0, 10, examples))
    return [
        "--config.data.name=arrays",
        f"--config.data.dir={directory}",
        f"--config.data.cache_dir={directory / 'data'}",
    ]


class Command:
    """Runs `python -m vit_jax.main` with a separate compilation cache."""

    def __init__(self, flags: argparse.Namespace, overrides: list[str], directory: Path):
        self.arguments = [f"--config={flags.config}", *overrides]
        self.environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.environment |= {"JAX_COMPILATION_CACHE_DIR": str(directory / "compiled")}
        self.environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5"}

    def config(self) -> ConfigDict:
        config = options.load(self.arguments[0].removeprefix("--config="))
        options.override_all(config, [override.removeprefix("--config.") for override in self.arguments[1:]])
        return config

    def run(self, workdir: Path, *overrides: str) -> list[tuple[float, dict[str, Any]]]:
        """Runs the command; its records, each with the seconds after which it was written."""
        command = [sys.executable, "-m", "vit_jax.main", *self.arguments, *overrides, f"--workdir={workdir}"]
        began, records = time.perf_counter(), []
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(command, cwd=ROOT, env=self.environment, stdout=output, stderr=output)
            ended = False
            while not ended:
                ended = process.poll() is not None
                with contextlib.suppress(FileNotFoundError):
                    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
                    complete = [line for line in lines if line.endswith("\n")]
                    new = complete[len(records) :]
                    records += [(time.perf_counter() - began, json.loads(line)) for line in new]
                time.sleep(0.005)
            if process.returncode:
                output.seek(0)
                raise SystemExit(output.read())
        return records


def imports() -> dict[str, float]:
    """Seconds of importing the trainer and of starting Python; the minimum of three measurements."""

    def fastest(code: str) -> float:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env={**os.environ, "PYTHONPATH": "."})
            times.append(time.perf_counter() - began)
        return round(min(times), 3)

    return {"imports_s": fastest("import vit_jax.training.train"), "python_s": fastest("pass")}


def start(command: Command, directory: Path) -> dict[str, float]:
    """Seconds until the first record, with an empty and with a filled compilation cache."""
    short = [*length(4), "--config.log.every=1", "--config.train.evaluate_every=0", "--config.checkpoint.every=0"]
    times = {name: command.run(directory / name, *short)[0][0] for name in ("cold", "cached")}
    return {f"first_step_{name}_s": round(seconds, 2) for name, seconds in times.items()}


def length(steps: int) -> list[str]:
    return ["--config.train.epochs=None", f"--config.train.steps={steps}"]


def load(data: ConfigDict) -> Source:
    """Loads the training set, so that it is decoded before the runs begin."""
    options = {"data_dir": data.dir, "cache_dir": data.cache_dir, "image_size": data.image_size}
    return sources.load(data.name, data.train, **options)


def bare(config: ConfigDict, source: Source) -> sides.Side:
    """The side that runs the bare step of the config's model and batch size."""
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


def speed(command: Command, flags: argparse.Namespace, directory: Path, source: Source) -> dict[str, Any]:
    """Measures the runs and the bare step in turns; the figures of the JSON line."""
    config = command.config()
    batch, side, turns = config.train.batch_size, bare(config, source), []
    tenth = max(1, flags.steps // 10)
    often = [f"--config.log.every={tenth}", f"--config.train.evaluate_every={flags.steps // 2}"]
    often += [f"--config.checkpoint.every={flags.steps // 2}"]
    for turn in range(flags.turns):
        steps = max(3, round(2 / side.report["step_s"]))
        bare_speed = batch * steps / side.turn(steps)
        records = command.run(directory / f"run{turn}", *length(flags.steps), *often)
        (first, record), (last, final) = records[0], records[-1]
        whole = batch * (final["step"] - record["step"]) / (last - first)
        training = statistics.median(
            line["images_per_second"] for _, line in records[1:] if "images_per_second" in line
        )
        turns.append((whole, training, bare_speed))
    side.close()
    ratios = {"training_ratio": [training / bare for _, training, bare in turns]}
    ratios |= {"ratio": [whole / bare for whole, _, bare in turns]}
    medians = {
        name: round(statistics.median(turn[index] for turn in turns), 1)
        for index, name in enumerate(("whole", "training", "bare"))
    }
    about = {"device": side.report["device"], "batch_size": batch, "steps": flags.steps}
    for name, each in ratios.items():
        medians |= {name: round(statistics.median(each), 3)}
        medians |= {f"{name}_min": round(min(each), 3), f"{name}_max": round(max(each), 3)}
    return about | medians


def main(arguments: list[str]) -> None:
    flags, overrides = parse(arguments)
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        if flags.images:
            overrides = write_noise(directory, flags.images, flags.image_size) + overrides
        command = Command(flags, overrides, directory)
        config = command.config()
        source = load(config.data)
        line = {"benchmark": "end_to_end", "config": flags.config, "variant": config.model.variant}
        if flags.only != "speed":
            print(json.dumps(line | {"name": "start"} | imports() | start(command, directory)), flush=True)
        if flags.only != "start":
            print(json.dumps(line | {"name": "speed"} | speed(command, flags, directory, source)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
