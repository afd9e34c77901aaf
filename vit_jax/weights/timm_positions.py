"""The position embedding of a file with timm's names, from its arrays and the architecture in its config.json."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from vit_jax.errors import UserError
from vit_jax.weights.describe import pair
from vit_jax.weights.rules import Parts
from vit_jax.weights.timm_rules import Spelling

# Rows (and columns) of the grid of the coordinates, by the architecture: that of pre-training.
_GRIDS = {r"vit_pe_core_base": 14, r"vit_pe_core_(tiny|small|large)": 24, r"vit_pe_": 32}
_EVA02_GRID = 16

# timm's arguments of a rotary position embedding, for each kind of ours.
_CAT = {"use_rot_pos_emb": True, "rope_type": "cat", "rope_rotate_half": False}
_ARGUMENTS = {
    "rotary": {**_CAT, "rope_temperature": 100, "rope_grid_indexing": "xy", "rope_grid_offset": 0},
    "eva02": {**_CAT, "rope_temperature": 10_000, "rope_grid_indexing": "ij", "rope_grid_offset": 0},
    "pe": {**_CAT, "rope_temperature": 10_000, "rope_grid_indexing": "xy", "rope_grid_offset": 1},
    "dinov3": {"use_rot_pos_emb": True, "rope_type": "dinov3", "rope_rotate_half": True}
    | {"rope_temperature": 100, "rope_grid_indexing": "ij", "rope_grid_offset": 0},
}


@dataclasses.dataclass(frozen=True)
class Implied:
    """A position embedding that a file's arrays imply.

    Attributes:
        position: as in `VisionTransformer`.
        grid: rows and columns of the grid of its coordinates; None for that of the images.
        is_open: whether other models have the same arrays with another position embedding.
    """

    position: str
    grid: int | None = None
    is_open: bool = False


def implied(parts: Parts, spelling: Spelling, side: int | None, recorded: Mapping[str, Any]) -> Implied | None:
    """The position embedding that a file's arrays imply; None if they imply none.

    Args:
        parts: of the file.
        spelling: of its names.
        side: rows (and columns) of patches of its table; None without a table, or if it is not square.
        recorded: what its config.json says: 'architecture', 'arguments' and 'positions'.

    Raises:
        UserError: config.json has a rotary position embedding that is not supported.
    """
    if recorded.get("positions") is False:
        return Implied("none")
    arguments, read = recorded.get("arguments", {}), _with_table if parts.positions else _without_table
    found = read(parts, spelling, side, recorded.get("architecture", ""))
    _check_arguments(found, arguments)
    if found is None or "ref_feat_shape" not in arguments:
        return found
    grid = pair(arguments["ref_feat_shape"])
    if found.position.removeprefix("learned_") not in ("eva02", "pe") or grid is None or grid[0] != grid[1]:
        raise UserError(
            f"config.json has ref_feat_shape {arguments['ref_feat_shape']!r}, which is not supported for these arrays\n"
            "  use a model of docs/weights.md"
        )
    return dataclasses.replace(found, grid=grid[0])


def _with_table(parts: Parts, spelling: Spelling, side: int | None, architecture: str) -> Implied:
    gated = parts.mlp == "swiglu"
    if spelling.qkv == "apart" or (spelling.bias == "query_value" and gated) or architecture.startswith("eva02_"):
        return Implied("learned_eva02", _EVA02_GRID)
    is_pe = architecture == "" or "_pe_" in architecture
    if is_pe and parts.input_norm == "tokens" and (parts.map or not parts.final_norm):
        grid = next((grid for pattern, grid in _GRIDS.items() if re.match(pattern, architecture)), side)
        return Implied("learned_pe", grid)
    if re.match(r".*_rope_ape_", architecture):
        return Implied("learned_rotary")
    # DeiT III's files and those of a ViT with both a table and a rotation (arXiv 2403.13298) have the same names.
    return Implied("learned", is_open=spelling.scale.startswith("gamma") and spelling.rows == "none")


def _without_table(parts: Parts, spelling: Spelling, side: None, architecture: str) -> Implied | None:
    if spelling.relative is not None:
        return Implied("relative_class")
    if "dinov3" in architecture:
        return Implied("dinov3")
    if not parts.layer_scale:
        return None
    if parts.registers:
        return Implied("dinov3") if parts.class_token else Implied("eva02", _EVA02_GRID)
    return Implied("rotary") if parts.class_token and spelling.scale.startswith("gamma") else None


def _check_arguments(found: Implied | None, arguments: Mapping[str, Any]) -> None:
    kind = None if found is None else found.position.removeprefix("learned_")
    expected = _ARGUMENTS.get(kind, {"use_rot_pos_emb": False}) | {"use_post_norm": False}
    for key, value in expected.items():
        if arguments.get(key, value) != value:
            raise UserError(
                f"config.json has {key} {arguments[key]!r}, but by its arrays the model needs {value!r}\n"
                "  use a model of docs/weights.md"
            )
