"""A linear classifier of features: what few-shot regression and the linear probe both end in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

LEAST_STD = 1e-5  # added, so that a feature that never changes is none, and not infinite
_BLOCK = 8192  # examples at a time on the device


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LinearClassifier:
    """Logits ((features - mean) / std) @ kernel + bias.

    Attributes:
        mean, std: of each feature, over the examples that it was fitted to.
        kernel: [width, classes], on standardised features.
        bias: [classes].
    """

    mean: Float[Array | np.ndarray, " width"]
    std: Float[Array | np.ndarray, " width"]
    kernel: Float[Array | np.ndarray, "width classes"]
    bias: Float[Array | np.ndarray, " classes"]

    def predict(self, features: Float[np.ndarray, "examples width"]) -> Int[np.ndarray, " examples"]:
        """The class with the largest logit, of equal ones the first; in blocks, so that memory stays small."""
        parts = [features[start : start + _BLOCK] for start in range(0, len(features), _BLOCK)]
        return np.concatenate([np.asarray(_predict(self, np.asarray(part, np.float32))) for part in parts])


def standardisation(
    features: Float[np.ndarray, "examples width"],
) -> tuple[Float32[np.ndarray, " width"], Float32[np.ndarray, " width"]]:
    """Mean and standard deviation of each feature, `LEAST_STD` added to the latter."""
    mean, std = features.mean(axis=0, dtype=np.float64), features.std(axis=0, dtype=np.float64)
    return mean.astype(np.float32), (std + LEAST_STD).astype(np.float32)


def logits(
    classifier: LinearClassifier, features: Float[Array | np.ndarray, "examples width"]
) -> Float[Array, "examples classes"]:
    """The logits, in float32 throughout, also where the device would rather multiply in less."""
    standardised = (features - classifier.mean) / classifier.std
    return jnp.matmul(standardised, classifier.kernel, precision=jax.lax.Precision.HIGHEST) + classifier.bias


@jax.jit
def _predict(
    classifier: LinearClassifier, features: Float[Array | np.ndarray, "examples width"]
) -> Int[Array, " examples"]:
    return logits(classifier, features).argmax(axis=-1)
