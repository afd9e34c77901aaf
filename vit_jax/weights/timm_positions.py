"""The position embedding of a file with timm's names, from its arrays and the architecture in its config.json."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from vit_jax.errors import UserError
from vit_jax.weights.rules import Parts
from vit_jax.weights.timm_rules import Spelling

EVA02_GRID = 16  # patches per side in the pre-training of all models of EVA-02: 224 / 14

# timm's arguments of a rotary position embedding, for each kind of ours.
_ARGUMENTS = {
    "rotary": {"rope_type": "cat", "rope_temperature": 100, "rope_grid_indexing": "xy", "rope_grid_offset": 0},
    "eva02": {"rope_type": "cat", "rope_temperature": 10_000, "rope_grid_indexing": "ij", "rope_grid_offset": 0},
    "pe": {"rope_type": "cat", "rope_temperature": 10_000, "rope_grid_indexing": "xy", "rope_grid_offset": 1},
    "dinov3": {"rope_type": "dinov3", "rope_temperature": 100, "rope_grid_indexing": "ij", "rope_grid_offset": 0},
}


@dataclasses.dataclass(frozen=True)
class Implied:
    """A position embedding that a file's arrays imply.

    Attributes:
        position: as in `VisionTransformer`.
        grid: rows and columns of the grid of its coordinates; None for that of the images.
        interleaved: whether the rotation turns neighbouring channels.
        is_open: whether other models have the same arrays with another position embedding.
    """

    position: str
    grid: int | None = None
    interleaved: bool = False
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
    found = (_with_table if parts.positions else _without_table)(
        parts, spelling, side, recorded.get("architecture", "")
    )
    _check_arguments(found, recorded.get("arguments", {}))
    return found


def _with_table(parts: Parts, spelling: Spelling, side: int | None, architecture: str) -> Implied:
    gated = parts.mlp == "swiglu"
    if spelling.qkv == "apart" or (spelling.bias == "query_value" and gated):
        return Implied("learned_eva02", EVA02_GRID, interleaved=True)
    if parts.input_norm == "tokens" and (parts.map or not parts.final_norm):
        return Implied("learned_pe", side, interleaved=True)
    if re.match(r".*_rope_ape_", architecture):
        return Implied("learned_rotary", interleaved=True)
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
        return Implied("dinov3") if parts.class_token else Implied("eva02", EVA02_GRID, interleaved=True)
    return Implied("rotary", interleaved=True) if parts.class_token and spelling.scale.startswith("gamma") else None


def _check_arguments(found: Implied | None, arguments: Mapping[str, Any]) -> None:
    kind = None if found is None else found.position.removeprefix("learned_")
    expected = _ARGUMENTS.get(kind, {"use_rot_pos_emb": False})
    for key, value in expected.items():
        if arguments.get(key, value) != value:
            raise UserError(
                f"config.json has {key} {arguments[key]!r}, but by its arrays the model needs {value!r}\n"
                "  use a model of docs/weights.md"
            )
