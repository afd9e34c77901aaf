"""A model with its preprocessing and class names, of a run or of a weights file: what `inference.Predictor` applies."""

import dataclasses
import os
from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from vit_jax import arguments, paths, terminal, weights
from vit_jax.checkpoint import input_spec
from vit_jax.checkpoint.input_spec import InputSpec
from vit_jax.data import normalization, user_images
from vit_jax.data.augment import Augment
from vit_jax.data.preparation import COVER, Preparation
from vit_jax.data.user_images import Image
from vit_jax.errors import UserError
from vit_jax.evaluation import extraction
from vit_jax.models.vit import VisionTransformer
from vit_jax.objectives import losses
from vit_jax.training import run_directory, setup
from vit_jax.weights import Report
from vit_jax.weights import class_names as class_name_lists


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A model and its preprocessing.

    Attributes:
        model: its `classes` is None if it has no head.
        parameters: of the model.
        augment: normalizes images, and makes the views that evaluation averages over.
        inputs: the shape of the images, and the class names of each head.
        loss: the key of `losses.LOSSES` that the model was trained with: 'softmax' (one class per image) or 'sigmoid'
            (each class independently).
        source: where the parameters come from, in a few words.
        no_head: why there is no head, if there is none.
        preparation: how images are resized and cropped.
        resampling: how position embeddings are resampled for other images, one of `resampling.METHODS`.
    """

    model: VisionTransformer
    parameters: dict[str, Any]
    augment: Augment
    inputs: InputSpec
    loss: str = "softmax"
    source: str = ""
    no_head: str = "the model has no head"
    preparation: Preparation = COVER
    resampling: str = "bilinear"

    def read(self, image: Image) -> UInt8[np.ndarray, "height width channels"] | str:
        """Returns an image of any size as the model takes it, before normalization; or why it cannot be read."""
        return user_images.read(image, self.inputs.image_shape, self.preparation)

    def pixels(self, image: Image) -> Float[np.ndarray, "height width channels"]:
        """Returns the input of the model for an image of any size: resized, cropped and normalized.

        Raises:
            UserError: the image cannot be read.
        """
        read = self.read(image)
        if isinstance(read, str):
            raise UserError(f"the image cannot be read: {read}\n  use another image")
        return np.asarray(self.augment.normalize(jnp.asarray(read[None])), np.float32)[0]


def of_run(
    workdir: str | bytes | os.PathLike, step: int | np.integer | str | None = None, *, needs_head: bool = True
) -> Classifier:
    """Returns the model of a run with its preprocessing and class names: from data.json, else from its data.

    Args:
        workdir: the run directory.
        step: a step, or 'best'; None for the newest checkpoint.
        needs_head: refuse a model without a head.

    Raises:
        UserError: there is no run or no such checkpoint, the model has no head, or data.json and the data are missing.
    """
    workdir = paths.expand(workdir, "source")
    if step is not None:
        step = arguments.integer("step", step, minimum=0, words=("best",))
    config = run_directory.trained_config(workdir)
    model, parameters, report = weights.load(workdir, **({} if step is None else {"step": step}))
    if model.classes is None and needs_head:
        raise UserError(
            f"{workdir}: the model has no head, so it cannot classify\n  use a run that trained a classifier"
        )
    inputs = input_spec.read(workdir)
    if inputs is None:
        source = setup.load(config, config.data.train, config.data.labels)
        statistics = normalization.of_source(config.data.normalization, source)
        inputs = InputSpec(source.name, source.image_shape, *statistics, source.class_names_by_label())
    *size, channels = inputs.image_shape
    kernel = config.model.attention_kernel
    model = extraction.prepare_for_device(model, config.model.dtype, tuple(size), channels, attention=kernel)
    views = {name: config.augment[name] for name in ("test_flip", "test_shift")}
    augment = Augment(inputs.mean, inputs.std, dtype=model.dtype, **views)
    source = "; ".join((str(workdir), *report.notes))
    return Classifier(model, parameters, augment, inputs, config.train.loss, source)


def of_file(
    file: str | bytes | os.PathLike,
    class_names: Iterable[str] | None = None,
    image_size: int | np.integer | tuple[int, int] | None = None,
    normalize: str | None = None,
    *,
    needs_head: bool = True,
) -> Classifier:
    """Returns the model of a weights file with its preprocessing, for `Predictor`.

    Args:
        file: a file, directory, URL or name that `weights.load` reads.
        class_names: one name per class; 'imagenet' for those of ImageNet-1k; None for those of the file, or '0', '1'.
        image_size: pixels, an int or (height, width); None for the size of images that the file records, or that its
            positions are for.
        normalize: 'half' for mean and std 0.5, 'imagenet', 'clip', or numbers (`normalization.text`); None for what the
            file says, or what its family had.
        needs_head: refuse a file without a head that can be used; else, its model returns features alone.

    Raises:
        UserError: the file cannot be read, has no head, or does not match the other arguments.
    """
    file = arguments.path("file", file)
    if class_names is not None:
        is_imagenet = isinstance(class_names, str) and class_names == class_name_lists.IMAGENET
        class_names = class_name_lists.imagenet1k() if is_imagenet else arguments.names("class_names", class_names)
    if image_size is not None:
        image_size = arguments.size("image_size", image_size)
    model, parameters, report, refusal = _load(file, image_size, needs_head)
    if not isinstance(model.classes, int) and (needs_head or model.classes is not None):
        raise _no_head(file, Classifier.no_head)
    names = tuple(class_names or report.class_names or map(str, range(model.classes or 0)))
    if len(names) != (model.classes or 0) and (model.classes is not None or class_names):
        raise UserError(
            f"{file} has {model.classes} classes, but {len(names)} class names are given\n  allowed: one per class"
        )
    if report.image_size is None:
        raise UserError(f"{file} does not specify its image size\n  set image_size, in pixels")
    statistics = _statistics(file, report, normalize)
    if not class_names and not report.class_names and len(names) == len(class_name_lists.imagenet1k()):
        terminal.warn(f"{file}: its classes have no names; those of ImageNet-1k: --classes={class_name_lists.IMAGENET}")
    shape = (*report.image_size, report.channels)
    model = extraction.prepare_for_device(model, "auto", report.image_size, report.channels)
    views = {name: report.evaluation[name] for name in ("test_flip", "test_shift") if name in report.evaluation}
    augment, loss = Augment(*statistics, dtype=model.dtype, **views), report.evaluation.get("loss", "softmax")
    if loss not in losses.LOSSES:
        raise UserError(f"{file}: config.json has loss {loss!r}\n  allowed: {', '.join(losses.LOSSES)}")
    inputs, no_head = InputSpec(str(file), shape, *statistics, {"label": names}), refusal or Classifier.no_head
    preparation = weights.preparation(report.evaluation, statistics)
    return Classifier(model, parameters, augment, inputs, loss, str(file), no_head, preparation, report.resampling)


def _load(
    file: str, image_size: int | tuple[int, int] | None, needs_head: bool
) -> tuple[VisionTransformer, dict, Report, str | None]:
    """Returns what `weights.load` does, for the file's images; and why its head is left out, if it is."""
    overrides = {} if image_size is None else {"image_size": image_size}
    refusal = weights.recognise(file, **overrides).head_refusal
    if refusal and needs_head:
        raise _no_head(file, refusal)
    headless = {"classes": None} if refusal else {}
    return (*extraction.load_sized(file, **overrides, **headless), refusal)


def _no_head(file: str, why: str) -> UserError:
    return UserError(
        f"{file}: {why}\n  use the weights of a classifier; for features: vit-jax features or vit_jax.backbone"
    )


def _statistics(file: str, report: Report, normalize: str | None) -> normalization.Statistics:
    if normalize is None:
        statistics = report.statistics or normalization.constants(report.normalization, report.channels, "normalize")
        if report.assumed:
            terminal.warn(f"{file}: {report.assumed}")
    else:
        statistics = normalization.constants(normalize, report.channels, "normalize")
    if statistics is None:
        why = "its images were normalized by" if normalize is None else "normalize is 'set':"
        allowed = ", ".join(normalization.CONSTANTS)
        raise UserError(
            f"{file}: {why} the mean and std of their dataset, which are not in the file\n"
            f"  predict with --workdir of the run; or set normalize to one of {allowed}, or {normalization.PER_CHANNEL}"
        )
    return statistics
