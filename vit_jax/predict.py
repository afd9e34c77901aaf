"""The command `python -m vit_jax.predict`; from Python: `predict.Predictor` and `predict.of_file`."""

import argparse
import csv
import importlib
import sys
from typing import TYPE_CHECKING, Any

from vit_jax import atomic, commands, paths, terminal
from vit_jax.errors import UserError
from vit_jax.progress import Counter

if TYPE_CHECKING:
    from vit_jax.inference import Prediction, Predictor

DESCRIPTION = """\
Classifies images with a trained model and prints the most probable classes of each image.

  %(prog)s --workdir=runs/photos holiday.jpg
  %(prog)s --workdir=runs/photos --best --top=1 --csv=predictions.csv album/
  %(prog)s --workdir=runs/photos --picture=predictions.png album/
  %(prog)s --workdir=runs/photos --json album/ | jq .predictions[0]
  %(prog)s --init=augreg-b16-224 holiday.jpg
  %(prog)s --init=openai/clip-vit-base-patch32 --classes=cat,dog,"great white shark" holiday.jpg

Images can have any size and any format that Pillow reads; they are resized as in training, with --init as the file
records it. A directory stands for all images below it, sorted by path. Images that cannot be read are reported on
standard error and skipped. The exit status is 0 if all images were read, 1 if some were not, and 2 if none was or the
command line is wrong.

From Python: vit_jax.predict.Predictor("runs/photos")(["holiday.jpg"]) (docs/predict.md).
"""


def __getattr__(name: str) -> Any:
    """Imports `Predictor` and `of_file` when they are first used, so that --help does not wait for JAX."""
    if name in ("Predictor", "of_file"):
        return getattr(importlib.import_module("vit_jax.inference"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command's flags; --help and wrong flags end the process, the latter with status 2."""
    parser = commands.parser("predict", DESCRIPTION)
    parser.add_argument("images", metavar="IMAGE_OR_DIRECTORY", nargs="+", help="images to classify")
    commands.add_model_flags(parser)
    commands.add_classes_flags(parser)
    commands.add_image_flags(parser)
    parser.add_argument("--top", type=int, default=5, help="number of classes per image (default: %(default)s)")
    parser.add_argument("--csv", metavar="FILE", help="also write path, rank, class and probability to this CSV file")
    parser.add_argument("--picture", metavar="PNG", help="also draw the images with their most probable classes")
    parser.add_argument("--json", action="store_true", help="print one JSON object per image")
    parser.add_argument("--batch_size", type=int, default=64, help="images per batch (default: %(default)s)")
    return parser.parse_args(arguments)


def predict(flags: argparse.Namespace) -> int:
    """Classifies the images, prints and writes the predictions; returns the exit status.

    Raises:
        UserError: there is no such run or checkpoint, there are no images, or the CSV file cannot be written.
    """
    _check(flags)
    from vit_jax import inference, prediction_sheet

    images, notes = commands.images_below(flags.images)
    predictor, num_unreadable, rows, drawn = _open(flags), 0, [], []
    for note in notes:
        terminal.warn(note)
    has_several_heads = len(predictor.inputs.classes) > 1
    with Counter("classifying", len(images), "images") as counter:
        for prediction in counter.over(predictor.stream(images, flags.top)):
            if isinstance(prediction, inference.Unreadable):
                num_unreadable += 1
                message = f"{prediction.image}: cannot be read as an image: {prediction.reason}"
                terminal.warn(message)
                continue
            rows += _rows(prediction, has_several_heads)
            drawn.append(prediction)
            terminal.output(_json(prediction, has_several_heads) if flags.json else _line(prediction))
            if terminal.lost() and not flags.csv and not flags.picture:
                break
    if flags.csv:
        _write_csv(flags.csv, ["path", *(["head"] if has_several_heads else []), "rank", "class", "probability"], rows)
    if flags.picture and drawn:
        terminal.warn(
            prediction_sheet.write(drawn, paths.expand(flags.picture, "--picture"), f"--picture={flags.picture}")
        )
    if num_unreadable:
        terminal.warn(f"{num_unreadable:,} of {len(images):,} images could not be read")
    return 0 if not num_unreadable else 1 if num_unreadable < len(images) else 2


def _check(flags: argparse.Namespace) -> None:
    for name in ("top", "batch_size", "image_size"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} is {value}\n  allowed: an integer of at least 1")
    source, other = ("--workdir", "--init") if flags.workdir else ("--init", "--workdir")
    for name in ("classes", "prompt", "image_size", "normalize") if flags.workdir else ("step", "best"):
        if getattr(flags, name) not in (None, False):
            raise UserError(f"--{name} cannot be combined with {source}\n  omit it, or use {other}")
    if flags.init:
        paths.check_source(flags.init, "--init")
    for name, value in (("--csv", flags.csv), ("--picture", flags.picture)):
        target = paths.expand(value, name) if value else None
        if target is not None and (target.is_dir() or not target.parent.is_dir()):
            raise UserError(f"{name}={value} cannot be written\n  use a file name in an existing directory")


def _open(flags: argparse.Namespace) -> "Predictor":
    from vit_jax.inference import Predictor
    from vit_jax.runtime import compilation_cache

    commands.start_jax()
    compilation_cache.cache_compilations()
    if flags.workdir:
        workdir, step = paths.expand(flags.workdir, "--workdir"), "best" if flags.best else flags.step
        return Predictor(workdir, step=step, batch_size=flags.batch_size)
    return Predictor(commands.classifier_of(flags), batch_size=flags.batch_size)


def _write_csv(path: str, header: list[str], rows: list[list[Any]]) -> None:
    """Writes a CSV file, completely or not at all."""
    target = paths.expand(path, "--csv")
    try:
        with atomic.replace(target, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(header)
            writer.writerows(rows)
    except OSError as error:
        raise UserError(f"--csv={path} cannot be written: {error.strerror}\n  use another file") from error


def _rows(prediction: "Prediction", has_several_heads: bool) -> list[list[Any]]:
    return [
        [prediction.image, *([head] if has_several_heads else []), rank, guess.label, f"{guess.probability:.6g}"]
        for head, guesses in prediction.heads.items()
        for rank, guess in enumerate(guesses, start=1)
    ]


def _json(prediction: "Prediction", has_several_heads: bool) -> str:
    heads = {
        head: [{"label": guess.label, "probability": guess.probability} for guess in guesses]
        for head, guesses in prediction.heads.items()
    }
    predictions = heads if has_several_heads else next(iter(heads.values()))
    return atomic.to_json({"path": prediction.image, "predictions": predictions})


def _line(prediction: "Prediction") -> str:
    return f"{prediction.image}  {prediction.describe()}"


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    return commands.finish(lambda: predict(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
