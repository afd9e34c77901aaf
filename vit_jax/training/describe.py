"""What a run prints about itself."""

import operator
from pathlib import Path
from typing import Any

import jax
from clu import parameter_overview

import vit_jax
from vit_jax import optim
from vit_jax.data import listing, normalization, splits
from vit_jax.evaluation.per_class import Predictions
from vit_jax.objectives.base import Objective
from vit_jax.training import progress
from vit_jax.training.setup import Experiment

MAX_CLASSES = 20  # that are listed after the last evaluation; of more, the LOWEST
LOWEST = 10


def finished(workdir: Path, result: str) -> str:
    """Returns the lines about a run directory whose run is finished."""
    return f"{workdir} is finished: {result}\nto train again, use another --workdir or remove this one"


def versions(mesh: jax.sharding.Mesh) -> str:
    """Returns 'vit_jax 0.1.0, jax 0.10.2, 1 x cpu (cpu)'."""
    devices = f"{mesh.size} x {mesh.devices.flat[0].device_kind} ({jax.default_backend()})"
    return f"vit_jax {vit_jax.__version__}, jax {jax.__version__}, {devices}"


def experiment(experiment: Experiment) -> str:
    """Returns the table of parameters, the data, the model, and how many parameters are trained."""
    model, shapes = experiment.model, experiment.abstract_state().parameters
    height, width, channels = experiment.image_shape
    sizes = ", ".join(f"{len(source):,} {role}" for role, source in experiment.sources.items())
    lines = [
        parameter_overview.get_parameter_overview(shapes, include_stats=False),
        f"data: {experiment.config.data.name}, {sizes}, {height}x{width}x{channels}, {_classes(experiment)}",
        f"model: {experiment.config.model.variant}, patch {model.patch_size}, width {model.width}, "
        f"depth {model.depth}, heads {model.heads}, MLP {model.mlp_width}; {experiment.num_parameters:,} parameters, "
        f"{experiment.forward_flops / 1e9:.3g} GFLOP per image (forward); compute dtype {model.dtype.name}"
        + (f", {model.matmul_dtype.name} matmuls" if model.matmul_dtype else "")
        + f"; attention: {experiment.attention.describe()}",
    ]
    source = experiment.sources["train"]
    if experiment.config.data.normalization == "set" and (note := normalization.note(source.mean, source.std)):
        lines.append(note)
    if experiment.objective.needs_labels and source.classes() == 1:
        only = listing.printable(source.class_names[0])
        lines.append(f"warning: {only!r} is the only class: every prediction is right")
    lines += _warnings(experiment)
    if experiment.mask is not None:
        flags = zip(jax.tree.leaves(experiment.mask), jax.tree.leaves(shapes), strict=True)
        count = sum(leaf.size for keep, leaf in flags if keep)
        lines.append(f"trained: {count:,} of {experiment.num_parameters:,} parameters; the others are frozen")
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


def start(experiment: Experiment, step: int, workdir: Path) -> str:
    """Returns 'training for 4,491 steps of 64 images (200.0 epochs), in runs/digits'."""
    steps, size = experiment.num_steps, experiment.config.train.batch_size
    begin = f"resuming at step {step:,} of" if step else "training for"
    return f"{begin} {steps:,} steps of {size} images ({steps / experiment.steps_per_epoch:.1f} epochs), in {workdir}"


def result(objective: Objective, summary: dict[str, Any]) -> str:
    """Returns 'test accuracy 97.50 % (351 of 360) after 4,490 steps, 1:11 of training'."""
    seconds = progress.clock(summary["seconds"])
    return f"{objective.summary_line(summary)} after {summary['steps']:,} steps, {seconds} of training"
