"""Where the time of a training step goes: matmuls, attention, elementwise, optimizer, input, idle.

    python benchmarks/breakdown.py --variant=S/16 --image_size=224 --batch_size=256 --dtype=bfloat16
    python benchmarks/breakdown.py --trace=runs/cifar10/profile --steps=10

The first form profiles the trainer's own step; one JSON line: milliseconds per step of each kind, which add up to
`step`; `share` of each; the step without the profiler, `undisturbed_ms`; and `attributed`, which share of the busy time
is known from the compiled program, from a kernel's name alone, or not at all (the kind `unattributed`). While several
kernels run at once, each is given its part of the time.

The second form reads what `config.log.profile` wrote; without the program's text everything goes by the names of
kernels, which tell matmuls and attention kernels from the rest, but not what is inside a fusion.

On a GPU the step is compiled without command buffers (CUDA graphs): a trace does not name the instructions of kernels
that a graph launches.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import traces


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="Ti/4", help="size and patch size (default: %(default)s)")
    parser.add_argument("--depth", type=int, help="encoder blocks (default: the variant's)")
    parser.add_argument("--image_size", type=int, default=32, help="height and width in pixels (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=128, help="images per step (default: %(default)s)")
    parser.add_argument("--classes", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="(default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="steps in the trace (default: %(default)s)")
    parser.add_argument("--trace", type=Path, help="a directory with a trace, to read that one")
    return parser.parse_args(arguments)


def profile(flags: argparse.Namespace, folder: Path) -> tuple[dict[str, str], float]:
    """Writes a trace of the step; returns the kinds of its instructions, and its milliseconds without the profiler."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer=".strip()
    import jax
    from jax_sides import Trainer
    from work import Work

    from vit_jax.models import variants

    fields = variants.fields(flags.variant) | ({"depth": flags.depth} if flags.depth else {})
    sizes = {"image_size": flags.image_size, "classes": flags.classes, "batch_size": flags.batch_size}
    side = Trainer(Work("ours_trainer", "train", dtype=flags.dtype, **fields, **sizes))
    undisturbed = side.turn(flags.steps)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(folder, profiler_options=options):
        side.turn(flags.steps)
    return traces.kinds(side.update.as_text()), 1e3 * undisturbed / flags.steps


def main(arguments: list[str]) -> None:
    flags = parse(arguments)
    if flags.trace:
        line, of = {"benchmark": "breakdown", "trace": str(flags.trace)}, {}
        table, attributed = traces.breakdown(traces.read(traces.find(flags.trace)), of, flags.steps)
    else:
        with tempfile.TemporaryDirectory() as folder:
            of, undisturbed = profile(flags, Path(folder))
            table, attributed = traces.breakdown(traces.read(traces.find(Path(folder))), of, flags.steps)
        import jax

        line = {
            "benchmark": "breakdown",
            "device": jax.devices()[0].device_kind,
            "undisturbed_ms": round(undisturbed, 4),
        }
        line |= {name: getattr(flags, name) for name in ("variant", "image_size", "batch_size", "dtype", "steps")}
    whole = table["step"]
    share = {name: round(value / whole, 3) for name, value in table.items() if name != "step"} if whole else {}
    print(json.dumps(line | {"ms": table, "share": share, "attributed": attributed}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
