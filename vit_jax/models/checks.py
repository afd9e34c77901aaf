"""Checks of a model's options, at construction."""

import dataclasses
import math
import operator
import types
import typing
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from vit_jax.models.activations import FORMS
from vit_jax.models.attention_backends import BACKENDS
from vit_jax.models.encoder import POLICIES, SCHEDULES
from vit_jax.models.mlp import MLPS
from vit_jax.models.norm import NORMS
from vit_jax.models.pooling import POOLINGS
from vit_jax.models.positions import POSITIONS, where_applied
from vit_jax.models.resnet import GROUPS

CHOICES = {
    "attention_kernel": BACKENDS,
    "pooling": POOLINGS,
    "position": POSITIONS,
    "mlp": MLPS,
    "gelu": FORMS,
    "norm": NORMS,
    "input_norm": (None, "patches", "tokens"),
    "stochastic_depth_schedule": SCHEDULES,
}


KINDS = {
    int: "an integer",
    float: "a number",
    bool: "True or False",
    str: "a string",
    Mapping: "a mapping from names to integers",
    types.NoneType: "None",
}


def convert(module: Any) -> None:
    """Replaces NumPy's numbers and booleans among the fields of a module by Python's, and checks all types.

    Modules are compared, hashed and shown by their fields, so that equal ones must have fields of equal types.

    Raises:
        TypeError: a field has a value of another type; the message says which is allowed.
    """
    for field in dataclasses.fields(module):
        kinds = typing.get_args(field.type) if isinstance(field.type, types.UnionType) else (field.type,)
        scalars = {int, float, bool, str}.intersection(kinds)
        if not scalars:
            continue
        value = getattr(module, field.name)
        if isinstance(value, np.generic) or (hasattr(value, "item") and getattr(value, "shape", None) == ()):
            value = value.item()
            setattr(module, field.name, value)
        if float in scalars and isinstance(value, int) and not isinstance(value, bool):
            continue
        others = tuple(typing.get_origin(kind) or kind for kind in kinds)
        if not isinstance(value, others) or (isinstance(value, bool) and bool not in scalars):
            raise TypeError(f"{field.name} is {value!r}\n  allowed: {', or '.join(KINDS[kind] for kind in others)}")


def integer_of(name: str, value: Any) -> int:
    """Returns an integer of Python's for one of Python or NumPy.

    Raises:
        TypeError: it is no integer.
    """
    if isinstance(value, bool | np.bool_) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} is {value!r}\n  allowed: an integer")
    return operator.index(value)


def check(model: Any) -> None:
    """Raises ValueError, saying what is allowed, if an option is out of range or options contradict each other."""
    _check_numbers(model)
    _check_classes(model)
    for field, allowed in CHOICES.items():
        if getattr(model, field) not in allowed:
            raise ValueError(f"{field} is {getattr(model, field)!r}: one of {', '.join(map(str, allowed))}")
    if model.remat not in (False, *POLICIES):
        raise ValueError(f"remat is {model.remat!r}: one of none, full, dots, dots_no_batch")
    if model.width % model.heads:
        near = [heads for heads in range(1, model.width + 1) if model.width % heads == 0 and heads <= 2 * model.heads]
        raise ValueError(f"heads is {model.heads}, which does not divide the width {model.width}: {near} do")
    _check_pooling(model)
    if not MLPS[model.mlp].uses_gelu and model.gelu != type(model).gelu:
        raise ValueError(
            f"gelu is {model.gelu!r} but mlp is {model.mlp!r}, which has no GELU: leave gelu out, or set mlp to 'gelu'"
        )
    _check_stem(model)
    _check_position(model)


def _check_pooling(model: Any) -> None:
    kind = POOLINGS[model.pooling]
    if kind.needs_class_token and not model.class_token:
        raise ValueError(f"pooling is {model.pooling!r} but class_token is False: set class_token, or pool by 'mean'")
    if kind.needs_register and not model.registers:
        raise ValueError(f"pooling is {model.pooling!r} but registers is 0: it must be at least 1, or pool by 'token'")
    if model.pool_heads is not None and model.pooling != "map":
        raise ValueError(
            f"pool_heads is {model.pool_heads} but pooling is {model.pooling!r}: leave pool_heads out, or pool by 'map'"
        )
    if model.pool_heads is not None and (model.pool_heads < 1 or model.width % model.pool_heads):
        raise ValueError(f"pool_heads is {model.pool_heads}: it must be a divisor of the width {model.width}, or None")
    if model.norm_after_pooling and not model.final_norm:
        raise ValueError("norm_after_pooling is True but final_norm is False: set one of them to its default")
    if model.norm_after_pooling and model.pooling != "mean":
        raise ValueError(
            f"norm_after_pooling is True but pooling is {model.pooling!r}: it only makes a difference with 'mean'; "
            "leave it out, or set pooling to 'mean'"
        )


def _check_numbers(model: Any) -> None:
    for field in ("patch_size", "width", "depth", "heads", "mlp_width"):
        if getattr(model, field) < 1:
            raise ValueError(f"{field} is {getattr(model, field)}: it must be at least 1")
    for field in ("registers", "position_width"):
        if getattr(model, field) < 0:
            raise ValueError(f"{field} is {getattr(model, field)}: it must be at least 0")
    for field in ("dropout", "attention_dropout", "stochastic_depth"):
        if not 0 <= getattr(model, field) < 1:
            raise ValueError(f"{field} is {getattr(model, field)}: a rate must be at least 0 and below 1")
    for field in ("dtype", "matmul_dtype"):
        _check_dtype(field, getattr(model, field))
    if not 0 < model.layer_norm_epsilon < math.inf:
        raise ValueError(f"layer_norm_epsilon is {model.layer_norm_epsilon}: it must be greater than 0")
    if model.layer_scale is not None and not 0 < model.layer_scale < math.inf:
        raise ValueError(f"layer_scale is {model.layer_scale}: it must be greater than 0, or None for no layer scale")
    if model.pre_logits is not None and model.pre_logits < 1:
        raise ValueError(f"pre_logits is {model.pre_logits}: it must be at least 1, or None for no such layer")


def _check_dtype(field: str, value: Any) -> None:
    try:
        is_float = value is None or jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        is_float = False
    if not is_float or (value is None and field == "dtype"):
        raise ValueError(f"{field} is {value!r}: a floating-point dtype, such as float32 or bfloat16")


def _check_classes(model: Any) -> None:
    if model.classes is None:
        return
    named = isinstance(model.classes, Mapping)
    heads = model.classes if named else {"": model.classes}
    if not heads:
        raise ValueError("classes is an empty mapping: name at least one head, or use None for features only")
    for name, count in heads.items():
        if named and (not isinstance(name, str) or not name.isidentifier()):
            raise ValueError(f"classes has a head named {name!r}: a name consists of letters, digits and underscores")
        if count < 1:
            raise ValueError(f"classes{f' of {name!r}' if named else ''} is {count}: it must be at least 1")


def _check_stem(model: Any) -> None:
    if model.stem is None:
        if model.stem_width != type(model).stem_width:
            raise ValueError(
                f"stem_width is {model.stem_width} but there is no stem: set stem too, for example to (3, 4, 6, 3)"
            )
        return
    if any(units < 1 for units in model.stem):
        raise ValueError(f"stem is {model.stem}: every stage needs at least 1 unit; () is a stem without stages")
    if model.stem_width < 1 or model.stem_width % GROUPS:
        raise ValueError(
            f"stem_width is {model.stem_width}: it must be a multiple of {GROUPS}, the groups of its GroupNorm"
        )


def _check_position(model: Any) -> None:
    kind, name = POSITIONS[model.position], f"position is {model.position!r}"
    if model.position_at is not None and model.position_at not in kind.at:
        raise ValueError(
            f"position_at is {model.position_at!r} but {name}, which can be applied at: {', '.join(kind.at)}"
        )
    if model.position_width:
        fixed = [key for key, value in POSITIONS.items() if value.fixed and "input" in value.at]
        if model.position not in fixed or model.position_at not in (None, "input"):
            raise ValueError(
                f"position_width is {model.position_width}, for a table concatenated at the input, but {name}"
                f"{f' and position_at {model.position_at!r}' if model.position in fixed else ''}: "
                f"{', '.join(fixed)} at the input can be concatenated; 0 adds the table instead"
            )
        if model.position_width >= model.width:
            raise ValueError(f"position_width is {model.position_width}: it must be below the width, {model.width}")
    if kind.needs_class_token and not model.class_token:
        raise ValueError(f"{name} but class_token is False: set class_token, or use another position embedding")
    if model.position_grid is not None and (not kind.takes_grid or model.position_grid < 1):
        allowed = ", ".join(key for key, value in POSITIONS.items() if value.takes_grid)
        raise ValueError(
            f"position_grid is {model.position_grid} and {name}: it must be at least 1, and None unless position is "
            f"one of {allowed}"
        )
    width = model.position_width or model.width
    if width % kind.width_multiple:
        raise ValueError(f"{name}, whose table needs a width that is a multiple of {kind.width_multiple}, not {width}")
    size = model.width // model.heads
    if size % kind.head_multiple:
        near = [h for h in range(1, model.width + 1) if model.width % (h * kind.head_multiple) == 0]
        raise ValueError(
            f"{name}, which needs a multiple of {kind.head_multiple} channels per head, but {model.heads} heads of a "
            f"width of {model.width} have {size}: "
            + (f"{near} heads would work" if near else "no number of heads works")
        )


def check_encoder(backbone: Any, positions_at_input: bool = False) -> None:
    """Raises ValueError if a model cannot be the encoder in masked pre-training.

    Args:
        backbone: the model.
        positions_at_input: whether its position embedding must be applied at the input.
    """
    if backbone.classes is not None or backbone.pooling != "none":
        raise ValueError(
            f"classes is {backbone.classes} and pooling {backbone.pooling!r}: an encoder must return all tokens, with "
            "classes None and pooling 'none'"
        )
    if backbone.stem is not None:
        raise ValueError(
            f"stem is {backbone.stem}: patches of its feature map overlap in the image; use no stem, as in B/16"
        )
    at = where_applied(backbone.position, backbone.position_at)
    if positions_at_input and (at != "input" or POSITIONS[backbone.position].angles is not None):
        allowed = ", ".join(name for name, kind in POSITIONS.items() if "input" in kind.at and kind.angles is None)
        raise ValueError(
            f"position is {backbone.position!r}, applied at {at!r}, which needs all patches: to encode only some, "
            f"use one of {allowed} at 'input'"
        )
