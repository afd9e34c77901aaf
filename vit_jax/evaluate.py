"""The command `python -m vit_jax.evaluate`."""

import argparse
import copy
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_jax import atomic, commands, evaluate_weights, paths, terminal
from vit_jax.errors import UserError, few

if TYPE_CHECKING:
    from vit_jax.data.augment import Augment
    from vit_jax.data.sources import Source
    from vit_jax.evaluation.per_class import Predictions

DESCRIPTION = """\
Evaluates a model on every example of a split, each exactly once, and prints the metrics as one JSON line.

  %(prog)s --workdir=runs/digits
  %(prog)s --workdir=runs/digits --out=runs/digits/evaluation
  %(prog)s --workdir=runs/cifar10 --split=validation --best
  %(prog)s --workdir=runs/cifar10 --split='train[:1000]'
  %(prog)s --workdir=runs/cifar10 --weights=average.safetensors
  %(prog)s --init=augreg-b16-224 --data=folder --data_dir=PHOTOS

The classes of the lowest recall, and the balanced accuracy of unbalanced classes, are printed to standard error.
--out=DIR writes files about every class and every image:

  confusion.png, confusion.csv    number of images by true class (row) and predicted class (column)
  classes.csv                     images, recall, precision and F1 of each class, and its most frequent confusion
  predictions.csv                 true and predicted class of each image, their probabilities, rank of the true class
  reliability.csv                 number, mean probability and accuracy of the images by probability, in 15 bins
  metrics.json                    the metrics, as printed

A model with several heads has these files in one directory per head. For the directory of several seeds, each seed is
evaluated, and the mean and the sample standard deviation are printed.

The negative log-likelihood (nll) of the true class is the loss of a softmax head. For a sigmoid head it is that of the
softmax of the same logits: of each class, given that exactly one is present. calibration_error is the expected
calibration error (ECE).

A run with augment.test_flip or test_shift averages the probabilities over several views of each image. --views=off
scores the unchanged image alone, --views=both prints both results, that of one view as <metric>/one_view (the files
are then those of the average). --test_flip and --test_shift=1 average over views that the run did not have.

If the run averages its parameters (config.optimizer.average_decay), the average is evaluated. A split expression such
as 'test[:1000]' takes the examples in the dataset's own order, as it is stored.

--init evaluates a published, exported or averaged model with its own head and preprocessing. Its classes and those of
the data are matched by name; upper and lower case, spaces and underscores make no difference. The data may have some
of them only: a prediction is still the most probable of all classes of the model. Where one of the two has numbers or
ids of WordNet in place of names, the classes must be equally many, and are taken in the same order. Of a folder
without splits all images are scored, and the metrics are called all/accuracy, ...; --split=test scores the images that
training on it holds out.
"""

MAX_CLASSES = 2000  # with more, a matrix with a cell for each pair is no use
VIEWS = ("on", "off", "both")
SHOWN = 5  # lines about the classes of the lowest recall


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command's flags; --help and wrong flags end the process, the latter with status 2."""
    parser = commands.parser("evaluate", DESCRIPTION)
    commands.add_flags(parser, init=True)
    evaluate_weights.add_flags(parser)
    parser.add_argument(
        "--weights", metavar="FILE", help="with --workdir: evaluate the parameters in this file, not a checkpoint"
    )
    parser.add_argument(
        "--views",
        choices=VIEWS,
        help="average over the test-time views (on), score one view (off), or both (default: on)",
    )
    parser.add_argument("--test_flip", action="store_true", help="average over the image and its mirror image")
    parser.add_argument(
        "--test_shift", type=int, metavar="N", help="average over the image and four shifts by N pixels; 0: none"
    )
    parser.add_argument("--out", metavar="DIR", help="write confusion matrix, results per class and predictions here")
    flags = parser.parse_args(arguments)
    if flags.weights is not None and (flags.best or flags.step is not None):
        parser.error("--weights cannot be combined with --step or --best")
    return flags


def evaluate(flags: argparse.Namespace) -> dict[str, Any]:
    """Returns the metrics on the split, and the checkpoint's step or the file and data; writes the files of `--out`.

    For the directory of several seeds, these are the means over the seeds (`<metric>`), the sample standard deviations
    (`<metric>/std`) and the values of each seed (`<metric>/each`).

    Raises:
        UserError: as `commands.open_run` or `evaluate_weights.prepare`; or a flag is of no use, the files of `--out`
            cannot be written, or the run has no classes.
    """
    commands.check_flags(flags, evaluate_weights.OF_RUN, evaluate_weights.OF_INIT)
    flags = copy.copy(flags)
    out = None if flags.out is None else _output_directory(flags.out)
    if flags.init:
        augment, score, source = evaluate_weights.prepare(flags)
        evaluated = {"init": flags.init, "data": source.name}
        return _finish(flags, evaluated, augment, score, source, out)
    flags.split = flags.split or commands.TEST
    workdir = paths.expand(flags.workdir, "--workdir")
    seeds = _seeds(workdir)
    if not seeds:
        return _evaluate_run(flags, out)
    if flags.weights is not None:
        raise UserError(
            f"--weights cannot be combined with --workdir={flags.workdir}, which holds the runs of several seeds\n"
            f"  use the directory of one of them: seed-{seeds[0]}"
        )
    from vit_jax.training import multi_seed

    results = []
    for seed in seeds:
        of_seed = copy.copy(flags)
        of_seed.workdir = str(multi_seed.workdir_of(workdir, seed))
        terminal.warn(f"seed {seed}")
        results.append(_evaluate_run(of_seed, None if out is None else multi_seed.workdir_of(out, seed)))
    metrics = {name: [result[name] for result in results] for name in results[0]}
    steps, views = metrics.pop("step"), {"views": metrics.pop("views")[0]} if "views" in metrics else {}
    summary = multi_seed.mean_and_std(metrics)
    name = next(one for one in (f"{flags.split}/accuracy", f"{flags.split}/loss") if one in summary)
    factor, digits, unit = (100, 2, " %") if name.endswith("accuracy") else (1, 4, "")
    mean, std = (f"{factor * (value or 0):.{digits}f}" for value in (summary[name], summary[f"{name}/std"]))
    terminal.warn(f"{name.replace('/', ' ')} {mean} +- {std}{unit} over {len(seeds)} seeds")
    return {"seeds": seeds, "step": steps[0] if len({*steps}) == 1 else steps, **views, **summary}


def _seeds(workdir: Path) -> list[int]:
    """Returns the seeds whose runs a directory holds and that have a checkpoint; [] for a run of one seed."""
    from vit_jax.checkpoint import run_files

    if not workdir.is_dir() or run_files.has_checkpoints(workdir):
        return []
    config = run_files.read_config(workdir) or {}
    seeds = config.get("train", {}).get("seeds") or ()
    trained = [seed for seed in seeds if run_files.has_checkpoints(workdir / f"seed-{seed}")]
    if missing := [f"seed {seed}" for seed in seeds if seed not in trained]:
        terminal.warn(f"without a checkpoint, left out: {few(missing)}")
    return trained


def _evaluate_run(flags: argparse.Namespace, out: Path | None) -> dict[str, Any]:
    """As `evaluate`, for the run of one seed, and an expanded path in place of `--out`."""
    from vit_jax.evaluation import exact

    trained = commands.open_run(flags)
    run, state = trained.run, trained.state
    of_classes = ("out", flags.out), ("views", flags.views), ("test_flip", flags.test_flip or None)
    for name, value in (*of_classes, ("test_shift", flags.test_shift)) if not run.objective.needs_labels else ():
        if value is not None:
            raise UserError(
                f"--{name}={value}: {flags.workdir} was trained without labels, so it predicts no classes\n"
                f"  omit --{name}"
            )

    def score(augment: "Augment") -> tuple[dict[str, Any], dict[str, "Predictions"]]:
        scorer = exact.make_scorer(run.module, augment, run.mesh, run.objective)
        batches = run.pipelines[flags.split], run.evaluation_batch_size, flags.split
        return exact.evaluate(scorer, state.for_evaluation(), *batches, run.objective)

    evaluated = {"step": int(state.step)} if flags.weights is None else {"weights": flags.weights}
    return _finish(flags, evaluated, run.augment, score, run.sources[flags.split], out)


def _finish(
    flags: argparse.Namespace,
    evaluated: dict[str, Any],
    augment: "Augment",
    score: Callable[["Augment"], tuple[dict[str, Any], dict[str, "Predictions"]]],
    source: "Source",
    out: Path | None,
) -> dict[str, Any]:
    """Returns what was evaluated and the metrics, with those of the predictions; prints lines, writes `out`.

    `score` is called with the views to average over, which are those of `augment` or of the flags.
    """
    augment, one_view = _views(flags, augment, source)
    metrics, heads = _score(flags.split, score, augment)
    evaluated |= {"views": augment.num_views} if heads else {}
    if flags.views == "both":
        of_one = _score(flags.split, score, one_view)[0]
        accuracy, of_view = (100 * one[f"{flags.split}/accuracy"] for one in (metrics, of_one))
        terminal.warn(f"accuracy {accuracy:.2f} % averaged over {augment.num_views} views, {of_view:.2f} % on one view")
        metrics |= {f"{name}/one_view": value for name, value in of_one.items() if not name.endswith("/examples")}
    if wrong := [name for name, value in metrics.items() if not math.isfinite(value)]:
        terminal.warn(f"warning: {few(wrong)} is not finite: null in the result")
    for head, predictions in heads.items():
        prefix = _prefix(flags.split, head, heads)
        name = f"{head}: " if len(heads) > 1 else ""
        for line in _describe(predictions, *(metrics[f"{prefix}{one}"] for one in ("accuracy", "balanced_accuracy"))):
            terminal.warn(name + line)
        if out is not None:
            directory = out / head if len(heads) > 1 else out
            of_head = {one.removeprefix(prefix): metrics[one] for one in metrics if one.startswith(prefix)}
            workdir = {"workdir": str(paths.expand(flags.workdir, "--workdir"))} if flags.workdir else {}
            about = {**workdir, "split": flags.split, **evaluated, "head": head}
            _write(directory, predictions, {**about, **of_head}, source.paths() or list(range(len(source))))
    return {**evaluated, **metrics}


def _prefix(split: str, head: str, heads: dict[str, "Predictions"]) -> str:
    """Returns what the names of a head's metrics begin with."""
    return f"{split}/{head}/" if len(heads) > 1 else f"{split}/"


def _score(split: str, score: Callable, augment: "Augment") -> tuple[dict[str, Any], dict[str, "Predictions"]]:
    """Returns the metrics, with those of the predictions, and the predictions by head."""
    metrics, heads = score(augment)
    for head, predictions in heads.items():
        metrics |= {_prefix(split, head, heads) + name: value for name, value in predictions.metrics().items()}
    return metrics, heads


def _views(flags: argparse.Namespace, augment: "Augment", source: "Source") -> tuple["Augment", "Augment"]:
    """Returns the views to average over, by the flags and else by the model, and the unchanged image alone.

    Raises:
        UserError: the shift is as large as the image, or there is only one view and `--views=both`.
    """
    one_view = dataclasses.replace(augment, test_flip=False, test_shift=0)
    if flags.views == "off" and (flags.test_flip or flags.test_shift):
        added = "--test_flip" if flags.test_flip else "--test_shift"
        raise UserError(f"{added} cannot be combined with --views=off\n  omit one of them")
    if flags.test_flip:
        augment = dataclasses.replace(augment, test_flip=True)
    if flags.test_shift is not None:
        side = min(source.image_shape[:2])
        if not 0 <= flags.test_shift < side:
            raise UserError(f"--test_shift is {flags.test_shift}\n  allowed: an integer from 0 to {side - 1}")
        augment = dataclasses.replace(augment, test_shift=flags.test_shift)
    if flags.views == "both" and augment.num_views == 1:
        raise UserError("--views=both: this model is scored on one view\n  add others: --test_flip, --test_shift=1")
    return one_view if flags.views == "off" else augment, one_view


def _describe(predictions: "Predictions", accuracy: float, balanced: float) -> list[str]:
    """Returns the lines about single classes: balanced accuracy of unbalanced ones, and those of the lowest recall."""
    lines, counts = [], predictions.images[predictions.images > 0]
    if predictions.is_unbalanced():
        sizes = f"{counts.min():,} to {counts.max():,} images per class"
        lines.append(f"balanced accuracy {100 * balanced:.2f} % (accuracy {100 * accuracy:.2f} %; {sizes})")
    worst = predictions.worst(SHOWN)
    if worst and len(counts) > 1:
        lines.append("classes of the lowest recall:" if len(worst) < len(counts) else "recall per class:")
    for row in worst if len(counts) > 1 else ():
        confused = f", {row.confused:,} predicted as {_printable(row.confused_with)}" if row.confused else ""
        recall = f"{100 * row.recall:.1f} % ({row.correct:,} of {row.images:,})"
        lines.append(f"  {_printable(row.name)}: {recall}{confused}")
    return lines


def _printable(name: str) -> str:
    from vit_jax.data import listing

    return listing.printable(name)


def _output_directory(out: str) -> Path:
    """Returns the directory of `--out`, made if there is none, before the work begins."""
    directory = paths.expand(out, "--out")
    try:
        atomic.make_directory(directory)
    except OSError as error:
        raise UserError(f"--out={out} cannot be used: {error.strerror}\n  use another directory") from error
    return directory


def _write(directory: Path, predictions: "Predictions", metrics: dict[str, Any], examples: Sequence[str | int]) -> None:
    """Writes the files about one head; `examples` are the paths or indices of its examples."""
    names = predictions.class_names
    by_class = (
        [row.name, row.images, row.correct, *map(_number, (row.recall, row.precision, row.f1))]
        + [row.confused_with, row.confused]
        for row in predictions.rows()
    )
    header = ["class", "images", "correct", "recall", "precision", "f1", "confused_with", "confused"]
    bins = predictions.reliability()
    by_bin = ([*map(_number, row[:2]), row.examples, *map(_number, row[3:])] for row in bins)
    try:
        atomic.make_directory(directory)
        atomic.write_csv(directory / "classes.csv", header, by_class)
        atomic.write_csv(directory / "predictions.csv", *_by_image(predictions, examples))
        atomic.write_csv(directory / "reliability.csv", bins[0]._fields, by_bin)
        if len(names) <= MAX_CLASSES:
            _write_confusion(directory, predictions, metrics)
        atomic.write_json(directory / "metrics.json", {**metrics, "examples": len(predictions.labels)})
    except OSError as error:
        raise UserError(
            f"--out: {directory} cannot be written to: {error.strerror}\n  use another directory"
        ) from error
    written = "metrics.json, classes.csv, predictions.csv, reliability.csv"
    matrix = ", confusion.csv, confusion.png" if len(names) <= MAX_CLASSES else "; no matrix of so many classes"
    terminal.warn(f"wrote {directory}: {written}{matrix}")


def _by_image(
    predictions: "Predictions", examples: Sequence[str | int]
) -> tuple[list[str], Iterator[list[str | int | None]]]:
    """Returns the header and the rows of predictions.csv; of logits that are not finite, only the true class."""
    names = predictions.class_names
    fields = ("labels", "predicted", "probability", "true_probability", "rank")
    columns = zip(examples, *(getattr(predictions, name).tolist() for name in fields), strict=True)
    rows = (
        [example, names[label]]
        + ([names[guess], *map(_number, (probability, own)), rank] if guess >= 0 else [None] * 4)
        for example, label, guess, probability, own, rank in columns
    )
    identity = "path" if isinstance(examples[0], str) else "index"
    return [identity, "true", "predicted", "probability", "true_probability", "rank"], rows


def _write_confusion(directory: Path, predictions: "Predictions", metrics: dict[str, Any]) -> None:
    from vit_jax import confusion

    counts, names = predictions.confusion(), predictions.class_names
    rows = ([name, *row] for name, row in zip(names, counts.tolist(), strict=True))
    atomic.write_csv(directory / "confusion.csv", ["true \\ predicted", *names], rows)
    accuracy = f"accuracy {100 * metrics['accuracy']:.2f} % of {len(predictions.labels):,} images"
    title = f"{metrics.get('workdir') or metrics['init']}, {metrics['split']}: {accuracy}"
    with atomic.replace(directory / "confusion.png") as file:
        confusion.draw(counts, names, title).save(file, "PNG", optimize=True)


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.6g}"


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    return commands.finish(lambda: terminal.output(atomic.to_json(evaluate(parse(arguments)))))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
