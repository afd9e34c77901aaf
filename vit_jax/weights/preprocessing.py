"""What the JSON files beside weights say of inputs and outputs: mean and std of images, class names, resizing, views.

`complete` reads it, `for_timm` writes it: a model that is loaded and saved keeps what is known of it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from vit_jax.data import normalization
from vit_jax.data.normalization import Statistics
from vit_jax.errors import UserError
from vit_jax.weights.describe import OTHER, Description, config_value
from vit_jax.weights.files import CONFIG, PREPROCESSOR, Stored, read_json
from vit_jax.weights.report import Report

OURS = "vit_jax"  # key of config.json for what timm has no name for
# Options of evaluation that a file may record, and their types: timm's in `pretrained_cfg`, ours in `OURS`.
_OF_TIMM = {"interpolation": str, "crop_pct": float, "crop_mode": str}
_OF_OURS = {"loss": str, "test_flip": bool, "test_shift": int}
EVALUATION = {**_OF_TIMM, **_OF_OURS}


def complete(description: Description, stored: Stored) -> Description:
    """Returns a description with the normalization, class names and `EVALUATION` that are recorded beside the file.

    timm records them in config.json (`pretrained_cfg` or the top level, `label_names`), Hugging Face in
    preprocessor_config.json and config.json (`id2label`).

    Raises:
        UserError: a recorded value has the wrong type, or is not a mean or std.
    """
    config, path = stored.config or {}, stored.path.parent / PREPROCESSOR
    statistics = _of_timm(config)
    if statistics is None and path.is_file():
        statistics = _of_hugging_face(read_json(path), description.channels)
    if statistics is not None:
        description = dataclasses.replace(description, normalization=_name(statistics), statistics=statistics)
    if evaluation := _evaluation(config):
        description = dataclasses.replace(description, evaluation=evaluation)
    names, classes = _class_names(config), description.model.classes
    if names is None or not isinstance(classes, int):
        return description
    if len(names) != classes:
        note = f"{CONFIG} has {len(names)} class names, but the head has {classes} classes: the names are not used"
        return dataclasses.replace(description, notes=(*description.notes, note))
    return dataclasses.replace(description, class_names=names)


def for_timm(
    statistics: Statistics | None, class_names: tuple[str, ...] | None, evaluation: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the entries of a config.json for `complete` and for timm; `pretrained_cfg` is to be merged into timm's.

    Args:
        statistics: mean and std of each channel of the images, of pixels in [0, 1].
        class_names: of the head.
        evaluation: values of some of `EVALUATION`.
    """
    recorded = {key: evaluation[key] for key in _OF_TIMM if key in evaluation}
    if statistics is not None:
        recorded |= {"mean": list(statistics[0]), "std": list(statistics[1])}
    ours = {key: evaluation[key] for key in _OF_OURS if key in evaluation}
    names = {} if class_names is None else {"label_names": list(class_names)}
    return {**names, "pretrained_cfg": recorded, **({OURS: ours} if ours else {})}


def named_normalization(source: str, found: Description | Report, option: str) -> str:
    """Returns the normalization of a file's images, a value of `config.data.normalization`.

    Raises:
        UserError: it has no name; `option` is to be set instead.
    """
    if found.normalization == OTHER:
        mean, std = found.statistics
        raise UserError(
            f"{source}: its images were normalized by mean {list(mean)} and std {list(std)}, which {option} cannot "
            f"express\n  choose another normalization: {option}=half, imagenet or set"
        )
    return found.normalization


def _of_timm(config: Mapping[str, Any]) -> Statistics | None:
    recorded = config_value(config, "pretrained_cfg", dict) or config
    if recorded.get("mean") is None or recorded.get("std") is None:
        return None
    return _checked(recorded["mean"], recorded["std"], f"{CONFIG}: mean and std")


def _evaluation(config: Mapping[str, Any]) -> dict[str, Any]:
    timm = config_value(config, "pretrained_cfg", dict) or config
    ours = config_value(config, OURS, dict) or {}
    found = {key: config_value(timm, key, kind) for key, kind in _OF_TIMM.items()}
    found |= {key: config_value(ours, key, kind) for key, kind in _OF_OURS.items()}
    for key, value in found.items():
        if isinstance(value, int | float) and not (value >= 0 and math.isfinite(value)):
            raise UserError(f"{CONFIG} has {key} {value}: it must not be negative\n  correct it, or remove it")
    return {key: value for key, value in found.items() if value is not None}


def _of_hugging_face(config: Mapping[str, Any], channels: int) -> Statistics | None:
    if config.get("do_normalize") is False:  # pixels stay in [0, 1]
        return (0.0,) * channels, (1.0,) * channels
    if config.get("image_mean") is None or config.get("image_std") is None:
        return None
    return _checked(config["image_mean"], config["image_std"], f"{PREPROCESSOR}: image_mean and image_std")


def _checked(mean: Any, std: Any, where: str) -> Statistics:
    are_numbers = [isinstance(value, int | float) for part in (mean, std) if isinstance(part, list) for value in part]
    is_pair = isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) > 0 and all(are_numbers)
    if not is_pair or not np.isfinite([mean, std]).all() or min(std) <= 0:
        raise UserError(
            f"{where} are {str(mean)[:60]} and {str(std)[:60]}: they must have one number per channel, std above 0\n"
            "  correct them, or remove them from the file"
        )
    return tuple(map(float, mean)), tuple(map(float, std))


def _name(statistics: Statistics) -> str:
    """The value of `config.data.normalization` for statistics, or `OTHER`."""
    channels = len(statistics[0])
    for name in normalization.CONSTANTS:
        same_channels = name != "imagenet" or channels == len(normalization.IMAGENET[0])
        if same_channels and np.allclose(statistics, normalization.constants(name, channels), atol=1e-3):
            return name
    return OTHER


def _class_names(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The class names in the order of the labels; None if there are none, or not one for each of 0, 1, ..."""
    names = config_value(config, "label_names", list)
    if names is None and (by_label := config_value(config, "id2label", dict)) is not None:
        wanted = [str(label) for label in range(len(by_label))]
        names = [by_label[label] for label in wanted] if set(by_label) == set(wanted) else None
    return tuple(names) if names and all(isinstance(name, str) for name in names) else None
