"""Time of a forward pass, one call at a time: ours, compared with other implementations of the same size.

    python benchmarks/inference.py --variant=S/16 --image_size=224 --batch_sizes=1,64
    python benchmarks/inference.py --sides=ours,timm --dtypes=float32

The sides are those of train_step.py, each in a separate process, in turns; every call is waited for. Prints one JSON
line per side, batch size and compute dtype: ms (the median of all calls), ms_p95, images_per_second (of the median),
logits (the first three of the first image: all sides have the same parameters and images), waiting (cores used while
other sides were measured), and for all but ours `ratio`, the speedup of ours over this side: the median over turns of
the ratio of medians, with ratio_min and ratio_max. For a side that fails the line has `error`.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import sides as comparing

KNOWN = ("ours", "plain_flax", "torch", "torch_compile", "timm", "timm_compile", "transformers")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    comparing.add_flags(parser, variant="S/16", image_size=224, known=KNOWN)
    parser.add_argument("--batch_sizes", default="1,64", help="images per call (default: %(default)s)")
    parser.add_argument("--calls", type=int, help="calls per turn (default: as --seconds allows)")
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="approximate length of a turn (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def compare(flags: argparse.Namespace, dtype: str, batch_size: int, names: list[str]) -> None:
    """Compares all sides in one compute dtype and batch size, and prints their lines."""
    works = [comparing.work_of(flags, name, "infer", dtype, batch_size) for name in names]
    opened, errors = comparing.open_all(works, flags.torch_python)

    def calls(side: comparing.Side) -> int:
        return flags.calls or min(1000, max(1, round(flags.seconds / side.report["step_s"])))

    errors |= comparing.take_turns(opened, flags.turns, calls)
    medians = {side.name: [statistics.median(turn) for turn in side.turns] for side in opened}
    for work in works:
        name = work.side
        line = {"benchmark": "inference", "name": name, "variant": flags.variant, "depth": work.depth}
        line |= {"image_size": flags.image_size, "batch_size": batch_size, "dtype": dtype}
        if name in errors:
            print(json.dumps(line | {"error": errors[name]}), flush=True)
            continue
        side = next(side for side in opened if side.name == name)
        times = sorted(seconds for turn in side.turns for seconds in turn)
        median = statistics.median(times)
        line |= {"device": side.report["device"], "library": side.report["library"]}
        line |= {"ms": round(1e3 * median, 3), "ms_p95": round(1e3 * times[int(0.95 * len(times))], 3)}
        line |= {"images_per_second": round(batch_size / median, 1), "waiting": side.waiting()}
        line["logits"] = side.report["logits"]
        if name != "ours" and "ours" in medians:
            ratio = comparing.ratio(medians["ours"], medians[name])
            line |= {"ratio": ratio.median, "ratio_min": ratio.minimum, "ratio_max": ratio.maximum}
        print(json.dumps(line), flush=True)
    for side in opened:
        side.close()


def main(arguments: list[str]) -> None:
    flags = parse(arguments)
    names = comparing.chosen(flags, KNOWN)
    for dtype in flags.dtypes.split(","):
        for batch_size in map(int, flags.batch_sizes.split(",")):
            compare(flags, dtype, batch_size, names)


if __name__ == "__main__":
    main(sys.argv[1:])
