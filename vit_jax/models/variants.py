"""Published model sizes by name (arXiv 2010.11929, table 1; Ti and S as in arXiv 2106.10270): 'B/16' -> options."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vit_jax.arguments import shown
from vit_jax.errors import nearest
from vit_jax.models.block_config import options_that_affect
from vit_jax.models.pooling import POOLINGS

if TYPE_CHECKING:
    from vit_jax.models.vit import VisionTransformer

SIZES = {
    "Ti": {"width": 192, "depth": 12, "heads": 3, "mlp_width": 768},
    "S": {"width": 384, "depth": 12, "heads": 6, "mlp_width": 1536},
    "B": {"width": 768, "depth": 12, "heads": 12, "mlp_width": 3072},
    "L": {"width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096},
    "H": {"width": 1280, "depth": 32, "heads": 16, "mlp_width": 5120},
}

# The second number of a hybrid is the pixels per token: the reduction of the stem times the patch on its feature map.
# R50+B/16 has only the first three stages of R50, whose reduction is 16.
HYBRIDS = {
    "R+Ti/16": {"stem": (), "patch_size": 8, **SIZES["Ti"]},
    "R26+S/32": {"stem": (2, 2, 2, 2), "patch_size": 1, **SIZES["S"]},
    "R26+B/32": {"stem": (2, 2, 2, 2), "patch_size": 1, **SIZES["B"]},
    "R50+B/16": {"stem": (3, 4, 9), "patch_size": 1, **SIZES["B"]},
    "R50+L/32": {"stem": (3, 4, 6, 3), "patch_size": 1, **SIZES["L"]},
}

VARIANT_OPTIONS = (
    "patch_size",
    "width",
    "depth",
    "heads",
    "mlp_width",
    "stem",
    "stem_width",
)  # set by a variant's name


def fields(name: str) -> dict[str, Any]:
    """The options of `VisionTransformer` of a named variant: any size with any patch size, or a published hybrid.

    Raises:
        TypeError: the name is not a string.
        ValueError: the name is not a variant.
    """
    if not isinstance(name, str):
        raise TypeError(f"name is {shown(name)}\n  allowed: a string, such as 'B/16'")
    if name in HYBRIDS:
        return dict(HYBRIDS[name])
    match = re.fullmatch(r"([A-Za-z]+)/([1-9][0-9]*)", name)
    if match is None or match[1] not in SIZES:
        near = (nearest(name.split("/")[0], SIZES) or ["B"])[0]
        raise ValueError(
            f"{shown(name)} is not a variant: a size ({', '.join(SIZES)}), a slash and a patch size, such as "
            f"'{near}/16', or one of {', '.join(HYBRIDS)}"
        )
    return {**SIZES[match[1]], "patch_size": int(match[2])}


def fields_of_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `VisionTransformer` that the model section of a config describes, without classes and dtype.

    Raises:
        ValueError: as in `fields`.
    """
    options = {key: value for key, value in options.items() if value is not None and key != "dtype"}
    # By default there is a class token only if the pooling reads it.
    by_default = POOLINGS[options["pooling"]].needs_class_token
    made = {"class_token": by_default, **fields(options.pop("variant")), **options}
    return {**made, "pre_logits": made["width"]} if made.get("pre_logits") == "width" else made


def options_of(model: "VisionTransformer") -> dict[str, Any]:
    """The inverse of `fields_of_options`: the options of a config that describe a model's parameters and function.

    Options that only affect the head, training or execution are left out.

    Raises:
        ValueError: no variant has the model's stem.
    """
    own = {name: getattr(model, name) for name in SIZES["B"]}
    if model.stem is not None:
        alike = [name for name, sized in HYBRIDS.items() if (sized["stem"], sized["patch_size"]) == _stem_of(model)]
        if not alike:
            raise ValueError(f"no variant has a stem with {model.stem} units and {model.stem_width} channels")
        variant = min(alike, key=lambda name: abs(HYBRIDS[name]["width"] - model.width))
    else:
        size = next((name for name, sized in SIZES.items() if sized == own), "Ti")
        variant = f"{size}/{model.patch_size}"
    usual = fields(variant)
    sizes = {name: None if usual[name] == value else value for name, value in own.items()}
    class_token = None if model.class_token == POOLINGS[model.pooling].needs_class_token else model.class_token
    others = set(options_that_affect(model, "parameters", "function")) - {*VARIANT_OPTIONS, "class_token"}
    return {"variant": variant, **sizes, "class_token": class_token, **{name: getattr(model, name) for name in others}}


def _stem_of(model: "VisionTransformer") -> tuple[tuple[int, ...] | None, int]:
    return (model.stem if model.stem_width == type(model).stem_width else None), model.patch_size
