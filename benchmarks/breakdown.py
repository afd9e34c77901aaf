"""Where the time of a training step goes: matmuls, attention, elementwise, optimizer, input, idle.

    python benchmarks/breakdown.py --variant=S/16 --image_size=224 --batch_size=256 --dtype=bfloat16
    python benchmarks/breakdown.py --trace=runs/cifar10/profile --steps=10

The first form profiles the step of the trainer. It prints one JSON line: milliseconds per step of each kind, which add
up to `step`; the `share` of each; the step without the profiler, `unprofiled_ms`; and `attributed`, the share of busy
time whose kind is known from the compiled program, only from the name of the kernel, or not at all (the kind
`unattributed`). Time in which several kernels run is divided between them.

The second form reads a trace of `config.log.profile`. Without the text of the program, the kind is that of the kernel's
name, which distinguishes matmuls and attention kernels from the rest, but does not show what a fusion contains.

On a GPU the step is compiled without command buffers (CUDA graphs), because a trace does not name the instructions of
kernels that a graph launches.
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
    parser.add_argument("--trace", type=Path, help="directory of a trace to read instead of profiling")
    return parser.parse_args(arguments)


def profile(flags: argparse.Namespace, directory: Path) -> tuple[dict[str, str], float]:
    """Writes a trace of the step; the kinds of its instructions, and milliseconds per step without the profiler."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer=".strip()
    import jax
    from jax_sides import Trainer
    from work import Work

    from vit_jax.models import variants

    fields = variants.fields(flags.variant) | ({"depth": flags.depth} if flags.depth else {})
    sizes = {"image_size": flags.image_size, "classes": flags.classes, "batch_size": flags.batch_size}
    side = Trainer(Work("ours_trainer", "train", dtype=flags.dtype, **fields, **sizes))
    unprofiled = side.turn(flags.steps)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(directory, profiler_options=options):
        side.turn(flags.steps)
    return traces.kinds(side.update.as_text()), 1e3 * unprofiled / flags.steps


def main(arguments: list[str]) -> None:
    flags = parse(arguments)
    if flags.trace:
        line, kind_by_name = {"benchmark": "breakdown", "trace": str(flags.trace)}, {}
        table, attributed = traces.breakdown(traces.read(traces.find(flags.trace)), kind_by_name, flags.steps)
    else:
        with tempfile.TemporaryDirectory() as directory:
            kind_by_name, unprofiled = profile(flags, Path(directory))
            table, attributed = traces.breakdown(traces.read(traces.find(Path(directory))), kind_by_name, flags.steps)
        import jax

        line = {
            "benchmark": "breakdown",
            "device": jax.devices()[0].device_kind,
            "unprofiled_ms": round(unprofiled, 4),
        }
        line |= {name: getattr(flags, name) for name in ("variant", "image_size", "batch_size", "dtype", "steps")}
    step_ms = table["step"]
    share = {name: round(value / step_ms, 3) for name, value in table.items() if name != "step"} if step_ms else {}
    print(json.dumps(line | {"ms": table, "share": share, "attributed": attributed}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
