"""A linear classifier of features: the result of few-shot regression and of the linear probe."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Num

from vit_jax import arguments
from vit_jax.errors import UserError

MIN_STD = 1e-5  # added to every standard deviation, so that a constant feature becomes 0 and not infinite
_BLOCK = 8192  # examples per device call


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearClassifier:
    """Logits ((features - mean) / std) @ kernel + bias.

    Attributes:
        mean, std: of each feature, over the training examples.
        kernel: [width, classes], for standardized features.
        bias: [classes].
    """

    mean: Float[Array | np.ndarray, " width"]
    std: Float[Array | np.ndarray, " width"]
    kernel: Float[Array | np.ndarray, "width classes"]
    bias: Float[Array | np.ndarray, " classes"]

    def predict(
        self, features: Num[Array | np.ndarray, "examples width"] | Sequence[Sequence[float]]
    ) -> Int[np.ndarray, " examples"]:
        """Returns the class with the largest logit, the first one among equals; in blocks, to limit memory.

        Raises:
            UserError: the features have the wrong type or width.
        """
        features = arguments.matrix("features", features)
        if features.shape[1] != len(self.mean):
            raise UserError(f"features is {arguments.shown(features)}\n  allowed: a width of {len(self.mean)}")
        blocks = [features[start : start + _BLOCK] for start in range(0, len(features), _BLOCK)]
        return np.concatenate([np.asarray(_predict(self, np.asarray(block, np.float32))) for block in blocks])


def standardization(
    features: Float[np.ndarray, "examples width"],
) -> tuple[Float32[np.ndarray, " width"], Float32[np.ndarray, " width"]]:
    """Returns the mean and the standard deviation of each feature, with `MIN_STD` added to the latter."""
    mean, std = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    return mean.astype(np.float32), (std + MIN_STD).astype(np.float32)


def logits(
    classifier: LinearClassifier, features: Float[Array | np.ndarray, "examples width"]
) -> Float[Array, "examples classes"]:
    """Returns the logits, computed in float32 even where matmuls default to a lower precision."""
    standardized = (features - classifier.mean) / classifier.std
    return jnp.matmul(standardized, classifier.kernel, precision=jax.lax.Precision.HIGHEST) + classifier.bias


@jax.jit
def _predict(
    classifier: LinearClassifier, features: Float[Array | np.ndarray, "examples width"]
) -> Int[Array, " examples"]:
    return logits(classifier, features).argmax(axis=-1)
