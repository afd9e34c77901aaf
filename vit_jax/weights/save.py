"""Exports parameters in formats that other projects read: Google's .npz, or timm's .safetensors with config.json."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax import arguments, atomic, paths
from vit_jax.data.normalization import Statistics, constants
from vit_jax.errors import UserError
from vit_jax.models.positions import POSITIONS, TokenLayout
from vit_jax.models.vit import VisionTransformer, position_at, token_grid
from vit_jax.weights import files, google, preprocessing, timm, timm_writer
from vit_jax.weights.describe import pair

TABLES = ("sincos_2d", "sinusoidal", "learned_2d")  # positions that can be written as a table
FORMATS = {"google": ".npz", "timm": ".safetensors"}


def save(
    path: str | bytes | os.PathLike,
    model: VisionTransformer,
    parameters: Mapping[str, Any],
    image_size: int | np.integer | tuple[int, int] | None = None,
    channels: int | np.integer = 3,
    *,
    statistics: Statistics | None = None,
    class_names: Iterable[str] | None = None,
    evaluation: Mapping[str, Any] | None = None,
) -> tuple[str, ...]:
    """Writes a model's parameters to a file: '.npz' with Google's published names, '.safetensors' with timm's.

    With a .safetensors file, config.json is written to the same directory, from which timm creates the model. If there
    is one of another model, it is kept, and ours is named after the file. The file's header contains the same config.

    Args:
        path: of the file; its suffix selects the format.
        model: the model of the parameters, with or without `scan`.
        parameters: as in `model.apply({"params": ...})`.
        image_size: in pixels, or (height, width); needed for .safetensors, and for positions that are not a table.
        channels: of the images; for .safetensors.
        statistics: mean and std of each channel that the images are normalized by, of pixels in [0, 1]; for
            .safetensors, like the other two.
        class_names: one per class.
        evaluation: further options, as in `Report.evaluation`.

    Returns:
        Notes on what the format cannot express.

    Raises:
        UserError: the suffix is unknown, the format cannot express the model, parameters are missing, or there are
            another number of statistics or names than channels or classes.
    """
    path = paths.expand(path, "path")
    if not isinstance(model, VisionTransformer) or not isinstance(parameters, Mapping):
        wrong = "model" if not isinstance(model, VisionTransformer) else "parameters"
        raise UserError(f"{wrong} is of the wrong type\n  allowed: model and parameters as weights.load returns them")
    image_size = None if image_size is None else pair(arguments.size("image_size", image_size))
    channels = arguments.integer("channels", channels)
    names = None if class_names is None else arguments.names("class_names", class_names)
    _check_counts(model, channels, statistics, names)
    family = format_of(path)
    try:
        model, flat, position_notes = _with_table(model, flattened(parameters), image_size)
        if family == "google":
            arrays, notes = google.write(model, flat)
            files.write_npz(path, _contiguous(arrays))
            return position_notes + notes + _not_in_npz(statistics, names)
        arrays, config, notes = timm_writer.write(model, flat, image_size, channels)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    except KeyError as error:
        raise UserError(
            f"{path}: {error.args[0]} is missing: the parameters do not match the model\n"
            "  pass the model and the parameters of one weights.load"
        ) from None
    notes = position_notes + notes
    about = preprocessing.for_timm(statistics, names, evaluation or {})
    config |= {**about, "pretrained_cfg": config["pretrained_cfg"] | about["pretrained_cfg"]}
    files.write_safetensors(path, _contiguous(arrays), {"format": "pt", timm.OWN: atomic.to_json(config)})
    config_path = path.with_name(files.CONFIG)
    if config_path.is_file() and not _is_ours(config_path):
        config_path = path.with_name(f"{path.stem}.{files.CONFIG}")
        notes += (f"{files.CONFIG} of another model exists: the one for timm is {config_path.name}",)
    try:
        atomic.write_json(config_path, config)
    except OSError as error:
        raise UserError(
            f"{config_path} cannot be written: {error.strerror}; the weights are in {path}\n"
            "  free disk space or change its permissions, and save again"
        ) from error
    return notes


def _check_counts(
    model: VisionTransformer, channels: int, statistics: Statistics | None, names: tuple[str, ...] | None
) -> None:
    if statistics is not None and {len(part) for part in statistics} != {channels}:
        raise UserError(f"statistics is {statistics}\n  allowed: mean and std, one number per channel ({channels})")
    if names is not None and len(names) != model.classes:
        raise UserError(f"class_names has {len(names)} names\n  allowed: one per class ({model.classes})")


def _not_in_npz(statistics: Statistics | None, names: tuple[str, ...] | None) -> tuple[str, ...]:
    """A note on what is known of a model and a .npz file does not contain; Google's models have mean and std 0.5."""
    is_usual = statistics is None or statistics == constants("half", len(statistics[0]))
    lost = ([] if is_usual else ["the mean and std of its images"]) + (["class names"] if names is not None else [])
    return (f"a .npz file has no place for {' and '.join(lost)}: a .safetensors file keeps them",) if lost else ()


def _with_table(
    model: VisionTransformer, flat: dict[str, np.ndarray], image_size: tuple[int, int] | None
) -> tuple[VisionTransformer, dict[str, np.ndarray], tuple[str, ...]]:
    """The same model with its positions as a learned table, if they are computed and added at the input; and notes."""
    kind = model.position
    if kind not in TABLES or position_at(model) != "input" or model.position_width:
        return model, flat, ()
    if image_size is None:
        raise UserError(
            f"position {kind!r} is written as a table for one image size\n  pass image_size=(height, width)"
        )
    grid = token_grid(model, image_size)
    size = model.width // model.heads
    layout = TokenLayout(*grid, int(model.class_token), 0, model.width, size, model.heads, model.position_grid)
    own = {path.removeprefix("positions/"): array for path, array in flat.items() if path.startswith("positions/")}
    table = POSITIONS[kind](layout).apply({"params": own}).table
    rest = {path: array for path, array in flat.items() if not path.startswith("positions/")}
    note = f"position {kind!r} is written as its table for images of {image_size[0]}x{image_size[1]}"
    return model.clone(position="learned", position_grid=None), {**rest, "positions/table": np.asarray(table)}, (note,)


def format_of(path: Path, to: str | None = None) -> str:
    """'google' or 'timm', from the suffix of the file.

    Raises:
        UserError: the suffix is of neither, or not that of `to`.
    """
    family = next((name for name, suffix in FORMATS.items() if path.suffix == suffix), None)
    if family is None or to not in (None, family):
        wanted = f"{FORMATS[to]} for {to}" if to else " or ".join(f"{end} ({name})" for name, end in FORMATS.items())
        raise UserError(f"{path}: unknown file name suffix {path.suffix!r}\n  allowed: {wanted}")
    return family


def _is_ours(path: Path) -> bool:
    try:
        return "layer_norm_epsilon" in files.read_json(path)
    except UserError:
        return False


def _contiguous(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}


def flattened(parameters: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Parameters by path ('encoder/block_0/mlp/up/kernel'), stacked blocks (`scan`) split into single ones."""
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
