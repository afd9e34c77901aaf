"""From the model section of a config to a model."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from ml_collections import ConfigDict

from vit_jax.models import variants
from vit_jax.models.vit import VisionTransformer


def build(section: ConfigDict, classes: int | Mapping[str, int], dtype: Dtype | None) -> VisionTransformer:
    """The model that `config.model` describes, for so many classes.

    Args:
        section: `config.model`.
        classes: number of logits; of several heads, by name.
        dtype: arithmetic; None decides as `section.dtype` says.

    Raises:
        ValueError: the fields contradict each other, or there is no such variant.
    """
    if dtype is None:
        dtype = arithmetic(section.dtype)
    return VisionTransformer(classes=classes, dtype=dtype, **variants.fields_of_options(section.to_dict()))


def arithmetic(name: str) -> Dtype:
    """The dtype that a config's name stands for; 'auto' is float32 on CPU and bfloat16 elsewhere."""
    if name == "auto":
        return jnp.dtype("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return jnp.dtype(name)
