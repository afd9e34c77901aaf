"""What a report shows of a run besides its files: predictions, images, and pictures of the model."""

import argparse
import io
import shlex
import statistics
from collections.abc import Callable

import numpy as np

from vit_jax import classifier, commands, confusion, preview
from vit_jax.commands import Trained
from vit_jax.data.sources import Source
from vit_jax.errors import UserError, one_line
from vit_jax.evaluation.per_class import NOT_FINITE, Predictions
from vit_jax.reporting import images
from vit_jax.reporting.evaluated import MAX_CELLS, Evaluated
from vit_jax.reporting.images import Tile
from vit_jax.reporting.records import Run, finite
from vit_jax.sharding import multihost
from vit_jax.visualization import pictures

MAX_MISTAKES, MAX_SAMPLES = 24, 24
MAX_MATRIX = 1000  # classes of the picture of a confusion matrix
MAX_BATCH_BYTES = 2**28  # of the images of a training step
ALLOWED_SECONDS, ALLOWED_SHARE = 30.0, 0.02  # of an evaluation after training; the latter of the training time
# Pictures of the model: what `pictures.draw` makes, number of images, title and a sentence.
PICTURES = {
    "filters": (0, "Patch embedding", "Principal components of the filters of the patch embedding, and the filters."),
    "positions": (
        0,
        "Position embeddings",
        "Similarity of the position embedding of each patch to those of all patches.",
    ),
    "distance": (128, "Attention distance", "Mean distance over which each head attends, against depth."),
    "rollout": (12, "Attention rollout", "How much each patch contributes to the output, through all layers."),
    "features": (
        12,
        "Patch features",
        "The first three principal components of the features of the patches, as colors.",
    ),
}


def evaluate(run: Run, data_dir: str | None, limited: bool) -> tuple[Evaluated | None, str | None]:
    """Returns the evaluation of a run of one seed; or None, and why there is none.

    Args:
        run: its files.
        data_dir: directory of the dataset; None for the run's.
        limited: whether to leave it out if it would take long.
    """
    again = f"To add them: vit-jax report {shlex.quote(str(run.workdir))}"
    split = run.split()
    if split is None:
        return None, "This run has neither a test nor a validation split: there are no sections on predictions."
    if not multihost.is_alone():
        return None, f"Sections on predictions are left out, as the run used several processes. {again}"
    if limited and (seconds := too_long(run, split)):
        return None, f"Sections on predictions are left out: the evaluation would take about {seconds:.0f} s. {again}"
    flags = {"workdir": str(run.workdir), "split": split, "data_dir": data_dir}
    try:
        trained = commands.open_run(argparse.Namespace(step=None, best=False, batch_size=None, **flags))
        return _evaluate(trained, split, data_dir), None
    except Exception as error:  # the other sections need no data, devices or checkpoint
        return None, f"Sections on predictions are left out: {one_line(error, 400)}"


def too_long(run: Run, split: str) -> float | None:
    """Returns the seconds that an evaluation will take, if more than 30 and than 2 % of the training; else None.

    A forward pass takes a third of the time of a training step.
    """
    summary = run.summary or {}
    speeds = [finite(record["images_per_second"]) for record in run.history if "images_per_second" in record]
    examples = summary.get(f"{split}/examples")
    if not examples or not speeds or not (speed := statistics.median(speeds)) > 0:
        return None
    seconds = examples / (3 * speed)
    return seconds if seconds > max(ALLOWED_SECONDS, ALLOWED_SHARE * summary["seconds"]) else None


def _evaluate(trained: Trained, split: str, data_dir: str | None) -> Evaluated:
    run, source = trained.run, trained.run.sources[split]
    metrics, heads = {}, {}
    if run.objective.needs_labels:
        metrics, heads = run.evaluate(trained.state.for_evaluation(), split)
    missing: list[str] = []
    found = Evaluated(split, int(trained.state.step), metrics, heads, missing=missing)

    def attempt(what: str, make: Callable[[], None]) -> None:
        try:
            make()
        except Exception as error:  # a part of a report, which is not worth the rest
            missing.append(f"{what} are left out: {one_line(error)}")

    count = max(MAX_MISTAKES // max(len(heads), 1), 4)
    for head, predictions in heads.items():
        if MAX_CELLS < len(predictions.class_names) <= MAX_MATRIX:
            found.matrices[head] = _matrix(predictions, head if len(heads) > 1 else split)
        attempt(
            "Mistakes", lambda head=head, of=predictions: found.mistakes.update({head: _mistakes(of, source, count)})
        )
    attempt("Training images", lambda: found.samples.extend(_samples(trained)))
    attempt("Pictures of the model", lambda: found.pictures.update(_pictures(trained, source)))
    return found


def _matrix(predictions: Predictions, title: str) -> bytes:
    """Returns the picture of a confusion matrix as a PNG file."""
    file = io.BytesIO()
    confusion.draw(predictions.confusion(), predictions.class_names, title).quantize(256).save(
        file, "PNG", optimize=True
    )
    return file.getvalue()


def _mistakes(predictions: Predictions, source: Source, count: int) -> list[Tile]:
    """Returns up to `count` wrongly predicted images, the most probable predictions first."""
    wrong = np.flatnonzero((predictions.labels != predictions.predicted) & (predictions.predicted != NOT_FINITE))
    chosen = wrong[np.argsort(-predictions.probability[wrong], kind="stable")][:count]
    if not len(chosen):
        return []
    files, names, found = source.paths(), predictions.class_names, []
    for index, image in zip(chosen.tolist(), source.read(chosen), strict=True):
        guess, label = names[predictions.predicted[index]], names[predictions.labels[index]]
        probability = 100 * predictions.probability[index]
        origin = f"image {index}" if files is None else files[index].rpartition("/")[2]
        lines = (f"predicted {guess}, {probability:.1f} %", f"true {label}", origin)
        found.append(Tile(image, lines, f"{origin}: predicted {guess} with {probability:.1f} %, true class {label}"))
    return found


def _samples(trained: Trained) -> list[Tile]:
    """Returns images of the first training step, as the model receives them."""
    config = trained.run.config.copy_and_resolve_references()
    size = config.train.batch_size * int(np.prod(trained.run.image_shape))
    if size > MAX_BATCH_BYTES:
        raise UserError(
            f"a batch has {size / 2**20:,.0f} MiB\n  use vit-jax preview --count=N to draw some of its images"
        )
    config.mesh.devices = 1
    pixels, probabilities, names, _ = preview.batch(config, 0)
    found = []
    for image, row in zip(pixels[:MAX_SAMPLES], probabilities[:MAX_SAMPLES], strict=True):
        lines = tuple(preview.caption(row, names, config.train.label_smoothing))
        found.append(Tile(image, lines, f"augmented training image: {', '.join(lines)}"))
    return found


def _pictures(trained: Trained, source: Source) -> dict[str, tuple[bytes, str]]:
    """Returns pictures of the model by title; those that are not defined for it are left out."""
    step, title = int(trained.state.step), trained.workdir.absolute().name
    model, found = classifier.of_run(trained.workdir, step, needs_head=False), {}
    for what, (count, heading, text) in PICTURES.items():
        shown = np.arange(min(count, len(source)))
        names = tuple(source.class_names[label] for label in source.labels[shown])
        try:
            figure = pictures.draw(what, model, source.read(shown) if count else None, names, title).figure
        except UserError:
            continue
        found[heading] = images.file_of(figure), text
    return found
