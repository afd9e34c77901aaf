"""Inference with a trained model: images of any format and size in; class names, probabilities and features out."""

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jaxtyping import Float, Float32, UInt8

from vit_jax import arguments, sharding
from vit_jax.classifier import Classifier, of_file, of_run
from vit_jax.data import listing, user_images
from vit_jax.data.user_images import Image, expand
from vit_jax.errors import UserError, few
from vit_jax.evaluation import tokens
from vit_jax.objectives import losses

BATCH_SIZE = 64
TOP = 5
MAX_SHOWN = 20  # predictions that a list of them shows
_BATCHES_AHEAD = 2  # decoded while the device computes

__all__ = ["Classifier", "Guess", "Prediction", "Predictions", "Predictor", "Unreadable", "expand", "of_file", "of_run"]

# Outputs of a model: one array [images, ...], or a dictionary of them by head.
Outputs = Float32[np.ndarray, "images *outputs"] | dict[str, Float32[np.ndarray, "images *outputs"]]


@dataclasses.dataclass(frozen=True)
class Guess:
    """A class name and its probability."""

    label: str
    probability: float

    def __repr__(self) -> str:
        return f"{listing.printable(self.label)} {100 * self.probability:.1f} %"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
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

    @property
    def probability(self) -> float:
        """The probability of `label`."""
        return self.guesses[0].probability

    def describe(self) -> str:
        """Returns 'cat 93.1 %, dog 4.2 %'; of several heads, 'label: cat 93.1 %; color: black 88.0 %'."""
        parts = {head: ", ".join(map(repr, guesses)) for head, guesses in self.heads.items()}
        return "; ".join(f"{head}: {part}" if len(parts) > 1 else part for head, part in parts.items())

    def __repr__(self) -> str:
        name = f"image {self.image}" if isinstance(self.image, int) else listing.printable(self.image)
        return f"{name}: {self.describe()}"


class Predictions(list[Prediction]):
    """A list of predictions, shown with one line per image."""

    def __repr__(self) -> str:
        more = [f"... and {len(self) - MAX_SHOWN:,} more"] if len(self) > MAX_SHOWN else []
        return "\n".join([*map(repr, self[:MAX_SHOWN]), *more]) or "[]"


@dataclasses.dataclass(frozen=True)
class Unreadable:
    """An image that could not be read: its path or index, and the reason in one line."""

    image: str | int
    reason: str


class Predictor:
    """Applies a trained model to images: arrays, or files of any size and format that Pillow reads.

    Images are resized and normalized as in evaluation. Numbers may be those of Python, NumPy or JAX.

    Attributes:
        module: the Vision Transformer.
        parameters: of the module, on the devices.
        inputs: the shape of the images that it takes, their mean and std, and the class names.
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
        self._mesh = sharding.make_mesh(None)  # first: without devices, no checkpoint can be read
        classifier = source if isinstance(source, Classifier) else of_run(source, step)
        self._classifier = classifier
        self.module, self.inputs = classifier.model, classifier.inputs
        self._batch_size = -(-batch_size // self._mesh.size) * self._mesh.size
        self._data_sharding = sharding.data_sharding(self._mesh)
        self.parameters = jax.device_put(classifier.parameters, sharding.replicated(self._mesh))

    @property
    def classes(self) -> tuple[str, ...] | dict[str, tuple[str, ...]] | None:
        """The class names, in the order of the logits; by head for several heads, None without a head."""
        if self.module.classes is None:
            return None
        return dict(self.inputs.classes) if self._has_several_heads else next(iter(self.inputs.classes.values()))

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images that the model takes, in pixels."""
        return self.inputs.image_shape[:2]

    def pixels(self, image: Image) -> Float[np.ndarray, "height width channels"]:
        """Returns the input of the model for one image of any size: resized, cropped and normalized."""
        return self._classifier.pixels(image)

    @property
    def _has_several_heads(self) -> bool:
        return isinstance(self.module.classes, Mapping)

    def __repr__(self) -> str:
        model, (height, width, channels) = self.module, self.inputs.image_shape
        count = sum(leaf.size for leaf in jax.tree.leaves(self.parameters))
        named = {} if model.classes is None else self.inputs.classes
        heads = [f"{len(names):,} classes ({listing.printable(few(names))})" for names in named.values()]
        size = f"patch {model.patch_size}, width {model.width}, depth {model.depth}; {count:,} parameters"
        images = f"images of {height}x{width}x{channels}"
        return f"<{self._classifier.source}: {size}; {images}; {' and '.join(heads) or 'no head'}>"

    def __call__(self, images: Image | Iterable[Image], top: int | np.integer = TOP) -> Predictions:
        """Returns the predictions for each image, in the order of the images.

        Args:
            images: paths of files, paths of directories (all images below, sorted), contents of image files, images of
                Pillow, or uint8 arrays [height, width] or [height, width, channels]; one, or several of any size.
            top: number of classes per head.

        Raises:
            UserError: an image cannot be read, an argument has the wrong type, or the model has no head.
        """
        predictions = Predictions()
        for prediction in self.stream(_checked(images), top):
            if isinstance(prediction, Unreadable):
                _refuse(prediction.image, prediction.reason)
            predictions.append(prediction)
        return predictions

    def predict(self, images: Image | Iterable[Image], top: int | np.integer = TOP) -> Predictions:
        """Returns what calling the object returns."""
        return self(images, top)

    def logits(self, images: Image | Iterable[Image]) -> Outputs:
        """Returns the logits [images, classes], by head for several heads; images and errors as for a call.

        If evaluation averages over views of an image, they are the logits of the mean probabilities.
        """
        return self._arrays(self._apply, images)

    def probabilities(self, images: Image | Iterable[Image]) -> Outputs:
        """Returns the probabilities [images, classes], by head for several heads; images and errors as for a call."""
        convert = _TO_PROBABILITIES[self._classifier.loss]
        return jax.tree.map(lambda rows: convert(rows.astype(np.float64)).astype(np.float32), self.logits(images))

    def features(self, images: Image | Iterable[Image], patches: bool = False) -> Float32[np.ndarray, "images *_"]:
        """Returns the input of the head, [images, width], as `vit_jax.features` stores it; images as for a call.

        Args:
            images: as for a call.
            patches: return the outputs of the patches, [images, patches, width], in row-major order, before pooling.
        """
        return self._arrays(self._patches if patches else self._features, images)

    def stream(self, images: Image | Iterable[Image], top: int | np.integer = TOP) -> Iterator[Prediction | Unreadable]:
        """Yields the predictions for each image, computed in batches, or `Unreadable` for one that cannot be read."""
        top = arguments.integer("top", top)
        for names, decoded, logits in self._outputs(self._apply, images):
            if not self._has_several_heads:
                logits = {next(iter(self.inputs.classes)): logits}
            for index, (name, image) in enumerate(zip(names, decoded, strict=True)):
                if isinstance(image, str):
                    yield Unreadable(name, image)
                else:
                    yield self._prediction(name, {head: rows[index] for head, rows in logits.items()}, top)

    @functools.cached_property
    def _apply(self) -> Callable[[Any, jax.Array], Any]:
        """The compiled function (parameters, uint8 images) -> logits."""
        if self.module.classes is None:
            raise UserError(
                f"{self._classifier.source}: {self._classifier.no_head}, so it cannot classify\n"
                "  use .features(images), or the weights of a classifier"
            )
        model, augment, loss = self.module, self._classifier.augment, self._classifier.loss

        def apply(parameters: Any, images: jax.Array) -> Any:
            views = [model.apply({"params": parameters}, view) for view in augment.views(images)]
            return losses.average_views(views, loss)

        return self._compile(apply)

    @functools.cached_property
    def _features(self) -> Callable[[Any, jax.Array], Any]:
        model, augment = self.module.clone(classes=None), self._classifier.augment

        def apply(parameters: Any, images: jax.Array) -> Any:
            return model.apply({"params": parameters}, augment.normalize(images))

        return self._compile(apply)

    @functools.cached_property
    def _patches(self) -> Callable[[Any, jax.Array], Any]:
        model, augment = self.module, self._classifier.augment

        def apply(parameters: Any, images: jax.Array) -> Any:
            patches = tokens.apply(model, parameters, augment.normalize(images))["patches"]
            return patches.reshape(len(images), -1, model.width)

        return self._compile(apply)

    def _compile(self, apply: Callable[[Any, jax.Array], Any]) -> Callable[[Any, jax.Array], Any]:
        return jax.jit(apply, out_shardings=sharding.replicated(self._mesh))

    def _arrays(self, apply: Callable[[Any, jax.Array], Any], images: Image | Iterable[Image]) -> Any:
        """Returns the outputs for all images, in float32; raises UserError if one cannot be read."""
        batch = jax.ShapeDtypeStruct((self._batch_size, *self.inputs.image_shape), np.uint8)
        outputs = jax.eval_shape(apply, self.parameters, batch)
        parts = [jax.tree.map(lambda leaf: np.zeros((0, *leaf.shape[1:]), np.float32), outputs)]
        for names, decoded, outputs in self._outputs(apply, _checked(images)):
            for name, image in zip(names, decoded, strict=True):
                if isinstance(image, str):
                    _refuse(name, image)
            real = slice(len(names))
            parts.append(jax.tree.map(lambda rows, real=real: rows[real].astype(np.float32), outputs))
        return jax.tree.map(lambda *rows: np.concatenate(rows), *parts)

    def _outputs(
        self, apply: Callable[[Any, jax.Array], Any], images: Iterable[Image]
    ) -> Iterator[tuple[list[str | int], list[UInt8[np.ndarray, "height width channels"] | str], Any]]:
        """Yields names, decoded images (or reasons) and outputs of each batch; the last outputs are padding."""
        for names, decoded in self._decode(images):
            batch = np.zeros((self._batch_size, *self.inputs.image_shape), np.uint8)
            for index, image in enumerate(decoded):
                if isinstance(image, np.ndarray):
                    batch[index] = image
            yield names, decoded, jax.device_get(apply(self.parameters, jax.device_put(batch, self._data_sharding)))

    def _decode(
        self, images: Iterable[Image]
    ) -> Iterator[tuple[list[str | int], list[UInt8[np.ndarray, "height width channels"] | str]]]:
        """Yields batches of names and images, decoded ahead of time; for an unreadable image, the reason."""
        numbered, pending = enumerate(user_images.each_image(images)), collections.deque()
        with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
            while True:
                while len(pending) <= _BATCHES_AHEAD and (chunk := list(itertools.islice(numbered, self._batch_size))):
                    names = [os.fspath(image) if isinstance(image, str | Path) else index for index, image in chunk]
                    jobs = [threads.submit(self._classifier.read, image) for _, image in chunk]
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
            probabilities = _TO_PROBABILITIES[self._classifier.loss](row.astype(np.float64))
            best = np.argsort(-probabilities, kind="stable")[:top]
            names = self.inputs.classes[head]
            heads[head] = tuple(Guess(names[index], float(probabilities[index])) for index in best)
        return Prediction(name, heads, logits)


def _checked(images: Image | Iterable[Image]) -> Iterator[Image]:
    """Yields each image, those of directories in their place; raises UserError at an array that cannot be an image."""
    several = enumerate(user_images.each_image(images))
    each = (expand([one]) if isinstance(one, str) else [user_images.checked(index, one)] for index, one in several)
    return itertools.chain.from_iterable(each)


def _refuse(image: str | int, reason: str) -> NoReturn:
    raise UserError(
        f"{image} cannot be read as an image: {reason}\n"
        "  leave it out, or use Predictor.stream, which yields Unreadable in its place"
    )


def _softmax(logits: Float[np.ndarray, "*rows classes"]) -> Float[np.ndarray, "*rows classes"]:
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def _sigmoid(logits: Float[np.ndarray, "*rows classes"]) -> Float[np.ndarray, "*rows classes"]:
    return np.exp(-np.logaddexp(0, -logits))


_TO_PROBABILITIES = {"softmax": _softmax, "sigmoid": _sigmoid}
