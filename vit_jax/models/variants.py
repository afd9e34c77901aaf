"""The published sizes by name (arXiv 2010.11929, table 1; Ti and S as in arXiv 2106.10270): 'B/16' -> fields."""

import difflib
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vit_jax.models.vit import VisionTransformer

SIZES = {
    "Ti": {"width": 192, "depth": 12, "heads": 3, "mlp_width": 768},
    "S": {"width": 384, "depth": 12, "heads": 6, "mlp_width": 1536},
    "B": {"width": 768, "depth": 12, "heads": 12, "mlp_width": 3072},
    "L": {"width": 1024, "depth": 24, "heads": 16, "mlp_width": 4096},
    "H": {"width": 1280, "depth": 32, "heads": 16, "mlp_width": 5120},
}

# A hybrid's second number is the pixels a token stands for: what the stem shrinks, times the patch on its feature map.
# R50+B/16 has R50's first three stages alone, and so stays at 16.
HYBRIDS = {
    "R+Ti/16": {"stem": (), "patch_size": 8, **SIZES["Ti"]},
    "R26+S/32": {"stem": (2, 2, 2, 2), "patch_size": 1, **SIZES["S"]},
    "R26+B/32": {"stem": (2, 2, 2, 2), "patch_size": 1, **SIZES["B"]},
    "R50+B/16": {"stem": (3, 4, 9), "patch_size": 1, **SIZES["B"]},
    "R50+L/32": {"stem": (3, 4, 6, 3), "patch_size": 1, **SIZES["L"]},
}

STEM_WIDTH = 64  # of all of them
# Options of a config that are fields of the model under the same name, and change its parameters or its function.
PLAIN = (
    *("registers", "pooling", "position", "position_at", "position_width", "mlp", "gelu", "qkv_bias", "qk_norm"),
    "position_grid",
    *("layer_scale", "parallel", "layer_norm_epsilon", "norm_after_pooling"),
)


def fields(name: str) -> dict[str, Any]:
    """The fields of `VisionTransformer` that a name stands for: any size with any patch size, or a published hybrid.

    Raises:
        ValueError: there is no such size or hybrid, or the name is not of that form.
    """
    if name in HYBRIDS:
        return dict(HYBRIDS[name])
    match = re.fullmatch(r"([A-Za-z]+)/([1-9][0-9]*)", name)
    if match is None or match[1] not in SIZES:
        near = difflib.get_close_matches(name.split("/")[0], SIZES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"{name!r} is no variant: a size ({', '.join(SIZES)}), a slash and a patch size, as '{near}/16', or one of "
            f"{', '.join(HYBRIDS)}"
        )
    return {**SIZES[match[1]], "patch_size": int(match[2])}


def fields_of_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `VisionTransformer`, but for classes and dtype, that the model section of a config stands for.

    Raises:
        ValueError: as in `fields`.
    """
    options = {key: value for key, value in options.items() if value is not None and key != "dtype"}
    sized = fields(options.pop("variant"))
    # A token that no head reads is a wasted one: there is one where the pooling needs it, unless asked for.
    return {"class_token": options["pooling"] == "token", **sized, **options}


def options_of(model: "VisionTransformer") -> dict[str, Any]:
    """The other way round: what the model section of a config says of a model's parameters and of what they compute.

    Rates, arithmetic and what is laid out otherwise only are left out, and so is the layer before the logits, which
    goes with the head.

    Raises:
        ValueError: no variant has its stem.
    """
    own = {name: getattr(model, name) for name in ("width", "depth", "heads", "mlp_width")}
    if model.stem is not None:
        alike = [name for name, sized in HYBRIDS.items() if (sized["stem"], sized["patch_size"]) == _stem_of(model)]
        if not alike:
            raise ValueError(f"no variant has a stem of {model.stem} units, {model.stem_width} wide")
        variant = min(alike, key=lambda name: abs(HYBRIDS[name]["width"] - model.width))
    else:
        size = next((name for name, sized in SIZES.items() if sized == own), "Ti")
        variant = f"{size}/{model.patch_size}"
    usual = fields(variant)
    sizes = {name: None if usual[name] == value else value for name, value in own.items()}
    class_token = None if model.class_token == (model.pooling == "token") else model.class_token
    return {"variant": variant, **sizes, "class_token": class_token, **{name: getattr(model, name) for name in PLAIN}}


def _stem_of(model: "VisionTransformer") -> tuple[tuple[int, ...] | None, int]:
    return (model.stem if model.stem_width == STEM_WIDTH else None), model.patch_size
