"""What `vit-jax evaluate --init` does: a model of a weights file, scored by its own head on a dataset."""

import argparse
import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vit_jax import commands, terminal
from vit_jax.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    from jaxtyping import Int32

    from vit_jax.data.augment import Augment
    from vit_jax.data.sources import Source
    from vit_jax.evaluation.per_class import Predictions
    from vit_jax.inference import Classifier

OF_RUN = ("step", "best", "weights")  # flags that only --workdir uses
OF_INIT = ("data", "label", "classes", "prompt", "image_size", "normalize")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that only `--init` uses, but for those that `commands.add_flags` adds."""
    parser.add_argument("--data", metavar="NAME", help="with --init: digits, folder, arrays or a TFDS dataset")
    parser.add_argument(
        "--label", metavar="KIND", help="with --init: which labels to use, if there are several kinds (default: label)"
    )
    commands.add_classes_flags(parser)


def prepare(
    flags: argparse.Namespace,
) -> "tuple[Augment, Callable[[Augment], tuple[dict[str, Any], dict[str, Predictions]]], Source]":
    """Returns the views of the model, the function that scores it with such views, and the examples that it scores.

    The function returns the metrics on the split and the predictions by head. The examples are labelled as the model's
    classes.

    Sets `flags.split` to the prefix of the metrics: 'all' for a folder without splits.

    Raises:
        UserError: the weights or the data cannot be read, the weights have no head, or their classes differ.
    """
    import jax
    import numpy as np

    from vit_jax import inference, sharding
    from vit_jax.data import pipeline, sources
    from vit_jax.data.spec import LABEL
    from vit_jax.evaluation import exact
    from vit_jax.objectives.classification import Classification
    from vit_jax.runtime import compilation_cache
    from vit_jax.training import folder_config

    commands.start_jax()
    compilation_cache.cache_compilations()
    split = flags.split or commands.TEST
    name, data_dir, _, held_out = commands.dataset_of(flags, (split,))
    if flags.split is None and flags.data_dir and folder_config.fraction(name, data_dir, (split,)) is not None:
        terminal.warn(f"{data_dir} has no splits: all images are scored (--split=test: those that training holds out)")
        split, held_out = "all", None
    flags.split = split
    where = {"data_dir": data_dir, "held_out": held_out, "labels": (flags.label or LABEL,)}
    with commands.flags_named(commands.DATA_FLAGS):  # before the weights, which may have to be downloaded
        *_, channels = sources.check(name, (split,), image_size=flags.image_size or 1, **where)
    model = commands.classifier_of(flags)
    with commands.flags_named(commands.DATA_FLAGS):
        theirs = sources.class_names(name, data_dir)[flags.label or LABEL]
    names, index_of = _matched(model, theirs, channels, flags.init, name)  # before the images, which may be many
    where |= {"image_size": model.inputs.image_shape[:2], "preparation": model.preparation}
    with commands.flags_named(commands.DATA_FLAGS):
        source = sources.load(name, split, own_statistics=True, **where)
    images = source.images
    if channels == 1:
        images = np.broadcast_to(images, (*images.shape[:3], model.inputs.image_shape[2]))  # a view, not a copy
    source = dataclasses.replace(source, images=images, labels=index_of[source.labels], class_names=names)
    mesh = sharding.make_mesh(None)
    batch_size = -(-(flags.batch_size or inference.BATCH_SIZE) // mesh.size) * mesh.size
    objective = Classification({source.label: 1.0}, model.loss)
    parameters = jax.device_put(model.parameters, sharding.replicated(mesh))
    batches = pipeline.make(source, mesh)

    def score(augment: "Augment") -> tuple[dict[str, Any], "dict[str, Predictions]"]:
        scorer = exact.make_scorer(model.model, augment, mesh, objective)
        return exact.evaluate(scorer, parameters, batches, batch_size, flags.split, objective)

    return model.augment, score, source


def _matched(
    model: "Classifier", theirs: tuple[str, ...], channels: int, init: str, data: str
) -> "tuple[tuple[str, ...], Int32[np.ndarray, ' data_classes']]":
    """Returns the names of the model's classes, and their index for each class of the data; prints how they match.

    A model without class names gets those of the data, if these are assumed to be in the same order.

    Raises:
        UserError: the classes or the channels differ.
    """
    from vit_jax.evaluation import class_names

    (ours,) = model.inputs.classes.values()
    index_of, line = class_names.match(ours, theirs, init, data)
    if channels not in (1, model.inputs.image_shape[2]):
        raise UserError(
            f"--data={data} has images of {channels} channels, the model of {init} takes "
            f"{model.inputs.image_shape[2]}\n  use a dataset or a model with the same channels"
        )
    terminal.warn(line)
    is_same_order = index_of.tolist() == list(range(len(ours)))
    takes_theirs = is_same_order and class_names.are_names(theirs) and not class_names.are_names(ours)
    return theirs if takes_theirs else ours, index_of
