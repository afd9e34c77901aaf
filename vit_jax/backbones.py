"""Models without their heads: pictures or normalized images in, output tokens of one or several blocks out."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from vit_jax import arguments, inference, weights, zero_shot
from vit_jax.data.user_images import Image
from vit_jax.errors import UserError
from vit_jax.evaluation import tokens
from vit_jax.evaluation.tokens import Layers
from vit_jax.inference import Classifier, Predictor, Unreadable
from vit_jax.models.vit import token_grid
from vit_jax.weights import hub, native

# By kind: 'patches' [..., rows, columns, width], 'class' and 'pooled' [..., width]; see `tokens.apply`.
Tokens = dict[str, Float[Array | np.ndarray, "..."]]


def classifier(
    source: str | bytes | os.PathLike, step: int | np.integer | str | None = None, **of_weights: Any
) -> Classifier:
    """Returns the model of a run or of weights, also without a head, with its preprocessing.

    Args:
        source: a run directory; or weights: a file, directory, URL, or the name of a published model.
        step: for a run, as for `inference.of_run`.
        **of_weights: for weights, arguments of `zero_shot.of_file`.

    Raises:
        UserError: the source does not exist or cannot be read, or does not match the other arguments.
    """
    source = arguments.path("source", source)
    if not native.recognise(Path(hub.fetch(source))):
        if step is not None:
            raise UserError(f"step is {step!r}, but {source} is not a run\n  omit step, or use a run directory")
        return zero_shot.of_file(source, **of_weights, needs_head=False)
    if wrong := [name for name, value in of_weights.items() if value is not None]:
        raise UserError(f"{wrong[0]} cannot be combined with the run {source}, which has its own\n  omit {wrong[0]}")
    return inference.of_run(source, step, needs_head=False)


class Backbone:
    """Returns the output tokens of images.

    Attributes:
        module: the Vision Transformer; a head that it has is not applied.
        parameters: of the module, on the devices.
        inputs: the shape to which pictures are resized, and the mean and std by which they are normalized.
    """

    def __init__(
        self,
        source: Classifier,
        *,
        image_size: tuple[int, int] | None = None,
        batch_size: int | np.integer = inference.BATCH_SIZE,
    ):
        """Puts the parameters on the devices.

        Args:
            source: the model and its preprocessing, of `classifier`.
            image_size: height and width to which pictures are resized; None for those of the model.
            batch_size: pictures per batch, rounded up to a multiple of the number of devices.

        Raises:
            UserError: the patch size does not divide the image size, or an argument has the wrong type.
        """
        height, width, channels = source.inputs.image_shape
        self._grid, self._resampling = token_grid(source.model, (height, width)), source.resampling
        shape = (*(image_size or (height, width)), channels)
        source = dataclasses.replace(source, inputs=dataclasses.replace(source.inputs, image_shape=shape))
        self._augment, self._description = source.augment, source.source
        self._predictor = Predictor(source, batch_size=batch_size)
        self.module, self.parameters, self.inputs = source.model, self._predictor.parameters, source.inputs
        self._check_size(*shape[:2])
        self._compiled = jax.jit(self._apply, static_argnums=(2, 3))
        self._programs: dict[tuple[tuple[int, ...], bool], Callable[[Any, jax.Array], Tokens]] = {}

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width to which pictures are resized."""
        return self.inputs.image_shape[:2]

    def __repr__(self) -> str:
        model, (height, width, channels) = self.module, self.inputs.image_shape
        size = f"patch {model.patch_size}, width {model.width}, depth {model.depth}"
        return f"<backbone of {self._description}: {size}; images of {height}x{width}x{channels}>"

    def __call__(
        self,
        images: Float[Array | np.ndarray, "batch height width channels"] | Image | Iterable[Image],
        layers: Layers = None,
        dense: bool | np.bool_ = True,
    ) -> Tokens:
        """Returns tokens in float32, by kind: 'patches', 'class' and 'pooled', as `tokens.apply` describes them.

        They are [batch, rows, columns, width] and twice [batch, width]; with `layers`, [layers, batch, ...].

        Args:
            images: an array of floats [batch, height, width, channels], which are normalized already and may have any
                size that the patch size divides: learned positions are resampled, and the results are arrays of JAX,
                also within `jax.jit` and `jax.grad`. Or pictures, as for `Predictor`: paths, images of Pillow, uint8
                arrays; they are resized and normalized, and the results are NumPy arrays.
            layers: indices of blocks, such as [-4, -1]; None for the last one, without the axis of layers.
            dense: whether to return 'patches'.

        Raises:
            UserError: an image cannot be read or has the wrong shape, there is no such layer, or an argument has the
                wrong type.
        """
        chosen, dense = tokens.check_layers(layers, self.module.depth), arguments.boolean("dense", dense)
        if jnp.issubdtype(getattr(images, "dtype", np.dtype(object)), jnp.floating):
            return self._of_normalized(images, chosen if layers is not None else None, dense)
        apply = self._of_pictures(chosen, dense)
        arrays = {name: np.moveaxis(array, 1, 0) for name, array in self._predictor._arrays(apply, images).items()}
        return arrays if layers is not None else {name: array[0] for name, array in arrays.items()}

    def stream(
        self, images: Iterable[Image], layers: Layers = None, dense: bool | np.bool_ = True
    ) -> Iterator[tuple[str | int, Tokens] | Unreadable]:
        """Yields each picture's path or index and its tokens [layers, ...], computed in batches.

        Pictures that cannot be read are yielded as `Unreadable`. There is always an axis of layers.
        """
        apply = self._of_pictures(tokens.check_layers(layers, self.module.depth), arguments.boolean("dense", dense))
        for names, decoded, outputs in self._predictor._outputs(apply, images):
            for index, (name, image) in enumerate(zip(names, decoded, strict=True)):
                if isinstance(image, str):
                    yield Unreadable(name, image)
                else:
                    yield name, {kind: array[index] for kind, array in outputs.items()}

    def _of_normalized(self, images: Any, layers: tuple[int, ...] | None, dense: bool) -> Tokens:
        channels = self.inputs.image_shape[2]
        if images.ndim != 4 or images.shape[3] != channels:
            raise UserError(
                f"images is {arguments.shown(images)}\n"
                f"  allowed: normalized images [batch, height, width, {channels}], or uint8 arrays, paths, ..."
            )
        self._check_size(*images.shape[1:3])
        if not isinstance(images, jax.core.Tracer):
            images = jax.device_put(images, jax.tree.leaves(self.parameters)[0].sharding)
        return self._compiled(self.parameters, images, layers, dense)

    def _of_pictures(self, layers: tuple[int, ...], dense: bool) -> Callable[[Any, jax.Array], Tokens]:
        """The compiled function (parameters, uint8 images) -> tokens [batch, layers, ...]."""
        if (layers, dense) in self._programs:
            return self._programs[layers, dense]

        def apply(parameters: Any, images: jax.Array) -> Tokens:
            found = self._apply(parameters, self._augment.normalize(images), layers, dense)
            return {name: jnp.moveaxis(array, 0, 1) for name, array in found.items()}

        return self._programs.setdefault((layers, dense), self._predictor._compile(apply))

    def _apply(self, parameters: Any, images: jax.Array, layers: tuple[int, ...] | None, dense: bool) -> Tokens:
        return tokens.apply(self.module, parameters, images, layers, dense, self._grid, self._resampling)

    def _check_size(self, height: int, width: int) -> None:
        try:
            token_grid(self.module, (height, width))
        except ValueError as error:
            raise UserError(f"images of {height}x{width}: {error}\n  use a size that the patches divide") from None


def load(
    source: str | bytes | os.PathLike,
    *,
    step: int | np.integer | str | None = None,
    image_size: int | np.integer | tuple[int, int] | None = None,
    normalize: str | None = None,
    batch_size: int | np.integer = inference.BATCH_SIZE,
) -> Backbone:
    """Returns the backbone of a run or of weights; arguments and errors as for `vit_jax.backbone`."""
    size = None if image_size is None else arguments.pair("image_size", image_size)
    source = arguments.path("source", source)
    is_run = native.recognise(Path(hub.fetch(source)))
    if is_run:
        return Backbone(classifier(source, step, normalize=normalize), image_size=size, batch_size=batch_size)
    # The positions stay those of the file, to be resampled once; pictures get the size that it records.
    described = weights.recognise(source)
    recorded = described.evaluation.get("input_size")
    found = classifier(source, step, image_size=described.image_size() or size, normalize=normalize)
    return Backbone(found, image_size=size or (recorded and tuple(recorded)), batch_size=batch_size)
