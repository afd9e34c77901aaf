"""From the model section of a config to a model."""

import math
from collections.abc import Mapping

import jax
from flax.typing import Dtype
from ml_collections import ConfigDict

from vit_jax.errors import UserError
from vit_jax.models import kernels, variants
from vit_jax.models.vit import VisionTransformer, token_grid
from vit_jax.training import hardware


def build(section: ConfigDict, classes: int | Mapping[str, int] | None, dtype: Dtype | None) -> VisionTransformer:
    """The model that `config.model` describes, for so many classes.

    Args:
        section: `config.model`.
        classes: number of logits; of several heads, by name; None for no head.
        dtype: arithmetic; None decides as `section.dtype` says, and takes the attention kernel for the device.

    Raises:
        ValueError: the fields contradict each other, or there is no such variant.
    """
    given = variants.fields_of_options(section.to_dict())
    if dtype is not None:  # of a device nothing may be known yet: a cluster must be joined first
        plain = "plain" if given["attention_kernel"] == "auto" else given["attention_kernel"]
        return VisionTransformer(classes=classes, dtype=dtype, **{**given, "attention_kernel": plain})
    dtype, product_dtype = hardware.arithmetic(section.dtype)
    if given["attention_kernel"] == "auto":
        size = given["width"] // given["heads"]
        given["attention_kernel"] = kernels.choose(jax.default_backend(), size, dtype)
    return VisionTransformer(classes=classes, dtype=dtype, product_dtype=product_dtype, **given)


def check_kernel(model: VisionTransformer, image_size: tuple[int, int]) -> None:
    """Raises UserError where `config.model.attention_kernel` cannot be had here, for images of that size."""
    tokens = math.prod(token_grid(model, image_size)) + model.class_token + model.registers
    size = model.width // model.heads
    reason = kernels.obstacle(model.attention_kernel, jax.default_backend(), tokens, size, model.dtype)
    if reason is not None:
        raise UserError(
            f"config.model.attention_kernel is {model.attention_kernel!r}: {reason}\n  allowed: 'auto', or 'plain'"
        )
