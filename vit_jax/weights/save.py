"""Our parameters to a file that others read: Google's .npz, or .safetensors as timm has them, with a config.json."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.errors import UserError
from vit_jax.models.positions import POSITIONS, Place
from vit_jax.models.vit import VisionTransformer, position_at, token_grid
from vit_jax.weights import files, google, timm

TABLES = ("sincos_2d", "sinusoidal", "learned_2d")  # positions that are a table in the end
FORMATS = {"google": ".npz", "timm": ".safetensors"}


def save(
    path: str | os.PathLike,
    model: VisionTransformer,
    parameters: Mapping[str, Any],
    image_size: tuple[int, int] | None = None,
    channels: int = 3,
) -> tuple[str, ...]:
    """Writes a model's parameters, whole or not at all: '.npz' in Google's published naming, '.safetensors' in timm's.

    Beside a .safetensors file goes the config.json that timm makes the model of; where another file's stands there
    already, it is left alone and ours is named after the file. The header of the file has the same.

    Args:
        path: of the file.
        model: whose parameters they are; scanned or not.
        parameters: as `model.apply({"params": ...})` takes them.
        image_size: height and width, pixels; for .safetensors, and for positions that are no table of their own.
        channels: values a pixel; for .safetensors.

    Returns:
        What a reader of the file should know, as it cannot say so itself.

    Raises:
        UserError: the name says no format, the model has what the format has no place for, or parameters are missing.
    """
    path = Path(path).expanduser()
    family = format_of(path)
    try:
        model, flat, told = _with_table(model, flattened(parameters), image_size)
        if family == "google":
            arrays, notes = google.write(model, flat)
            files.write_npz(path, _contiguous(arrays))
            return told + notes
        arrays, config, notes = timm.write(model, flat, image_size, channels)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    except KeyError as error:
        raise UserError(f"{path}: the parameters have no {error.args[0]}: they are not those of the model") from None
    notes, text = told + notes, json.dumps(config, indent=2)
    files.write_safetensors(path, _contiguous(arrays), {"format": "pt", timm.OWN: json.dumps(config)})
    beside = path.with_name(files.CONFIG)
    if beside.is_file() and not _is_ours(beside):
        beside = path.with_name(f"{path.stem}.{files.CONFIG}")
        notes += (f"{files.CONFIG} is another model's here: timm's is {beside.name}",)
    try:
        beside.write_text(text + "\n")
    except OSError as error:
        raise UserError(f"{beside} cannot be written: {error.strerror}; the weights are in {path}") from error
    return notes


def _with_table(
    model: VisionTransformer, flat: dict[str, np.ndarray], image_size: tuple[int, int] | None
) -> tuple[VisionTransformer, dict[str, np.ndarray], tuple[str, ...]]:
    """The same model with the plain table that its positions amount to, where they are added at the input."""
    kind = model.position
    if kind not in TABLES or position_at(model) != "input" or model.position_width:
        return model, flat, ()
    if image_size is None:
        raise UserError(f"position {kind!r} becomes a table of one image size: give image_size=(height, width)")
    grid = token_grid(model, image_size)
    size = model.width // model.heads
    place = Place(*grid, int(model.class_token), 0, model.width, size, model.heads, model.position_grid)
    own = {path.removeprefix("positions/"): array for path, array in flat.items() if path.startswith("positions/")}
    table = POSITIONS[kind](place).apply({"params": own}).table
    rest = {path: array for path, array in flat.items() if not path.startswith("positions/")}
    note = f"position {kind!r} is written as the table that it is for images of {image_size[0]}x{image_size[1]}"
    return model.clone(position="learned", position_grid=None), {**rest, "positions/table": np.asarray(table)}, (note,)


def format_of(path: Path, to: str | None = None) -> str:
    """'google' or 'timm', as the name of the file says.

    Raises:
        UserError: it says neither, or not what `to` says.
    """
    family = next((name for name, suffix in FORMATS.items() if path.suffix == suffix), None)
    if family is None or to not in (None, family):
        wanted = f"{FORMATS[to]} for {to}" if to else " or ".join(f"{end} ({name})" for name, end in FORMATS.items())
        raise UserError(f"{path}: the name does not end as the format does\n  allowed: {wanted}")
    return family


def _is_ours(path: Path) -> bool:
    try:
        return "layer_norm_epsilon" in files.read_json(path)
    except UserError:
        return False


def _contiguous(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}


def flattened(parameters: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Parameters by path, blocks one by one."""
    flat: dict[str, np.ndarray] = {}

    def walk(tree: Mapping[str, Any], prefix: str) -> None:
        for key, value in tree.items():
            if isinstance(value, Mapping):
                walk(value, f"{prefix}{key}/")
            elif prefix.startswith("encoder/blocks/"):
                rest = prefix.removeprefix("encoder/blocks/")
                for index, layer in enumerate(np.asarray(value)):
                    flat[f"encoder/block_{index}/{rest}{key}"] = layer
            else:
                flat[f"{prefix}{key}"] = np.asarray(value)

    walk(parameters, "")
    return flat
