"""Time and memory of loading a file of weights, compared with NumPy reading the same arrays.

  python benchmarks/weights_load.py
  python benchmarks/weights_load.py --variant=Ti/16 --turns=5

Writes a model of the variant's size (B/16: 346 MB) as Google's .npz and timm's .safetensors. Reads both files with
`vit_jax.weights.load`, and the .npz with `numpy.load`, in turns; in one process for time, and each in a fresh process
for memory. `seconds` are medians; `peak_mb` is the growth of the process over its size before reading, as the operating
system counts it; `ratio` is relative to NumPy, `times_size` to the size of the file.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from vit_jax import weights
from vit_jax.models import variants
from vit_jax.models.parameters import nested, parameter_shapes
from vit_jax.models.vit import VisionTransformer

READERS = ("numpy", "load_npz", "load_safetensors", "load_npz_scan")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="B/16", help="size and patch size of the model (default: B/16)")
    parser.add_argument("--turns", type=int, default=7, help="measurements of each reader (default: 7)")
    parser.add_argument("--memory", nargs=2, metavar=("READER", "DIRECTORY"), help=argparse.SUPPRESS)
    return parser.parse_args()


def write(variant: str, directory: Path) -> None:
    """Writes both files, with random parameters."""
    model = VisionTransformer(classes=1000, **variants.fields(variant))
    generator, side = np.random.default_rng(0), 224 // model.patch_size
    shapes = parameter_shapes(model, (side, side), 3)
    parameters = nested({path: generator.standard_normal(shape, np.float32) for path, shape in shapes.items()})
    weights.save(directory / "model.npz", model, parameters)
    weights.save(directory / "model.safetensors", model, parameters, (224, 224))


def read(reader: str, directory: Path) -> object:
    if reader == "numpy":
        with np.load(directory / "model.npz") as file:
            return {name: file[name] for name in file.files}
    suffix = "safetensors" if reader.endswith("safetensors") else "npz"
    return weights.load(directory / f"model.{suffix}", **({"scan": True} if reader.endswith("scan") else {}))


def seconds(directory: Path, turns: int) -> dict[str, float]:
    times = {reader: [] for reader in READERS}
    for turn in range(turns + 1):  # the first is not counted: it reads files and code into memory
        for reader in READERS:
            started = time.perf_counter()
            result = read(reader, directory)
            if turn:
                times[reader].append(time.perf_counter() - started)
            del result
    return {reader: median(values) for reader, values in times.items()}


def peak_bytes(reader: str, directory: Path) -> int:
    """Peak growth of this process while it reads, in bytes."""
    import jax

    jax.devices()

    def status(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return 1024 * int(line.split()[1])

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    kept = read(reader, directory)
    peak = status("VmHWM")
    del kept
    return peak - before


def main() -> None:
    flags = parse()
    if flags.memory:
        print(peak_bytes(flags.memory[0], Path(flags.memory[1])))
        return
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        write(flags.variant, directory)
        times = seconds(directory, flags.turns)
        for reader in READERS:
            command = [sys.executable, __file__, "--memory", reader, name]
            peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            suffix = "safetensors" if reader.endswith("safetensors") else "npz"
            size = (directory / f"model.{suffix}").stat().st_size
            line = {"name": reader, "variant": flags.variant, "file_mb": round(size / 1e6, 1), "turns": flags.turns}
            line |= {"seconds": round(times[reader], 4), "ratio": round(times[reader] / times["numpy"], 3)}
            line |= {"peak_mb": round(peak / 1e6, 1), "times_size": round(peak / size, 3)}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
