"""A trained model as a function: images of any kind in, class names and probabilities out."""

import collections
import concurrent.futures
import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from vit_jax import sharding, weights
from vit_jax.data import images as pictures
from vit_jax.data import normalization
from vit_jax.data.augment import Augment
from vit_jax.errors import UserError
from vit_jax.evaluation import extraction
from vit_jax.models.vit import VisionTransformer
from vit_jax.objectives import losses
from vit_jax.training import input_spec, run_directory, setup
from vit_jax.training.input_spec import Inputs

BATCH_SIZE = 64
TOP = 5
_AHEAD = 2  # batches that are decoded ahead of the one in use

Image = str | os.PathLike | np.ndarray


@dataclasses.dataclass(frozen=True)
class Guess:
    """A class, and how probable the model holds it to be."""

    label: str
    probability: float


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """What the model says of one image.

    Attributes:
        image: its path, or its place among those given as arrays.
        heads: by kind of label, the most probable classes, most probable first.
        logits: by kind of label, [classes].
    """

    image: str | int
    heads: Mapping[str, tuple[Guess, ...]]
    logits: Mapping[str, Float[np.ndarray, " classes"]]

    @property
    def guesses(self) -> tuple[Guess, ...]:
        """Those of the first kind of label."""
        return next(iter(self.heads.values()))

    @property
    def label(self) -> str:
        """The most probable class of the first kind of label."""
        return self.guesses[0].label


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """An image that could not be read: its path or place, and why not, in a line."""

    image: str | int
    reason: str


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A model with a head, and what it takes to use it on images.

    Attributes:
        model: it.
        parameters: its own.
        augment: normalises images, and takes the views that evaluation takes.
        inputs: shape of the images, and the class names of each head.
        loss: of `losses.LOSSES`, which says what logits mean: one class of many, or each by itself.
    """

    model: VisionTransformer
    parameters: dict[str, Any]
    augment: Augment
    inputs: Inputs
    loss: str = "softmax"


class Predictor:
    """Applies a trained model to images: files of any format and size that Pillow reads, or arrays."""

    def __init__(
        self,
        source: str | os.PathLike | Classifier,
        *,
        step: int | str | None = None,
        batch_size: int = BATCH_SIZE,
    ):
        """Reads the parameters of a run; it may be one that is still training.

        Args:
            source: its folder; or what `of_file` makes of any file of weights.
            step: of a run: a step, or 'best'; None for the newest checkpoint.
            batch_size: images at a time, rounded up so that the devices divide it; changes no result.

        Raises:
            UserError: there is no run, or no such checkpoint.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}\n  allowed: a whole number of at least 1")
        trained = source if isinstance(source, Classifier) else of_run(Path(source).expanduser(), step)
        mesh = sharding.make_mesh(None)
        self.inputs = trained.inputs
        self._model_classes = trained.model.classes
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        self._spread = sharding.data_sharding(mesh)
        self._parameters = jax.device_put(trained.parameters, sharding.replicated(mesh))

        def apply(parameters: Any, images: jax.Array) -> Any:
            views = [trained.model.apply({"params": parameters}, view) for view in trained.augment.views(images)]
            mean = lambda *heads: losses.mean_probability(heads, trained.loss)  # noqa: E731
            return views[0] if len(views) == 1 else jax.tree.map(mean, *views)

        self._probabilities = _PROBABILITIES[trained.loss]
        self._apply = jax.jit(apply, out_shardings=sharding.replicated(mesh))

    def __call__(self, images: Image | Iterable[Image], top: int = TOP) -> list[Prediction]:
        """What the model says of each image, in their order.

        Args:
            images: paths of files, of folders (all images below, sorted), or uint8 arrays [height, width] or
                [height, width, channels]; one, or many of any size.
            top: how many classes of each head.

        Raises:
            UserError: one of them cannot be read.
        """
        alone = isinstance(images, str | os.PathLike) or (isinstance(images, np.ndarray) and images.ndim < 4)
        found = []
        for made in self.stream(expand([images] if alone else images), top):
            if isinstance(made, Unreadable):
                raise UserError(f"{made.image} cannot be read as an image: {made.reason}")
            found.append(made)
        return found

    def stream(self, images: Iterable[Image], top: int = TOP) -> Iterator[Prediction | Unreadable]:
        """The same one after the other, a batch at a time; what cannot be read is told of in its place."""
        for names, decoded in self._decoded(images):
            batch = np.zeros((self._batch_size, *self.inputs.image_shape), np.uint8)
            for place, image in enumerate(decoded):
                if isinstance(image, np.ndarray):
                    batch[place] = image
            logits = jax.device_get(self._apply(self._parameters, jax.device_put(batch, self._spread)))
            if not isinstance(self._model_classes, Mapping):
                logits = {next(iter(self.inputs.classes)): logits}
            for place, (name, image) in enumerate(zip(names, decoded, strict=True)):
                if isinstance(image, str):
                    yield Unreadable(name, image)
                else:
                    yield self._prediction(name, {kind: rows[place] for kind, rows in logits.items()}, top)

    def _decoded(
        self, images: Iterable[Image]
    ) -> Iterator[tuple[list[str | int], list[UInt8[np.ndarray, "height width channels"] | str]]]:
        """Names and images (in place of one that cannot be read, the reason), a batch at a time, read ahead."""
        numbered, pending = enumerate(images), collections.deque()
        with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
            while True:
                while len(pending) <= _AHEAD and (chunk := list(itertools.islice(numbered, self._batch_size))):
                    names = [place if isinstance(one, np.ndarray) else os.fspath(one) for place, one in chunk]
                    jobs = [threads.submit(_read, one, self.inputs.image_shape) for _, one in chunk]
                    pending.append((names, jobs))
                if not pending:
                    return
                names, jobs = pending.popleft()
                yield names, [job.result() for job in jobs]

    def _prediction(self, name: str | int, logits: Mapping[str, np.ndarray], top: int) -> Prediction:
        heads = {}
        for kind, row in logits.items():
            probabilities = self._probabilities(row.astype(np.float64))
            best = np.argsort(-probabilities, kind="stable")[:top]
            names = self.inputs.classes[kind]
            heads[kind] = tuple(Guess(names[place], float(probabilities[place])) for place in best)
        return Prediction(name, heads, logits)


def _softmax(logits: Float[np.ndarray, " classes"]) -> Float[np.ndarray, " classes"]:
    shifted = np.exp(logits - logits.max())
    return shifted / shifted.sum()


def _sigmoid(logits: Float[np.ndarray, " classes"]) -> Float[np.ndarray, " classes"]:
    return np.exp(-np.logaddexp(0, -logits))


_PROBABILITIES = {"softmax": _softmax, "sigmoid": _sigmoid}


def _read(image: Image, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "height width channels"] | str:
    """An image as the model takes it, resized as training does; or why it cannot be read."""
    import PIL.Image

    try:
        if not isinstance(image, np.ndarray):
            return pictures.decode(Path(image), shape)
        if image.dtype != np.uint8:
            return f"it is an array of {image.dtype}; uint8 is needed"
        return pictures.convert(PIL.Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image), shape)
    except FileNotFoundError:
        return "there is no such file"
    except IsADirectoryError:
        return "it is a folder"
    except PIL.Image.UnidentifiedImageError:
        return "it is no image, or of a format that Pillow does not know"
    except Exception as error:  # Pillow's decoders raise many kinds for damaged bytes
        return " ".join(str(error).split())[:200] or type(error).__name__


def expand(images: Iterable[Image]) -> Iterator[Image]:
    """The images, and in place of a folder those below it, sorted by path; hidden ones left out."""
    for image in images:
        if not isinstance(image, np.ndarray) and os.path.isdir(image):
            yield from _below(Path(image))
        else:
            yield image


def _below(folder: Path) -> list[Path]:
    import PIL.Image

    known = {ending for ending, kind in PIL.Image.registered_extensions().items() if kind in PIL.Image.OPEN}
    found = []
    for path, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        shown = (Path(path, name) for name in files if not name.startswith("."))
        found += [file for file in shown if file.suffix.lower() in known]
    return sorted(found)


def of_run(folder: Path, step: int | str | None = None) -> Classifier:
    """The model of a run, with images and class names as it was trained on: by its data.json, else by its data.

    Raises:
        UserError: there is no run or no such checkpoint, it has no head, or its data cannot be had where needed.
    """
    config = run_directory.trained_config(folder)
    asked = {} if step is None else {"step": step}
    model, parameters, _ = weights.load(folder, **asked)
    if model.classes is None:
        raise UserError(f"{folder}: the model has no head, and so no classes\n  give a run that learned some")
    known = input_spec.read(folder)
    if known is None:
        source = setup.load(config, config.data.train, losses.label_kinds(config.data))
        known = input_spec.of_source(source, *normalization.of_source(config.data.normalization, source))
    *size, channels = known.image_shape
    kernel = config.model.attention_kernel
    model = extraction.computing(model, config.model.dtype, tuple(size), channels, attention=kernel)
    views = {name: config.augment[name] for name in ("test_flip", "test_shift")}
    augment = Augment(known.mean, known.std, dtype=model.dtype, **views)
    return Classifier(model, parameters, augment, known, config.train.loss)


def of_file(
    file: str | os.PathLike,
    class_names: Sequence[str] | None = None,
    image_size: int | None = None,
    normalize: str | None = None,
) -> Classifier:
    """The model of a file of weights.

    Args:
        file: a file, folder, URL or name that `weights.load` reads.
        class_names: one name a class; None for their numbers.
        image_size: pixels; None for what its positions are made for.
        normalize: 'half' for a mean and std of 0.5 (Google's models), 'imagenet' for ImageNet's (DeiT, DINO, MAE); None
            for what the file says, and 'half' where it says nothing.

    Raises:
        UserError: it cannot be read, has no head, or does not go with the rest.
    """
    size = {} if image_size is None else {"image_size": image_size}
    model, parameters, report = weights.load(file, **size)
    if not isinstance(model.classes, int):
        raise UserError(f"{file}: the model has no head of its own\n  give a file that was trained to classify")
    names = tuple(map(str, range(model.classes))) if class_names is None else tuple(class_names)
    if len(names) != model.classes:
        raise UserError(f"{file} has {model.classes} classes, and {len(names)} names are given\n  give a name a class")
    if report.image_size is None:
        raise UserError(f"{file} does not tell the size of its images\n  give it: image_size, in pixels")
    if normalize is not None and normalize not in normalization.CONSTANTS:
        allowed = ", ".join(normalization.CONSTANTS)
        raise UserError(f"normalize is {normalize!r}, and there is no data set\n  allowed: {allowed}")
    normalize = normalize or report.normalization
    statistics = normalization.constants(normalize, report.channels, "normalize")
    if statistics is None:
        raise UserError(
            f"{file} is of images that were normalised by their data set, which is not here\n"
            "  predict with --workdir of a run; or give normalize, half or imagenet"
        )
    shape = (*report.image_size, report.channels)
    model = extraction.computing(model, "auto", report.image_size, report.channels)
    augment = Augment(*statistics, dtype=model.dtype)
    return Classifier(model, parameters, augment, Inputs(str(file), shape, *statistics, {"label": names}))
