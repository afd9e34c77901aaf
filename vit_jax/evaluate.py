"""The command `python -m vit_jax.evaluate`."""

import argparse
import copy
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_jax import atomic, commands, evaluate_weights, paths, terminal
from vit_jax.errors import UserError, few

if TYPE_CHECKING:
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
  predictions.csv                 true and predicted class of each image, and the probability of the latter
  metrics.json                    accuracy, balanced accuracy, macro F1, loss, calibration error

A model with several heads has these files in one directory per head. For the directory of several seeds, each seed is
evaluated, and the mean and the sample standard deviation are printed.

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
SHOWN = 5  # lines about the classes of the lowest recall


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command's flags; --help and wrong flags end the process, the latter with status 2."""
    parser = commands.parser("evaluate", DESCRIPTION)
    commands.add_flags(parser, init=True)
    evaluate_weights.add_flags(parser)
    parser.add_argument(
        "--weights", metavar="FILE", help="with --workdir: evaluate the parameters in this file, not a checkpoint"
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
        UserError: as `commands.open_run` or `evaluate_weights.evaluate`; or a flag is of no use, the files of `--out`
            cannot be written, or the run has no classes.
    """
    commands.check_flags(flags, evaluate_weights.OF_RUN, evaluate_weights.OF_INIT)
    flags = copy.copy(flags)
    out = None if flags.out is None else _output_directory(flags.out)
    if flags.init:
        metrics, heads, source = evaluate_weights.evaluate(flags)
        return _finish(flags, {"init": flags.init, "data": source.name}, metrics, heads, source, out)
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
    steps, summary = metrics.pop("step"), multi_seed.mean_and_std(metrics)
    name = next(one for one in (f"{flags.split}/accuracy", f"{flags.split}/loss") if one in summary)
    factor, digits, unit = (100, 2, " %") if name.endswith("accuracy") else (1, 4, "")
    mean, std = (f"{factor * (value or 0):.{digits}f}" for value in (summary[name], summary[f"{name}/std"]))
    terminal.warn(f"{name.replace('/', ' ')} {mean} +- {std}{unit} over {len(seeds)} seeds")
    return {"seeds": seeds, "step": steps[0] if len({*steps}) == 1 else steps, **summary}


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
    trained = commands.open_run(flags)
    run, state = trained.run, trained.state
    if out is not None and not run.objective.needs_labels:
        raise UserError(
            f"--out={flags.out}: {flags.workdir} was trained without labels, so it predicts no classes\n  omit --out"
        )
    metrics, heads = run.evaluate(state.for_evaluation(), flags.split)
    evaluated = {"step": int(state.step)} if flags.weights is None else {"weights": flags.weights}
    return _finish(flags, evaluated, metrics, heads, run.sources[flags.split], out)


def _finish(
    flags: argparse.Namespace,
    evaluated: dict[str, Any],
    metrics: dict[str, Any],
    heads: dict[str, "Predictions"],
    source: "Source",
    out: Path | None,
) -> dict[str, Any]:
    """Returns what was evaluated, and the metrics with balanced accuracy; prints lines about classes, writes `out`."""
    if wrong := [name for name, value in metrics.items() if not math.isfinite(value)]:
        terminal.warn(f"warning: {few(wrong)} is not finite: null in the result")
    for head, predictions in heads.items():
        prefix = f"{flags.split}/{head}" if len(heads) > 1 else flags.split
        accuracy, balanced = metrics[f"{prefix}/accuracy"], predictions.balanced_accuracy()
        metrics[f"{prefix}/balanced_accuracy"] = balanced
        name = f"{head}: " if len(heads) > 1 else ""
        for line in _describe(predictions, accuracy, balanced):
            terminal.warn(name + line)
        if out is not None:
            directory = out / head if len(heads) > 1 else out
            of_head = {one: metrics[f"{prefix}/{one}"] for one in ("accuracy", "balanced_accuracy", "top5", "loss")}
            workdir = {"workdir": str(paths.expand(flags.workdir, "--workdir"))} if flags.workdir else {}
            about = {**workdir, "split": flags.split, **evaluated, "head": head}
            _write(directory, predictions, {**about, **of_head}, source.paths() or list(range(len(source))))
    return {**evaluated, **metrics}


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
    more = {"macro_f1": predictions.macro_f1(), "calibration_error": predictions.calibration_error()}
    by_class = (
        [row.name, row.images, row.correct, *map(_number, (row.recall, row.precision, row.f1))]
        + [row.confused_with, row.confused]
        for row in predictions.rows()
    )
    columns = [a.tolist() for a in (predictions.labels, predictions.predicted, predictions.probability)]
    by_image = (
        [example, names[label], names[guess] if guess >= 0 else None, _number(probability if guess >= 0 else None)]
        for example, label, guess, probability in zip(examples, *columns, strict=True)
    )
    identity = "path" if isinstance(examples[0], str) else "index"
    header = ["class", "images", "correct", "recall", "precision", "f1", "confused_with", "confused"]
    try:
        atomic.make_directory(directory)
        atomic.write_csv(directory / "classes.csv", header, by_class)
        atomic.write_csv(directory / "predictions.csv", [identity, "true", "predicted", "probability"], by_image)
        if len(names) <= MAX_CLASSES:
            _write_confusion(directory, predictions, metrics)
        atomic.write_json(directory / "metrics.json", {**metrics, **more, "examples": len(predictions.labels)})
    except OSError as error:
        raise UserError(
            f"--out: {directory} cannot be written to: {error.strerror}\n  use another directory"
        ) from error
    written = "metrics.json, classes.csv, predictions.csv"
    matrix = ", confusion.csv, confusion.png" if len(names) <= MAX_CLASSES else "; no matrix of so many classes"
    terminal.warn(f"wrote {directory}: {written}{matrix}")


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
