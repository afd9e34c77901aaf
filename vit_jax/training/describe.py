"""What a run prints about itself."""

import dataclasses
import math
import operator
from pathlib import Path
from typing import Any

import jax
from clu import parameter_overview

import vit_jax
from vit_jax import optim, progress
from vit_jax.data import listing, normalization, splits
from vit_jax.evaluation.per_class import Predictions
from vit_jax.objectives.base import Objective
from vit_jax.training.setup import Experiment

MAX_CLASSES = 20  # that are listed after the last evaluation; of more, the LOWEST
LOWEST = 10


@dataclasses.dataclass(frozen=True)
class Shown:
    """How much a run prints.

    Attributes:
        start: versions, data and model.
        parameters: with these, the table of all parameters.
        trial: the name of a run of a sweep, which prints one line that is overwritten, and warnings; '' for others.
    """

    start: bool = True
    parameters: bool = False
    trial: str = ""


USUAL = Shown()


def finished(workdir: Path, result: str) -> str:
    """Returns the lines about a run directory whose run is finished."""
    return f"{workdir} is finished: {result}\nto train again, use another --workdir or remove this one"


def versions(mesh: jax.sharding.Mesh) -> str:
    """Returns 'vit_jax 0.1.0, jax 0.10.2, 1 x cpu (cpu)'."""
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind} ({jax.default_backend()})"
    return f"vit_jax {vit_jax.__version__}, jax {jax.__version__}, {devices}"


def experiment(experiment: Experiment, parameters: bool = False) -> str:
    """Returns the lines about data and model, how much of it is trained, and how to stop.

    Args:
        experiment: what is trained.
        parameters: True for the table of all parameters before these lines.
    """
    config, model, shapes = experiment.config, experiment.model, experiment.abstract_state().parameters
    height, width, channels = experiment.image_shape
    sizes = ", ".join(f"{len(source):,} {role}" for role, source in experiment.sources.items())
    lines = [parameter_overview.get_parameter_overview(shapes, include_stats=False)] if parameters else []
    lines += [
        f"data: {config.data.name}, {sizes}, {height}x{width}x{channels}, {_classes(experiment)}",
        f"model: {config.model.variant} (width {model.width}, depth {model.depth}, heads {model.heads}, MLP "
        f"{model.mlp_width}), {short(experiment.num_parameters)} parameters, "
        f"{short(experiment.forward_flops, 1000)}FLOP per image (forward), {model.dtype.name}"
        + (f" with {model.matmul_dtype.name} matmuls" if model.matmul_dtype else "")
        + f", attention: {experiment.attention.describe()}",
    ]
    source = experiment.sources["train"]
    if config.data.normalization == "set" and (note := normalization.note(source.mean, source.std)):
        lines.append(note)
    if experiment.objective.needs_labels and source.classes() == 1:
        only = listing.printable(source.class_names[0])
        lines.append(f"warning: {only!r} is the only class: every prediction is right")
    lines += _warnings(experiment)
    if experiment.mask is not None:
        flags = zip(jax.tree.leaves(experiment.mask), jax.tree.leaves(shapes), strict=True)
        count = sum(leaf.size for keep, leaf in flags if keep)
        lines.append(f"trained: {short(count)} of {short(experiment.num_parameters)} parameters; the others are frozen")
    if experiment.objective.needs_labels and (config.augment.mixup or config.augment.cutmix):
        lines.append("the accuracy of training is measured on mixed images: it may be below the test accuracy")
    lines.append("Ctrl-C saves and stops; the same command resumes")
    return "\n".join(lines)


def _warnings(experiment: Experiment) -> list[str]:
    """Returns what options that contradict each other make of the run: a short warm-up, splits that overlap."""
    warmup = optim.warmup_warning(experiment.config.optimizer, experiment.num_steps)
    lines = [warmup] if warmup else []
    train = experiment.sources["train"]
    for role, source in experiment.sources.items():
        if role != "train" and (count := splits.overlap(train.pieces, source.pieces)):
            both = f"data.train is {train.split!r}, data.{role} is {source.split!r}"
            lines.append(f"warning: {count:,} of the {len(source):,} {role} examples are also trained on: {both}")
    return lines


def short(count: int, exact: int = 10**6) -> str:
    """Returns a number with one decimal, '85.8 M' or '1.2 G'; all its digits, '541,578', if it is less than `exact`."""
    if count < exact:
        return f"{count:,}"
    power = min(max(int(math.log10(count)) // 3, 1), 4)
    return f"{count / 1000**power:,.1f} {'kMGT'[power - 1]}"


def _classes(experiment: Experiment) -> str:
    """Returns '10 classes', or '10 classes of label, 2 of parity'."""
    source = experiment.sources["train"]
    if not source.others:
        return f"{source.classes()} {'class' if source.classes() == 1 else 'classes'}"
    first, *rest = source.classes().items()
    return ", ".join([f"{first[1]} classes of {first[0]}", *(f"{count} of {name}" for name, count in rest)])


def classes(predictions: Predictions) -> str:
    """Returns the balanced accuracy and lines with the recall of each class, or of many classes the lowest ones."""
    rows = [row for row in predictions.rows() if row.images]
    title = (
        f"  balanced accuracy {100 * predictions.balanced_accuracy():.2f} %, the mean recall of {len(rows):,} classes"
    )
    if len(rows) > MAX_CLASSES:
        rows = sorted(rows, key=operator.attrgetter("recall"))[:LOWEST]
        title += f"; the lowest {LOWEST}"
    names = [listing.printable(row.name) for row in rows]
    width = max(map(len, names))
    lines = [
        f"    {name:<{width}}  {100 * row.recall:6.2f} %  {row.correct:,} of {row.images:,}"
        for name, row in zip(names, rows, strict=True)
    ]
    return "\n".join([f"{title}:", *lines])


def start(experiment: Experiment, step: int, updates: int, workdir: Path, changed: list[str]) -> str:
    """Returns 'training for 4,491 steps of 64 images (200.0 epochs), in runs/digits', and the options that changed.

    Args:
        experiment: what is trained.
        step: number of steps taken.
        updates: number of updates made.
        workdir: the run directory.
        changed: the options that changed since the run was stopped.
    """
    steps, size = experiment.num_steps, experiment.config.train.batch_size
    begin, rate = "training for", ""
    if step:
        begin = f"resuming at step {step:,} of"
        rate = f", at learning rate {optim.learning_rate(experiment.schedule, updates):.2e}" if step < steps else ""
    epochs = steps / experiment.steps_per_epoch
    line = f"{begin} {steps:,} steps of {size} images ({epochs:.1f} epochs){rate}, in {workdir}"
    return f"{line}\nchanged from step {step:,} on: {'; '.join(changed)}" if changed else line


def result(objective: Objective, summary: dict[str, Any]) -> str:
    """Returns 'test accuracy 97.50 % (351 of 360) after 4,490 steps, 1:11 of training'."""
    seconds = progress.clock(summary["seconds"])
    return f"{objective.summary_line(summary)} after {summary['steps']:,} steps, {seconds} of training"
