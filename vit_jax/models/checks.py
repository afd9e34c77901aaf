"""Which fields of a model contradict each other: refused at construction, with what would be allowed."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vit_jax.models.activations import FORMS
from vit_jax.models.encoder import POLICIES, SCHEDULES
from vit_jax.models.mlp import MLPS
from vit_jax.models.pooling import POOLINGS
from vit_jax.models.positions import POSITIONS
from vit_jax.models.resnet import GROUPS

if TYPE_CHECKING:
    from vit_jax.models.vit import VisionTransformer

CHOICES = {
    "pooling": POOLINGS,
    "position": POSITIONS,
    "mlp": MLPS,
    "gelu": FORMS,
    "stochastic_depth_schedule": SCHEDULES,
}


def check(model: "VisionTransformer") -> None:
    """Raises ValueError, saying what would be allowed, for fields that no model can have, alone or together."""
    _check_numbers(model)
    _check_classes(model)
    for field, allowed in CHOICES.items():
        if getattr(model, field) not in allowed:
            raise ValueError(f"{field} is {getattr(model, field)!r}: one of {', '.join(allowed)}")
    if model.remat not in (False, *POLICIES):
        raise ValueError(f"remat is {model.remat!r}: one of none, full, dots, dots_no_batch")
    if model.width % model.heads:
        near = [heads for heads in range(1, model.width + 1) if model.width % heads == 0 and heads <= 2 * model.heads]
        raise ValueError(f"heads is {model.heads}, which does not divide the width {model.width}: {near} would")
    if model.pooling == "token" and not model.class_token:
        raise ValueError("pooling is 'token' but class_token is False: set class_token, or pool by 'mean'")
    if model.norm_after_pooling and model.pooling != "mean":
        raise ValueError(
            f"norm_after_pooling is True but pooling is {model.pooling!r}: only after a mean is it another thing than "
            "before; leave it out, or set pooling to 'mean'"
        )
    if model.mlp == "swiglu" and model.gelu != "tanh":
        raise ValueError(
            f"gelu is {model.gelu!r} but mlp is 'swiglu', which has none: leave gelu, or set mlp to 'gelu'"
        )
    _check_stem(model)
    _check_position(model)


def _check_numbers(model: "VisionTransformer") -> None:
    for field in ("patch_size", "width", "depth", "heads", "mlp_width"):
        if getattr(model, field) < 1:
            raise ValueError(f"{field} is {getattr(model, field)}: it must be at least 1")
    for field in ("registers", "position_width"):
        if getattr(model, field) < 0:
            raise ValueError(f"{field} is {getattr(model, field)}: it must be at least 0")
    for field in ("dropout", "attention_dropout", "stochastic_depth"):
        if not 0 <= getattr(model, field) < 1:
            raise ValueError(f"{field} is {getattr(model, field)}: a rate is at least 0 and below 1")
    if model.layer_norm_epsilon <= 0:
        raise ValueError(f"layer_norm_epsilon is {model.layer_norm_epsilon}: it must be above 0")
    if model.layer_scale is not None and model.layer_scale <= 0:
        raise ValueError(f"layer_scale is {model.layer_scale}: a value above 0, or None for no layer scale")
    if model.pre_logits is not None and model.pre_logits < 1:
        raise ValueError(f"pre_logits is {model.pre_logits}: a width of at least 1, or None for no such layer")


def _check_classes(model: "VisionTransformer") -> None:
    if model.classes is None:
        return
    named = isinstance(model.classes, Mapping)
    heads = model.classes if named else {"": model.classes}
    if not heads:
        raise ValueError("classes is an empty mapping: name at least one head, or give None for features alone")
    for name, count in heads.items():
        if named and (not isinstance(name, str) or not name.isidentifier()):
            raise ValueError(f"classes has a head named {name!r}: letters, digits and underscores make a name")
        if count < 1:
            raise ValueError(f"classes{f' of {name!r}' if named else ''} is {count}: it must be at least 1")


def _check_stem(model: "VisionTransformer") -> None:
    if model.stem is None:
        if model.stem_width != type(model).stem_width:
            raise ValueError(f"stem_width is {model.stem_width} but there is no stem: set stem, as (3, 4, 6, 3), too")
        return
    if any(units < 1 for units in model.stem):
        raise ValueError(f"stem is {model.stem}: every stage has at least 1 unit; () is a stem without stages")
    if model.stem_width < 1 or model.stem_width % GROUPS:
        raise ValueError(f"stem_width is {model.stem_width}: a multiple of {GROUPS}, the groups of its normalisation")


def _check_position(model: "VisionTransformer") -> None:
    kind, name = POSITIONS[model.position], f"position is {model.position!r}"
    if model.position_at is not None and model.position_at not in kind.at:
        raise ValueError(f"position_at is {model.position_at!r} but {name}, which acts at: {', '.join(kind.at)}")
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
    if model.position_grid is not None and (model.position != "sincos_2d" or model.position_grid < 1):
        raise ValueError(
            f"position_grid is {model.position_grid} and {name}: at least 1, and with 'sincos_2d' alone; or None"
        )
    width = model.position_width or model.width
    if width % kind.width_multiple:
        raise ValueError(f"{name}, whose table must be a multiple of {kind.width_multiple} wide, not {width}")
    size = model.width // model.heads
    if size % kind.head_multiple:
        near = [h for h in range(1, model.width + 1) if model.width % (h * kind.head_multiple) == 0]
        raise ValueError(
            f"{name}, which needs heads of a multiple of {kind.head_multiple} channels, but {model.heads} heads of a "
            f"width of {model.width} have {size}: " + (f"{near} heads would" if near else "no number of heads would do")
        )


def check_encoder(backbone: "VisionTransformer", positions_at_input: bool = False) -> None:
    """Raises ValueError for a model that pre-training by masking cannot have as its encoder.

    Args:
        backbone: the model.
        positions_at_input: whether its positions must not act in the layers.
    """
    if backbone.classes is not None or backbone.pooling != "none":
        raise ValueError(
            f"classes is {backbone.classes} and pooling {backbone.pooling!r}: an encoder has all of its tokens come "
            "out, with classes None and pooling 'none'"
        )
    if backbone.stem is not None:
        raise ValueError(f"stem is {backbone.stem}: what a patch of its feature map has seen cannot be hidden from it")
    at = backbone.position_at or POSITIONS[backbone.position].at[0]
    if positions_at_input and at != "input":
        allowed = ", ".join(name for name, kind in POSITIONS.items() if "input" in kind.at)
        raise ValueError(
            f"position is {backbone.position!r}, which acts at {at!r} and so needs all patches: one of {allowed}, at "
            "'input', lets some be seen alone"
        )
