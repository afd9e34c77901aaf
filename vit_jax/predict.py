"""The command: python -m vit_jax.predict --workdir=DIR IMAGE_OR_FOLDER... [--top=5] [--csv=OUT] [--json]."""

import argparse
import contextlib
import csv
import importlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_jax import commands
from vit_jax.errors import UserError

if TYPE_CHECKING:
    from vit_jax.inference import Prediction, Predictor

DESCRIPTION = """\
Says what a trained model sees in images: the most probable classes of each.

  python -m vit_jax.predict --workdir=runs/photos holiday.jpg
  python -m vit_jax.predict --workdir=runs/photos --best --top=1 --csv=found.csv album/
  python -m vit_jax.predict --workdir=runs/photos --json album/ | jq .predictions[0]
  python -m vit_jax.predict --init=ViT-B_16.npz --classes=imagenet.txt holiday.jpg

Files may be of any size and format that Pillow reads, and are resized as in training; of a folder all images below it
are taken, sorted by path. What cannot be read is told of on standard error, and the rest goes on. The exit status is 0
where all were read, 1 where some could not be, and 2 where none could, or the command itself is wrong.

From Python: vit_jax.predict.Predictor("runs/photos")(["holiday.jpg"]) (docs/predict.md).
"""


def __getattr__(name: str) -> Any:
    """`Predictor` and `of_file`, imported when they are asked for: the command's --help need not wait for JAX."""
    if name in ("Predictor", "of_file"):
        return getattr(importlib.import_module("vit_jax.inference"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command's flags; --help and mistakes end the process, the latter with status 2."""
    parser = commands.parser("predict", DESCRIPTION)
    parser.add_argument("images", metavar="IMAGE_OR_FOLDER", nargs="+", help="what to look at")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--workdir", metavar="DIR", help="the folder of a run")
    which.add_argument("--init", metavar="FILE", help="or a file, URL or name that docs/weights.md lists")
    step = parser.add_mutually_exclusive_group()
    step.add_argument("--step", type=int, help="of a run: the checkpoint of this step (default: the newest)")
    step.add_argument("--best", action="store_true", help="of a run: the checkpoint with the best validation accuracy")
    parser.add_argument("--classes", metavar="TXT", help="of a file: the class names, a line each")
    parser.add_argument("--image_size", type=int, metavar="N", help="of a file: pixels (default: as its positions)")
    parser.add_argument(
        "--normalize",
        choices=("half", "imagenet"),
        help="of a file: mean and std 0.5 (default, of others' files), or ImageNet's",
    )
    parser.add_argument("--top", type=int, default=5, help="classes an image (default: %(default)s)")
    parser.add_argument("--csv", metavar="OUT", help="write path, rank, class and probability into this file")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line")
    parser.add_argument("--batch_size", type=int, default=64, help="images at a time (default: %(default)s)")
    return parser.parse_args(arguments)


def predict(flags: argparse.Namespace) -> int:
    """Looks at the images, prints and writes; returns the exit status.

    Raises:
        UserError: no run, no such checkpoint, no image found, or a place that cannot be written to.
    """
    _check(flags)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="surrogateescape")  # names of files are bytes, and need not be text
    from vit_jax import inference

    images = list(inference.expand(map(commands.folder_of, flags.images)))
    if not images:
        raise UserError(f"there is no image below {', '.join(flags.images[:3])}\n  give images, or folders of some")
    predictor, unread = _open(flags), 0
    several = len(predictor.inputs.classes) > 1
    with _table(flags.csv, several) as rows:
        for made in predictor.stream(images, flags.top):
            if isinstance(made, inference.Unreadable):
                unread += 1
                print(f"{made.image}: cannot be read as an image: {made.reason}", file=sys.stderr, flush=True)
                continue
            rows.extend(_rows(made, several))
            print(_json(made, several) if flags.json else _line(made, several))
    if unread:
        print(f"{unread:,} of {len(images):,} images could not be read", file=sys.stderr)
    return 0 if not unread else 1 if unread < len(images) else 2


def _check(flags: argparse.Namespace) -> None:
    for name in ("top", "batch_size"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name} is {getattr(flags, name)}\n  allowed: a whole number of at least 1")
    if flags.image_size is not None and flags.image_size < 1:
        raise UserError(f"--image_size is {flags.image_size}\n  allowed: a whole number of at least 1")
    foreign = ("classes", "image_size", "normalize") if flags.workdir else ("step",)
    for name in foreign:
        if getattr(flags, name) is not None:
            raise UserError(f"--{name} does not go with {'--workdir' if flags.workdir else '--init'}\n  leave it out")
    if flags.best and not flags.workdir:
        raise UserError("--best does not go with --init\n  leave it out")


def _open(flags: argparse.Namespace) -> "Predictor":
    from vit_jax.inference import Predictor, of_file
    from vit_jax.runtime import compilation_cache

    compilation_cache.cache_compilations()
    if flags.workdir:
        step = "best" if flags.best else flags.step
        return Predictor(commands.folder_of(flags.workdir), step=step, batch_size=flags.batch_size)
    names = None
    if flags.classes:
        try:
            names = Path(flags.classes).expanduser().read_text().splitlines()
        except (OSError, ValueError) as error:
            raise UserError(f"--classes={flags.classes} cannot be read: {error}") from error
    how = {"class_names": names, "image_size": flags.image_size, "normalize": flags.normalize}
    return Predictor(of_file(flags.init, **how), batch_size=flags.batch_size)


@contextlib.contextmanager
def _table(path: str | None, several: bool) -> Iterator[list[list[Any]]]:
    """A list of rows that end up in a CSV file, whole or not at all, where one is wanted."""
    rows: list[list[Any]] = []
    target = Path(path).expanduser() if path else None
    if target is not None and (target.is_dir() or not target.parent.is_dir()):
        raise UserError(f"--csv={path} is no file that can be written\n  give a name in a folder that there is")
    yield rows
    if target is None:
        return
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with open(scratch, "w", newline="", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(["path", *(["head"] if several else []), "rank", "class", "probability"])
            writer.writerows(rows)
        os.replace(scratch, target)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise UserError(f"--csv={path} cannot be written: {error.strerror}\n  give another name") from error


def _rows(made: "Prediction", several: bool) -> list[list[Any]]:
    return [
        [made.image, *([kind] if several else []), rank, guess.label, f"{guess.probability:.6g}"]
        for kind, guesses in made.heads.items()
        for rank, guess in enumerate(guesses, start=1)
    ]


def _json(made: "Prediction", several: bool) -> str:
    heads = {
        kind: [{"label": guess.label, "probability": guess.probability} for guess in guesses]
        for kind, guesses in made.heads.items()
    }
    return json.dumps({"path": made.image, "predictions": heads if several else next(iter(heads.values()))})


def _line(made: "Prediction", several: bool) -> str:
    parts = []
    for kind, guesses in made.heads.items():
        words = ", ".join(f"{guess.label} {100 * guess.probability:.1f} %" for guess in guesses)
        parts.append(f"{kind}: {words}" if several else words)
    return f"{made.image}  {'; '.join(parts)}"


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    flags = parse(arguments)
    return commands.finish(lambda: predict(flags))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
