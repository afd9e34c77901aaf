"""From the model section of a config to a model."""

from collections.abc import Mapping

import jax
from flax.typing import Dtype
from ml_collections import ConfigDict

from vit_jax.models import attention_backends, variants
from vit_jax.models.vit import VisionTransformer
from vit_jax.runtime import hardware


def build(section: ConfigDict, classes: int | Mapping[str, int] | None, dtype: Dtype | None) -> VisionTransformer:
    """The model that `config.model` describes, for so many classes.

    Its attention backend is one that runs anywhere, whatever `attention_kernel` says: `attention_choice.resolve` finds
    the one for a device and the model's shapes.

    Args:
        section: `config.model`.
        classes: number of logits; of several heads, by name; None for no head.
        dtype: compute dtype; None for what `section.dtype` says on the default device.

    Raises:
        ValueError: the fields contradict each other, or there is no such variant.
    """
    given = variants.fields_of_options(section.to_dict())
    if dtype is not None:  # before a cluster is joined, no device may be asked for
        kernel, dtypes = attention_backends.FALLBACK, {"dtype": dtype}
    else:
        dtypes = dict(zip(("dtype", "matmul_dtype"), hardware.compute_dtypes(section.dtype), strict=True))
        kernel = attention_backends.default(jax.default_backend())
    return VisionTransformer(classes=classes, **dtypes, **{**given, "attention_kernel": kernel})
