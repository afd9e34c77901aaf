"""Inference with a trained classifier: images of any format and size in, class names and probabilities out."""

import collections
import concurrent.futures
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
import PIL.Image
from jaxtyping import Float, UInt8

from vit_jax import arguments, paths, sharding, terminal, weights
from vit_jax.checkpoint import input_spec
from vit_jax.checkpoint.input_spec import InputSpec
from vit_jax.data import images as image_files
from vit_jax.data import listing, normalization
from vit_jax.data.augment import Augment
from vit_jax.data.listing import LeftOut
from vit_jax.errors import UserError, one_line
from vit_jax.evaluation import extraction
from vit_jax.models.vit import VisionTransformer
from vit_jax.objectives import losses
from vit_jax.training import run_directory, setup

BATCH_SIZE = 64
TOP = 5
_BATCHES_AHEAD = 2  # decoded while the device computes

# A path, the contents of an image file or a file opened for reading bytes, an opened image of Pillow, or an array.
Image = str | os.PathLike | bytes | bytearray | memoryview | BinaryIO | np.ndarray | jax.Array | PIL.Image.Image
_BYTES = (bytes, bytearray, memoryview)


@dataclasses.dataclass(frozen=True)
class Guess:
    """A class name and its probability."""

    label: str
    probability: float


@dataclasses.dataclass(frozen=True, eq=False)
class Prediction:
    """The predictions for one image.

    Attributes:
        image: its path, or its index if it was given as an array.
        heads: by head, the most probable classes, in order of decreasing probability.
        logits: by head, [classes].
    """

    image: str | int
    heads: Mapping[str, tuple[Guess, ...]]
    logits: Mapping[str, Float[np.ndarray, " classes"]]

    @property
    def guesses(self) -> tuple[Guess, ...]:
        """The most probable classes of the first head."""
        return next(iter(self.heads.values()))

    @property
    def label(self) -> str:
        """The most probable class of the first head."""
        return self.guesses[0].label


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """An image that could not be read: its path or index, and the reason in one line."""

    image: str | int
    reason: str


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A model with a head, and its preprocessing.

    Attributes:
        model: its `classes` is not None.
        parameters: of the model.
        augment: normalizes images, and makes the views that evaluation averages over.
        inputs: the shape of the images, and the class names of each head.
        loss: the key of `losses.LOSSES` that the model was trained with: 'softmax' (one class per image) or 'sigmoid'
            (each class independently).
    """

    model: VisionTransformer
    parameters: dict[str, Any]
    augment: Augment
    inputs: InputSpec
    loss: str = "softmax"


class Predictor:
    """Applies a trained model to images: arrays, or files of any size and format that Pillow reads.

    Numbers may be those of Python, NumPy or JAX.
    """

    def __init__(
        self,
        source: str | bytes | os.PathLike | Classifier,
        *,
        step: int | np.integer | str | None = None,
        batch_size: int | np.integer = BATCH_SIZE,
    ):
        """Loads the parameters of a run, which may still be training.

        Args:
            source: the run directory; or the result of `of_file`.
            step: for a run: a step, or 'best'; None for the newest checkpoint.
            batch_size: images per batch, rounded up to a multiple of the number of devices; does not change the result.

        Raises:
            UserError: there is no run, or no such checkpoint; an argument has the wrong type.
        """
        batch_size = arguments.integer("batch_size", batch_size)
        mesh = sharding.make_mesh(None)  # first: without devices, no checkpoint can be read
        classifier = source if isinstance(source, Classifier) else of_run(source, step)
        model, augment, loss = classifier.model, classifier.augment, classifier.loss
        self.inputs = classifier.inputs
        self._model_classes = model.classes
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        self._data_sharding = sharding.data_sharding(mesh)
        self._parameters = jax.device_put(classifier.parameters, sharding.replicated(mesh))

        def apply(parameters: Any, images: jax.Array) -> Any:
            views = [model.apply({"params": parameters}, view) for view in augment.views(images)]
            return losses.average_views(views, loss)

        self._to_probabilities = _TO_PROBABILITIES[loss]
        self._apply = jax.jit(apply, out_shardings=sharding.replicated(mesh))

    def __call__(self, images: Image | Iterable[Image], top: int | np.integer = TOP) -> list[Prediction]:
        """Returns the predictions for each image, in the order of the images.

        Args:
            images: paths of files, paths of directories (all images below, sorted), contents of image files, images of
                Pillow, or uint8 arrays [height, width] or [height, width, channels]; one, or several of any size.
            top: number of classes per head.

        Raises:
            UserError: an image cannot be read, or an argument has the wrong type.
        """
        several = enumerate(_as_images(images))
        each = (expand([image]) if isinstance(image, str) else [_checked(index, image)] for index, image in several)
        predictions = []
        for prediction in self.stream(itertools.chain.from_iterable(each), top):
            if isinstance(prediction, Unreadable):
                raise UserError(
                    f"{prediction.image} cannot be read as an image: {prediction.reason}\n"
                    "  leave it out, or use Predictor.stream, which yields Unreadable in its place"
                )
            predictions.append(prediction)
        return predictions

    def stream(self, images: Iterable[Image], top: int | np.integer = TOP) -> Iterator[Prediction | Unreadable]:
        """Yields the predictions for each image, computed in batches, or `Unreadable` for one that cannot be read."""
        top = arguments.integer("top", top)
        for names, decoded in self._decode(images):
            batch = np.zeros((self._batch_size, *self.inputs.image_shape), np.uint8)
            for index, image in enumerate(decoded):
                if isinstance(image, np.ndarray):
                    batch[index] = image
            logits = jax.device_get(self._apply(self._parameters, jax.device_put(batch, self._data_sharding)))
            if not isinstance(self._model_classes, Mapping):
                logits = {next(iter(self.inputs.classes)): logits}
            for index, (name, image) in enumerate(zip(names, decoded, strict=True)):
                if isinstance(image, str):
                    yield Unreadable(name, image)
                else:
                    yield self._prediction(name, {head: rows[index] for head, rows in logits.items()}, top)

    def _decode(
        self, images: Iterable[Image]
    ) -> Iterator[tuple[list[str | int], list[UInt8[np.ndarray, "height width channels"] | str]]]:
        """Yields batches of names and images, decoded ahead of time; for an unreadable image, the reason."""
        numbered, pending = enumerate(_as_images(images)), collections.deque()
        with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
            while True:
                while len(pending) <= _BATCHES_AHEAD and (chunk := list(itertools.islice(numbered, self._batch_size))):
                    names = [os.fspath(image) if isinstance(image, str | Path) else index for index, image in chunk]
                    jobs = [threads.submit(_read, image, self.inputs.image_shape) for _, image in chunk]
                    pending.append((names, jobs))
                if not pending:
                    return
                names, jobs = pending.popleft()
                yield names, [job.result() for job in jobs]

    def _prediction(self, name: str | int, logits: Mapping[str, np.ndarray], top: int) -> Prediction:
        heads = {}
        for head, row in logits.items():
            if not np.isfinite(row).all():
                raise UserError(f"{name}: the outputs of the model are not finite\n  use another checkpoint or file")
            probabilities = self._to_probabilities(row.astype(np.float64))
            best = np.argsort(-probabilities, kind="stable")[:top]
            names = self.inputs.classes[head]
            heads[head] = tuple(Guess(names[index], float(probabilities[index])) for index in best)
        return Prediction(name, heads, logits)


def _softmax(logits: Float[np.ndarray, " classes"]) -> Float[np.ndarray, " classes"]:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def _sigmoid(logits: Float[np.ndarray, " classes"]) -> Float[np.ndarray, " classes"]:
    return np.exp(-np.logaddexp(0, -logits))


_TO_PROBABILITIES = {"softmax": _softmax, "sigmoid": _sigmoid}


def _read(image: Image, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "height width channels"] | str:
    """Returns an image as the model takes it, resized as in training; or the reason why it cannot be read."""
    try:
        if not isinstance(image, np.ndarray):
            return _decode_other(image, shape)
        if image.dtype != np.uint8:
            return f"the array has dtype {image.dtype}, not uint8"
        if not _is_image_shape(image.shape):
            return f"the array has shape {image.shape}, not [height, width] or [height, width, 1, 3 or 4]"
        opened = PIL.Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
        return image_files.convert(opened, shape)
    except (image_files.ImageError, UserError) as error:
        return one_line(error)


def _decode_other(image: Image, shape: tuple[int, int, int]) -> UInt8[np.ndarray, "height width channels"]:
    """Returns what `_read` does, of anything but an array."""
    if isinstance(image, PIL.Image.Image):
        return image_files.convert(image, shape)
    return image_files.decode(image if isinstance(image, bytes) else Path(image), shape)


def _as_images(images: Image | Iterable[Image]) -> Iterator[Image]:
    """Yields one image or several: paths as text, arrays as those of NumPy; bytes and Pillow's images as they are.

    Raises:
        UserError: something else is among them.
    """
    if isinstance(images, np.ndarray) and images.dtype.kind in "OUST":  # of paths, or of other images
        images = images.ravel().tolist()
    is_array = hasattr(images, "__array__") and not isinstance(images, PIL.Image.Image)
    single = isinstance(images, (str, *_BYTES, os.PathLike, PIL.Image.Image)) or hasattr(images, "read")
    if single or (is_array and np.ndim(images) < 4):
        yield _as_image("images", images)
        return
    if not isinstance(images, Iterable):
        raise _not_an_image("images", images)
    for index, image in enumerate(np.asarray(images) if is_array else images):
        yield _as_image(f"images[{index}]", image)


def _as_image(name: str, image: Any) -> Image:
    if hasattr(image, "read"):
        image = image.read()
        if not isinstance(image, bytes):
            raise UserError(f"{name} is a file that was opened for reading text\n  open it with the mode 'rb'")
        return image
    if isinstance(image, _BYTES):  # a path only if there is such a file: contents of images are none
        image = bytes(image)
        return os.fsdecode(image) if os.path.exists(image) else image
    if isinstance(image, str | os.PathLike):
        return os.fsdecode(image)
    if isinstance(image, PIL.Image.Image):
        return image
    if not hasattr(image, "__array__"):
        raise _not_an_image(name, image)
    return np.asarray(image)


def _checked(index: int, image: Image) -> Image:
    """Returns the image; raises UserError if it is an array that cannot be an image."""
    if not isinstance(image, np.ndarray):
        return image
    if image.dtype != np.uint8:
        raise UserError(
            f"images[{index}] has pixels of dtype {image.dtype}\n  allowed: uint8, from 0 to 255; "
            "of floats from 0 to 1, pass (255 * image).round().astype('uint8')"
        )
    if not _is_image_shape(image.shape):
        raise UserError(
            f"images[{index}] has shape {list(image.shape)}\n"
            "  allowed: [height, width], or [height, width, channels] with 1, 3 or 4 channels"
        )
    return image


def _is_image_shape(shape: tuple[int, ...]) -> bool:
    """Returns whether a shape is [height, width], or [height, width, channels] with 1, 3 or 4 channels; none is 0."""
    return len(shape) in (2, 3) and shape[2:] in ((), (1,), (3,), (4,)) and 0 not in shape


def _not_an_image(name: str, value: Any) -> UserError:
    return UserError(
        f"{name} is {arguments.shown(value)}\n  allowed: a path, bytes of an image file, an image of Pillow, or a "
        "uint8 array\n  pass a list of pixels as np.asarray(image, np.uint8)"
    )


def expand(images: Iterable[Image], say: Callable[[str], Any] = terminal.warn) -> Iterator[Image]:
    """Yields the images; in place of a directory, the images below it, sorted by path; links are followed.

    Args:
        images: paths and arrays.
        say: called with a line about what is left out of a directory; by default, that is printed to stderr.
    """
    for image in images:
        if not isinstance(image, np.ndarray) and os.path.isdir(image):
            yield from _images_below(Path(image), say)
        else:
            yield image


def _images_below(directory: Path, say: Callable[[str], Any]) -> list[Path]:
    extensions = {name for name, format_ in PIL.Image.registered_extensions().items() if format_ in PIL.Image.OPEN}
    found, left_out = [], LeftOut(directory)
    for path in map(Path, listing.files_below(directory, left_out)):
        if path.suffix.lower() in extensions:
            found.append(path)
        else:
            left_out.add("without the extension of an image", path)
    if text := left_out.describe():
        say(f"{listing.printable(str(directory))}: {text}")
    return sorted(found)


def of_run(workdir: str | bytes | os.PathLike, step: int | np.integer | str | None = None) -> Classifier:
    """Returns the model of a run with its preprocessing and class names: from data.json, else from its data.

    Args:
        workdir: the run directory.
        step: a step, or 'best'; None for the newest checkpoint.

    Raises:
        UserError: there is no run or no such checkpoint, the model has no head, or data.json and the data are missing.
    """
    workdir = paths.expand(workdir, "source")
    if step is not None:
        step = arguments.integer("step", step, minimum=0, words=("best",))
    config = run_directory.trained_config(workdir)
    model, parameters, _ = weights.load(workdir, **({} if step is None else {"step": step}))
    if model.classes is None:
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
    return Classifier(model, parameters, augment, inputs, config.train.loss)


def of_file(
    file: str | bytes | os.PathLike,
    class_names: Iterable[str] | None = None,
    image_size: int | np.integer | None = None,
    normalize: str | None = None,
) -> Classifier:
    """Returns the model of a weights file with its preprocessing, for `Predictor`.

    Args:
        file: a file, directory, URL or name that `weights.load` reads.
        class_names: one name per class; None for those beside the file, or '0', '1', ...
        image_size: side in pixels; None for the size that the position embeddings are for.
        normalize: 'half' for mean and std 0.5 (Google's models), or 'imagenet' for ImageNet's (DeiT, DINO, MAE); None
            for what the file says, or 'half' if it says nothing.

    Raises:
        UserError: the file cannot be read, has no head, or does not match the other arguments.
    """
    file = arguments.path("file", file)
    if class_names is not None:
        class_names = arguments.names("class_names", class_names)
    if image_size is not None:
        image_size = arguments.integer("image_size", image_size)
    model, parameters, report = weights.load(file, **({} if image_size is None else {"image_size": image_size}))
    if not isinstance(model.classes, int):
        raise UserError(f"{file}: the model has no head\n  use the weights of a classifier")
    names = tuple(class_names or report.class_names or map(str, range(model.classes)))
    if len(names) != model.classes:
        raise UserError(
            f"{file} has {model.classes} classes, but {len(names)} class names are given\n  allowed: one per class"
        )
    if report.image_size is None:
        raise UserError(f"{file} does not specify its image size\n  set image_size, in pixels")
    if normalize is not None and normalize not in normalization.CONSTANTS:
        raise UserError(f"normalize is {normalize!r}\n  allowed: {', '.join(normalization.CONSTANTS)}")
    statistics = None if normalize else report.statistics
    statistics = statistics or normalization.constants(normalize or report.normalization, report.channels, "normalize")
    if statistics is None:
        raise UserError(
            f"{file}: its images were normalized by the mean and std of their dataset, which are not in the file\n"
            "  predict with --workdir of the run; or set normalize to half or imagenet"
        )
    shape = (*report.image_size, report.channels)
    model = extraction.prepare_for_device(model, "auto", report.image_size, report.channels)
    views = {name: report.evaluation[name] for name in ("test_flip", "test_shift") if name in report.evaluation}
    augment, loss = Augment(*statistics, dtype=model.dtype, **views), report.evaluation.get("loss", "softmax")
    if loss not in losses.LOSSES:
        raise UserError(f"{file}: config.json has loss {loss!r}\n  allowed: {', '.join(losses.LOSSES)}")
    return Classifier(model, parameters, augment, InputSpec(str(file), shape, *statistics, {"label": names}), loss)
