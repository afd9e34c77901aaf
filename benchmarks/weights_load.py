"""How long loading a file of weights takes, and how much memory, beside NumPy reading the same arrays.

  python benchmarks/weights_load.py
  python benchmarks/weights_load.py --variant=Ti/16 --turns=5

It writes a file of the variant's size (B/16: 346 MB), Google's .npz and timm's .safetensors, and reads each with
`vit_jax.weights.load`, and the .npz with `numpy.load`, in turns, each in the same process for time and each in a fresh
one for memory. `seconds` are medians; `peak_mb` is how far the process grew above what it had before (imports, the
arrays of none), as the kernel counts it; `ratio` is against numpy, `times_size` against the file's size.
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
from vit_jax.models.vit import VisionTransformer
from vit_jax.weights.load import nested
from vit_jax.weights.shapes import parameter_shapes

WAYS = ("numpy", "load_npz", "load_safetensors", "load_npz_scan")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="B/16", help="size of the file (default: B/16)")
    parser.add_argument("--turns", type=int, default=7, help="times each way is measured (default: 7)")
    parser.add_argument("--memory", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    return parser.parse_args()


def write(variant: str, folder: Path) -> None:
    """Both files, with random numbers; their model's own config.json beside them."""
    model = VisionTransformer(classes=1000, **variants.fields(variant))
    generator, side = np.random.default_rng(0), 224 // model.patch_size
    shapes = parameter_shapes(model, (side, side), 3)
    parameters = nested({path: generator.standard_normal(shape, np.float32) for path, shape in shapes.items()})
    weights.save(folder / "model.npz", model, parameters)
    weights.save(folder / "model.safetensors", model, parameters, (224, 224))


def read(way: str, folder: Path) -> object:
    if way == "numpy":
        with np.load(folder / "model.npz") as file:
            return {name: file[name] for name in file.files}
    suffix = "safetensors" if way.endswith("safetensors") else "npz"
    return weights.load(folder / f"model.{suffix}", **({"scan": True} if way.endswith("scan") else {}))


def seconds(folder: Path, turns: int) -> dict[str, float]:
    times = {way: [] for way in WAYS}
    for turn in range(turns + 1):  # the first brings files and code into memory, and does not count
        for way in WAYS:
            started = time.perf_counter()
            result = read(way, folder)
            if turn:
                times[way].append(time.perf_counter() - started)
            del result
    return {way: median(values) for way, values in times.items()}


def peak_bytes(way: str, folder: Path) -> int:
    """Growth of this process while it reads, at its highest."""
    import jax

    jax.devices()

    def status(key: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
        return 1024 * int(line.split()[1])

    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is forgotten
    kept = read(way, folder)
    peak = status("VmHWM")
    del kept
    return peak - before


def main() -> None:
    flags = parse()
    if flags.memory:
        print(peak_bytes(flags.memory[0], Path(flags.memory[1])))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(flags.variant, folder)
        times = seconds(folder, flags.turns)
        for way in WAYS:
            command = [sys.executable, __file__, "--memory", way, name]
            peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            suffix = "safetensors" if way.endswith("safetensors") else "npz"
            size = (folder / f"model.{suffix}").stat().st_size
            line = {"name": way, "variant": flags.variant, "file_mb": round(size / 1e6, 1), "turns": flags.turns}
            line |= {"seconds": round(times[way], 4), "ratio": round(times[way] / times["numpy"], 3)}
            line |= {"peak_mb": round(peak / 1e6, 1), "times_size": round(peak / size, 3)}
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
