"""What the JSON files beside weights say of inputs and outputs: mean and std of images, class names, resizing, views.

`complete` reads it, `for_timm` writes it: a model that is loaded and saved keeps what is known of it.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax.data import normalization
from vit_jax.data.normalization import Statistics
from vit_jax.data.preparation import COVER, Preparation
from vit_jax.errors import UserError
from vit_jax.weights import class_names, families, image_processors
from vit_jax.weights.describe import Description, config_value, pair
from vit_jax.weights.files import CONFIG, OPEN_CLIP, PREPROCESSOR, PROCESSOR, Stored, read_json

OURS = "vit_jax"  # key of config.json for what timm has no name for, and of the header of files that we write
# Options of evaluation that a file may record, and their types: timm's in `pretrained_cfg`, ours in `OURS`.
_OF_TIMM = {"interpolation": str, "crop_pct": float, "crop_mode": str}
_OF_OURS = {"loss": str, "test_flip": bool, "test_shift": int, "resize_rules": str, "input_size": list}
EVALUATION = {**_OF_TIMM, **_OF_OURS}
AS_IN_TRAINING = {
    "interpolation": COVER.interpolation,
    "crop_pct": COVER.crop_pct,
    "crop_mode": COVER.crop_mode,
    "resize_rules": COVER.resize_rules,
}
DEFAULTS_OF_TIMM = {"interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center"}


def complete(description: Description, stored: Stored, source: str) -> Description:
    """Returns a description with the normalization, class names and `EVALUATION` that are recorded beside the file.

    timm records them in config.json (`pretrained_cfg` or the top level, `label_names`), Hugging Face in
    preprocessor_config.json and config.json (`id2label`). Mean and std that are not recorded are those of its family.

    Args:
        description: of the file.
        stored: the file.
        source: its path or name, as the user wrote it.

    Raises:
        UserError: a recorded value has the wrong type, or is not a mean or std.
    """
    config, directory = _config(stored), stored.path.parent
    names = families.names_of(stored.path, source)
    statistics, evaluation, notes = _of_timm(config), _evaluation(config), description.notes
    found = _preprocessor(directory) if "pretrained_cfg" not in config else None
    if found is not None:
        statistics = statistics or _of_hugging_face(found, description.channels)
        resizing, note = image_processors.evaluation(found, config.get("model_type"), description.image_size())
        evaluation, notes = {**resizing, **evaluation}, (*notes, note) if note else notes
    elif (directory / OPEN_CLIP).is_file() and not evaluation:
        found = config_value(read_json(directory / OPEN_CLIP), "preprocess_cfg", dict) or {}
        statistics, (evaluation, note) = statistics or _of_timm(found), _of_open_clip(found)
        notes = (*notes, note) if note else notes
    if statistics is not None and len(statistics[0]) != description.channels:
        what = f"{len(statistics[0])} channels, but its images have {description.channels}"
        statistics, notes = None, (*notes, f"the recorded mean and std are of {what}: they are not used")
    statistics, assumed = statistics or description.statistics, ""
    if statistics is None:
        statistics, assumed = families.statistics(stored, names, description.channels)
    preparation(evaluation, statistics)  # checks the values
    labels, note = _class_names(description.model.classes, config, names)
    return dataclasses.replace(
        description,
        statistics=statistics,
        assumed=assumed,
        normalization=normalization.text(statistics),
        evaluation=evaluation,
        class_names=labels,
        notes=(*notes, note) if note else notes,
    )


def _preprocessor(directory: Path) -> dict[str, Any] | None:
    """What Hugging Face's image processor has recorded in a directory; None if it has not."""
    if (directory / PREPROCESSOR).is_file():
        return read_json(directory / PREPROCESSOR)
    if (directory / PROCESSOR).is_file():
        return config_value(read_json(directory / PROCESSOR), "image_processor", dict)
    return None


def _of_open_clip(config: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The entries of `EVALUATION` for preprocess_cfg of OpenCLIP, and a note if it asks for what is not supported."""
    mode = config_value(config, "resize_mode", str) or "shortest"
    filters = {"bicubic": "bicubic", "random": "bicubic", "bilinear": "bilinear"}  # as OpenCLIP's transforms
    interpolation = config_value(config, "interpolation", str) or "bicubic"
    crops = {"shortest": "center", "squash": "squash"}
    if mode not in crops or interpolation not in filters:
        what = f"resize_mode {mode!r} and interpolation {interpolation!r}"
        return {}, f"{OPEN_CLIP} has {what}, which is not supported: images are resized as in training"
    return {"interpolation": filters[interpolation], "crop_pct": 1.0, "crop_mode": crops[mode]}, None


def _config(stored: Stored) -> dict[str, Any]:
    """The config.json beside a file; that in the header of a file of ours, if it has none or that of another model."""
    config = stored.config or {}
    return config if _is_own(config) or OURS not in stored.metadata else json.loads(stored.metadata[OURS])


def _is_own(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is one that `weights.save` has written."""
    return "layer_norm_epsilon" in config and "architecture" in config


def preparation(evaluation: Mapping[str, Any], statistics: Statistics) -> Preparation:
    """Returns how images are resized and cropped for a model, by the `evaluation` of its report.

    Args:
        evaluation: values of some of `EVALUATION`.
        statistics: mean and std; timm pads with the mean.

    Raises:
        UserError: a value is not one that is supported.
    """
    recorded = {key: evaluation[key] for key in (*_OF_TIMM, "resize_rules") if key in evaluation}
    if not recorded:
        return COVER
    fill = tuple(round(255 * value) for value in statistics[0]) if recorded.get("crop_mode") == "border" else ()
    return Preparation(**{"resize_rules": "timm", **recorded}, fill=fill)


def for_timm(
    statistics: Statistics | None, class_names: tuple[str, ...] | None, evaluation: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the entries of a config.json for `complete` and for timm; `pretrained_cfg` is to be merged into timm's.

    Args:
        statistics: mean and std of each channel of the images, of pixels in [0, 1].
        class_names: of the head.
        evaluation: values of some of `EVALUATION`.
    """
    if not set(_OF_TIMM) & set(evaluation):
        evaluation = {**evaluation, **AS_IN_TRAINING}
    recorded = {key: evaluation[key] for key in _OF_TIMM if key in evaluation}
    if statistics is not None:
        recorded |= {"mean": list(statistics[0]), "std": list(statistics[1])}
    ours = {key: evaluation[key] for key in _OF_OURS if key in evaluation}
    names = {} if class_names is None else {"label_names": list(class_names)}
    return {**names, "pretrained_cfg": recorded, **({OURS: ours} if ours else {})}


def _of_timm(config: Mapping[str, Any]) -> Statistics | None:
    recorded = config_value(config, "pretrained_cfg", dict) or config
    if recorded.get("mean") is None or recorded.get("std") is None:
        return None
    return _checked(recorded["mean"], recorded["std"], f"{CONFIG}: mean and std")


def _evaluation(config: Mapping[str, Any]) -> dict[str, Any]:
    of_timm, ours = config_value(config, "pretrained_cfg", dict), config_value(config, OURS, dict) or {}
    recorded = of_timm or config
    found = {key: config_value(recorded, key, kind) for key, kind in _OF_TIMM.items()}
    found |= {key: config_value(ours, key, kind) for key, kind in _OF_OURS.items()}
    for key, value in found.items():
        if isinstance(value, int | float) and not (value >= 0 and math.isfinite(value)):
            raise UserError(f"{CONFIG} has {key} {value}: it must not be negative\n  correct it, or remove it")
    found = {key: value for key, value in found.items() if value is not None}
    if not of_timm or "architecture" not in config or _is_own(config):
        return found
    size = pair((config_value(of_timm, "input_size", list) or [])[1:])
    if (config_value(config, "model_args", dict) or {}).get("img_size"):  # timm's models are for this size alone
        size = None
    return {**DEFAULTS_OF_TIMM, **found, **({"input_size": list(size)} if size else {})}


def _of_hugging_face(config: Mapping[str, Any], channels: int) -> Statistics | None:
    scale = image_processors.pixel_scale(config)
    if config.get("do_normalize") is False:
        return (0.0,) * channels, (1 / scale,) * channels
    if config.get("image_mean") is None or config.get("image_std") is None:
        return None
    found = _checked(config["image_mean"], config["image_std"], f"{PREPROCESSOR}: image_mean and image_std")
    return tuple(tuple(value / scale for value in part) for part in found)


def _checked(mean: Any, std: Any, where: str) -> Statistics:
    are_numbers = [isinstance(value, int | float) for part in (mean, std) if isinstance(part, list) for value in part]
    is_pair = isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) > 0 and all(are_numbers)
    if not is_pair or not np.isfinite([mean, std]).all() or min(std) <= 0:
        raise UserError(
            f"{where} are {str(mean)[:60]} and {str(std)[:60]}: they must have one number per channel, std above 0\n"
            "  correct them, or remove them from the file"
        )
    return tuple(map(float, mean)), tuple(map(float, std))


def _class_names(
    classes: Any, config: Mapping[str, Any], names: tuple[str, ...]
) -> tuple[tuple[str, ...] | None, str | None]:
    """The class names of the head, and a note if those that are recorded are not its."""
    if not isinstance(classes, int):
        return None, None
    found = class_names.recorded(config)
    if found is not None and len(found) == classes:
        return found, None
    if found is not None:
        return (
            None,
            f"{CONFIG} has {len(found)} class names, but the head has {classes} classes: the names are not used",
        )
    known = class_names.imagenet1k()
    is_known = classes == len(known) and class_names.is_imagenet1k(config, _is_own(config), names)
    return (known if is_known else None), None
