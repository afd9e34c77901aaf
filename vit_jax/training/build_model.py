"""Builds the model that the model section of a config describes."""

from collections.abc import Mapping

import jax
from flax.typing import Dtype
from ml_collections import ConfigDict

from vit_jax.models import attention_backends, variants
from vit_jax.models.vit import VisionTransformer
from vit_jax.runtime import hardware


def build(section: ConfigDict, classes: int | Mapping[str, int] | None, dtype: Dtype | None) -> VisionTransformer:
    """Returns the model that `config.model` describes.

    Its attention backend is the default of the platform, whatever `attention_kernel` says: `attention_choice.resolve`
    chooses one for a device and the model's shapes.

    Args:
        section: `config.model`.
        classes: number of logits; a mapping from names to numbers for several heads; None for no head.
        dtype: compute dtype; None for that of `section.dtype` on the default device.

    Raises:
        ValueError: options contradict each other, or the variant is unknown.
    """
    fields = variants.fields_of_options(section.to_dict())
    if dtype is not None:  # devices must not be queried before the cluster is joined
        kernel, dtypes = attention_backends.FALLBACK, {"dtype": dtype}
    else:
        dtypes = dict(zip(("dtype", "matmul_dtype"), hardware.compute_dtypes(section.dtype), strict=True))
        kernel = attention_backends.default(jax.default_backend())
    return VisionTransformer(classes=classes, **dtypes, **{**fields, "attention_kernel": kernel})
