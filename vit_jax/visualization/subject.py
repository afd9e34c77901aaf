"""What a picture is of: a model, and images as it takes them."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Int, UInt8

from vit_jax import arguments
from vit_jax.classifier import Classifier
from vit_jax.data import listing
from vit_jax.errors import UserError
from vit_jax.models import intermediates
from vit_jax.models.intermediates import Intermediates
from vit_jax.models.vit import VisionTransformer, extra_tokens, token_grid
from vit_jax.progress import Counter
from vit_jax.visualization import maps

MAX_WEIGHT_BYTES = 2**28  # of the attention weights of a batch
MAX_BATCH = 64


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """A model and images.

    Attributes:
        model: with its preprocessing and class names.
        images: as `Classifier.read` returns them; None for a picture of the parameters.
        names: one line per image, such as its file name.
        title: of the model, in a few words.
    """

    model: Classifier
    images: UInt8[np.ndarray, "images height width channels"] | None
    names: tuple[str, ...] = ()
    title: str = ""

    @property
    def module(self) -> VisionTransformer:
        """The Vision Transformer."""
        return self.model.model

    @property
    def parameters(self) -> dict[str, Any]:
        """Of the module."""
        return self.model.parameters

    @property
    def extra(self) -> int:
        """Number of tokens before the patches."""
        return extra_tokens(self.module)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return token_grid(self.module, self.model.inputs.image_shape[:2])

    @property
    def tokens(self) -> int:
        """Number of tokens of an image."""
        return self.extra + self.grid[0] * self.grid[1]

    @property
    def is_classifier(self) -> bool:
        """Whether the model has a head that is applied to the image as a whole."""
        return self.module.classes is not None and self.module.pooling != "none"

    @property
    def batch_size(self) -> int:
        """Images per batch, so that the attention weights of a batch take at most `MAX_WEIGHT_BYTES`."""
        per_image = 4 * self.module.depth * self.module.heads * self.tokens**2
        return max(1, min(MAX_BATCH, MAX_WEIGHT_BYTES // per_image, len(self.images)))

    def check_layer(self, layer: Any) -> int:
        """Returns the index of a layer from 0.

        Raises:
            UserError: there is no such layer.
        """
        depth = self.module.depth
        index = arguments.integer("layer", layer, minimum=None)
        if not -depth <= index < depth:
            raise UserError(f"layer is {layer}\n  allowed: 0 to {depth - 1}, or -1 to -{depth} from the end")
        return index % depth

    def describe_layer(self, index: int) -> str:
        """Returns 'layer 2 of 0 to 6'."""
        return f"layer {index} of 0 to {self.module.depth - 1}"

    def query(self, patch: Any) -> tuple[str | int, str]:
        """Returns the query of `maps.of_query` and a description: a patch (row, column), or what the head reads.

        Raises:
            UserError: there is no such patch.
        """
        if patch is None:
            query = maps.query_of(self.module)
            return query, query
        if not isinstance(patch, list | tuple) or len(patch) != 2:
            raise UserError(f"patch is {arguments.shown(patch)}\n  allowed: a row and a column from 0, such as (3, 4)")
        row, column = (arguments.integer("patch", one, minimum=None) for one in patch)
        rows, columns = self.grid
        if not (0 <= row < rows and 0 <= column < columns):
            raise UserError(
                f"patch is {row},{column}\n  allowed: a row to {rows - 1} and a column to {columns - 1}, from 0"
            )
        return self.extra + row * columns + column, f"patch in row {row}, column {column}"

    def over_images(
        self,
        reduce: Callable[[Any, Intermediates], Any],
        mask: Bool[np.ndarray, "1 1 tokens tokens"] | None = None,
    ) -> Any:
        """Returns what `reduce` does of the outputs and intermediate arrays, for all images, in one pass.

        Args:
            reduce: from the outputs and intermediate arrays of a batch to a tree of arrays [batch, ...].
            mask: as `VisionTransformer.__call__` takes it.
        """
        mask = None if mask is None else jnp.asarray(mask)

        def apply(parameters: Any, inputs: jax.Array) -> Any:
            variables, inputs = {"params": parameters}, jax.lax.optimization_barrier(inputs)
            outputs, inside = intermediates.run(self.module, variables, inputs, mask)
            # The compiler must not compute only what is read of the weights, which would change their last bits.
            weights = [jax.lax.optimization_barrier(layer) for layer in inside.weights]
            return reduce(outputs, inside._replace(weights=weights))

        return self.compute(apply)

    def compute(self, apply: Callable[[Any, jax.Array], Any]) -> Any:
        """Returns the outputs of a function (parameters, normalized images) -> arrays [batch, ...] for all images."""
        size, count, parts = self.batch_size, len(self.images), []
        compiled = jax.jit(lambda parameters, images: apply(parameters, self.model.augment.normalize(images)))
        parameters = jax.device_put(self.parameters)
        with Counter("computing", count, "images") as counter:
            for start in range(0, count, size):
                ids = np.minimum(np.arange(start, start + size), count - 1)
                outputs = jax.device_get(compiled(parameters, self.images[ids]))
                parts.append(jax.tree.map(lambda array, start=start: array[: count - start], outputs))
                counter.add(min(size, count - start))
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

    def captions(self, outputs: Any = None, classes: Int[np.ndarray, " images"] | None = None) -> list[str]:
        """Returns the lines below the images: their names, and a class with its probability if there are outputs.

        Args:
            outputs: logits of all images, or by head.
            classes: their indices; None for the most probable ones.
        """
        lines = [listing.printable(name) for name in self.names] or [""] * len(self.images)
        if outputs is None or not self.is_classifier:
            return lines
        logits = first_head(outputs)
        logits = logits.astype(np.float64)
        classes = logits.argmax(axis=-1) if classes is None else classes
        if self.model.loss == "sigmoid":
            probabilities = np.exp(-np.logaddexp(0, -logits))
        else:
            probabilities = np.exp(logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True))
        names = next(iter(self.model.inputs.classes.values()))
        words = [f"class {name}" if name.isdecimal() else name for name in names]
        found = [f"{words[c]}, {100 * row[c]:.0f} %" for c, row in zip(classes, probabilities, strict=True)]
        return ["\n".join(filter(None, pair)) for pair in zip(lines, found, strict=True)]


def first_head(outputs: Any) -> Any:
    """Returns the logits of the first head."""
    return next(iter(outputs.values())) if isinstance(outputs, Mapping) else outputs
