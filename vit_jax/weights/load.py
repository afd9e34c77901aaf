"""Loads weights from files of any supported project and from our checkpoints."""

import contextlib
import dataclasses
import functools
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from vit_jax import arguments
from vit_jax.errors import UserError, few, nearest
from vit_jax.models.block_config import options_that_affect, parameter_options
from vit_jax.models.parameters import heads, nested, parameter_shapes
from vit_jax.models.positions import POSITIONS
from vit_jax.models.stacking import stack_flat
from vit_jax.models.vit import VisionTransformer, position_at, token_grid
from vit_jax.weights import files, fit, google, hub, huggingface, namings, native, preprocessing, timm, towers
from vit_jax.weights.describe import Description, pair
from vit_jax.weights.report import Report, Row, stack_rows
from vit_jax.weights.rules import Rule

FAMILIES = (google, timm, *namings.NAMINGS, huggingface)
FITTED = ("patch_size", "position_grid")  # may differ: parameters are converted, or a note says how to keep it
FUNCTION = tuple(name for name in options_that_affect(VisionTransformer, "function") if name not in FITTED)
NOT_IN_ARRAYS = ("heads", *FUNCTION, "position")  # options that the arrays need not determine
OVERRIDES = ("classes", "image_size", "patch_size", "channels", "dtype", "scan", "step", "prefix", *NOT_IN_ARRAYS)

NEW_HEAD = "a new head was requested"


def load(path_or_name: str | bytes | os.PathLike, **overrides: Any) -> tuple[VisionTransformer, dict[str, Any], Report]:
    """Returns the model of a file, its parameters, and a report of what was done with every array.

    Args:
        path_or_name: a file (.npz, .safetensors, .pth, .msgpack, ...), a directory with one, a URL, the name of a
            published model, or the workdir of a training run.
        **overrides: options that differ from those of the file: `classes` (a new zero head if the number differs; a
            mapping for several heads; None for features only), `image_size` (pixels, an int or (height, width)),
            `patch_size`, `channels`, `dtype` (compute dtype), `scan` (stacked blocks). Options that the arrays do not
            determine: `heads`, `gelu`, `layer_norm_epsilon`, `pooling`, `position`. For a workdir: `step`, a number or
            'best'. For a file with several models: `prefix`, the start of the names of one, such as 'teacher'.

    Returns:
        The model; its parameters for `model.apply({"params": ...})`, NumPy arrays in float32 (some of them views that
        are not contiguous); the report.

    Raises:
        UserError: the file does not exist, cannot be read, is not a complete model, or does not fit the overrides.
    """
    overrides = _checked_overrides(overrides)
    decisive = {name: overrides[name] for name in (*NOT_IN_ARRAYS, "image_size", "prefix") if name in overrides}
    source, description, arrays = _understand(path_or_name, decisive, overrides.get("step"))
    with as_user_error(source):
        _check_contradictions(description, overrides)
        if description.head_refusal and "classes" not in overrides:
            raise UserError(
                f"{description.head_refusal}\n  pass classes=N for a new head, or classes=None for features only"
            )
        model = _overridden(description.model, overrides)
        size = pair(overrides.get("image_size")) or description.image_size()
        channels = overrides.get("channels", description.channels)
        # A new head is one linear layer, without the layer before the old one.
        if not _same_head(description, model):
            model = model.clone(pre_logits=None)
        return (model, *_take(source, description, arrays, model, size, channels))


def load_into(
    path_or_name: str | bytes | os.PathLike,
    model: VisionTransformer,
    image_size: int | np.integer | tuple[int, int],
    channels: int | np.integer,
    seed: int | np.integer = 0,
    new_head: bool = False,
) -> tuple[dict[str, Any], Report]:
    """Returns parameters for a given model from a file of the same architecture, and the report.

    A head is loaded if its name and number of classes agree, and is zero otherwise. Position embeddings, patch
    embedding and channels are converted.

    Args:
        path_or_name: as in `load`.
        model: the model.
        image_size: height and width of its images in pixels.
        channels: number of channels of its images.
        seed: for the layer before the logits of a new head, if the model has one.
        new_head: whether all heads are new and zero, even if one could be loaded.

    Raises:
        UserError: as in `load`; or the file's model has other parameters: names the options that differ.
    """
    image_size, channels = arguments.size("image_size", image_size), arguments.integer("channels", channels)
    seed = arguments.integer("seed", seed, minimum=0)
    overrides = {"image_size": image_size, "heads_otherwise": model.heads, "position": model.position}
    source, description, arrays = _understand(path_or_name, overrides, None)
    with as_user_error(source):
        description = _named(description, model)
        theirs = description.model
        _check_same_parameters(theirs, model)
        notes = tuple(
            f"the file's model has {name} {getattr(theirs, name)!r}, this one {getattr(model, name)!r}"
            for name in FUNCTION
            if getattr(theirs, name) != getattr(model, name)
        )
        side = theirs.position_grid
        if model.position_grid is None and side not in (None, *token_grid(model, pair(image_size))):
            notes += (f"its positions are for {side}x{side} patches: config.model.position_grid={side} keeps them",)
        description = dataclasses.replace(description, notes=(*description.notes, *notes))
        return _take(source, description, arrays, model, pair(image_size), channels, seed, new_head)


def recognise(path_or_name: str | bytes | os.PathLike, **overrides: Any) -> Description:
    """Returns the description of a file, with its model and the normalization of its images, without loading it.

    Args:
        path_or_name: as in `load`.
        **overrides: values of options that the arrays do not determine, such as `heads` and `pooling`; `prefix`.

    Raises:
        UserError: as in `load`.
    """
    return _understand(path_or_name, overrides, None)[1]


def _check_same_parameters(theirs: VisionTransformer, model: VisionTransformer) -> None:
    theirs, ours = (one.clone(position_at=position_at(one)) for one in (theirs, model))
    there, here = parameter_options(theirs), parameter_options(ours)
    different = [
        f"{name} {getattr(theirs, name)!r}, not {getattr(ours, name)!r}"
        for name in here
        if name not in FITTED and there[name] != here[name]
    ]
    if different:
        raise UserError(
            f"its model differs from the one to load into: it has {few(different, 6)}\n"
            "  set the same options, or use another file"
        )


def _named(description: Description, model: VisionTransformer) -> Description:
    """The description with the file's only head renamed, if the model has several heads and one of its name."""
    name, theirs = description.head_name, description.model
    if not (isinstance(model.classes, Mapping) and isinstance(theirs.classes, int) and name in model.classes):
        return description
    rules = (
        dataclasses.replace(rule, paths=tuple(re.sub("^head/", f"head/{name}/", path) for path in rule.paths))
        for rule in description.rules
    )
    return dataclasses.replace(description, model=theirs.clone(classes={name: theirs.classes}), rules=tuple(rules))


@contextlib.contextmanager
def as_user_error(source: str) -> Iterator[None]:
    """Turns ValueErrors, such as those of a model's checks, into UserErrors, and names the file in all messages."""
    try:
        yield
    except UserError as error:
        raise error if str(error).startswith(source) else UserError(f"{source}: {error}") from None
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None


def _checked_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The overrides with values of Python's types."""
    for name in overrides:
        if name not in OVERRIDES:
            near = "".join(f"; nearest: {one}" for one in nearest(name, OVERRIDES))
            raise UserError(f"{name} is not an override{near}\n  known: {', '.join(OVERRIDES)}")
    converters = {
        **dict.fromkeys(("patch_size", "channels", "heads"), arguments.integer),
        **dict.fromkeys(("gelu", "pooling", "position"), arguments.text),
        "image_size": arguments.size,
        "classes": arguments.classes,
        "scan": arguments.boolean,
        "layer_norm_epsilon": arguments.number,
        "step": functools.partial(arguments.integer, minimum=0, words=("best", None)),
    }
    overrides = {name: converters[name](name, v) if name in converters else v for name, v in overrides.items()}
    if not isinstance(overrides.get("prefix"), str | None):
        raise UserError(
            f"prefix is {arguments.shown(overrides['prefix'])}\n  allowed: the start of names, such as 'teacher'"
        )
    if overrides.get("pooling") == "map":
        raise UserError("pooling is 'map', which has parameters of its own\n  allowed: token, mean, none")
    return overrides


def _understand(
    path_or_name: str | bytes | os.PathLike, overrides: Mapping[str, Any], step: int | str | None
) -> tuple[str, Description, Mapping[str, np.ndarray]]:
    """The file's name for messages, its description, and its arrays."""
    name = arguments.path("path_or_name", path_or_name)
    path = Path(hub.fetch(name))
    with files.user_errors(path):
        is_run = native.recognise(path)
    if is_run and overrides.get("prefix") is not None:
        raise UserError(
            f"prefix is {overrides['prefix']!r}, but {path} is a run directory, which has one model\n  omit prefix"
        )
    if is_run:
        with as_user_error(str(path)):
            return (str(path), *native.describe(path, step))
    if step is not None:
        raise UserError(f"step is {step!r}, but {path} is a file\n  omit step, or give the workdir of a training run")
    stored = files.open_file(path)
    source = str(stored.path)
    with as_user_error(source):
        if native.is_ours(stored) and overrides.get("prefix") is None:
            return source, *native.describe_file(stored)
        description = towers.describe(stored, FAMILIES, overrides.get("prefix"), overrides)
        return source, preprocessing.complete(description, stored, name), stored.arrays


def _check_contradictions(description: Description, overrides: Mapping[str, Any]) -> None:
    decided = {decision.field for decision in description.decisions}
    for name in NOT_IN_ARRAYS:
        if name in overrides and name not in decided and getattr(description.model, name) != overrides[name]:
            raise UserError(
                f"{name} is {overrides[name]!r}, but the file has {getattr(description.model, name)!r}\n  omit {name}"
            )


def _overridden(model: VisionTransformer, overrides: Mapping[str, Any]) -> VisionTransformer:
    fields = {name: overrides[name] for name in ("classes", "patch_size", "scan") if name in overrides}
    if "dtype" in overrides:
        try:
            fields["dtype"] = jnp.dtype(overrides["dtype"])
        except TypeError:
            raise UserError(
                f"dtype is {overrides['dtype']!r}\n  allowed: a floating-point dtype, such as float32 or bfloat16"
            ) from None
    return model.clone(**fields)


def _same_head(description: Description, model: VisionTransformer) -> bool:
    theirs = heads(description.model.classes)
    return any(theirs.get(name) == classes for name, classes in heads(model.classes).items())


def _take(
    source: str,
    description: Description,
    arrays: Mapping[str, np.ndarray],
    model: VisionTransformer,
    image_size: tuple[int, int] | None,
    channels: int,
    seed: int = 0,
    new_head: bool = False,
) -> tuple[dict[str, Any], Report]:
    """Reads and converts the arrays of all rules, initializes missing heads, and makes the report."""
    grid = None if image_size is None else token_grid(model, image_size)
    if grid is None and not POSITIONS[model.position].fixed and model.position != "none":
        raise UserError(
            f"the size of the position embedding {model.position!r} is unknown\n  pass image_size, in pixels"
        )
    wanted = parameter_shapes(model, grid, channels)
    flat, rows = {}, []
    for rule in description.rules:
        reason = _left_out(rule, description.model, model, new_head)
        if reason is not None:
            rows.append(Row("ignored", rule.names, (), reason))
            continue
        row, values = _read(source, rule, description, arrays, model, grid, channels)
        for path, value in zip(rule.paths, values, strict=True):
            if wanted.get(path) != value.shape:
                raise UserError(
                    f"{', '.join(rule.names)}: {path} would have shape {list(value.shape)}, but by the file's other "
                    f"arrays it has {list(wanted.get(path, ()))}\n  use a complete file of one model"
                )
            flat[path] = value
        rows.append(row)
    for path, why in description.zeros.items():
        if path in wanted and (not path.startswith("head/") or path.replace("/bias", "/kernel") in flat):
            flat[path] = np.zeros(wanted[path], np.float32)
            rows.append(Row("initialized", (), (path,), f"zero: {why}"))
    rows += [Row("ignored", (name,), (), why) for name, why in description.ignored.items()]
    rows += _initialize(flat, wanted, description, seed, new_head, model.head_bias)
    if model.scan:
        flat, rows = stack_flat(flat, model.depth), stack_rows(rows)
    evaluation = dict(description.evaluation)
    if image_size != description.image_size():
        evaluation.pop("input_size", None)
    report = Report(
        source,
        description.label,
        model,
        image_size,
        channels,
        description.normalization,
        tuple(rows),
        description.decisions,
        description.notes,
        description.statistics,
        description.assumed,
        description.class_names,
        evaluation,
        description.resampling,
    )
    return nested(flat), report


def _left_out(rule: Rule, theirs: VisionTransformer, ours: VisionTransformer, new_head: bool) -> str | None:
    """Why a rule's arrays are not loaded, if they belong to a head that the model does not have; else None."""
    if not rule.paths[0].startswith("head/"):
        return None
    there, here = heads(theirs.classes), heads(ours.classes)
    name = rule.paths[0].split("/")[1] if "" not in there else ""
    if not here:
        return "no head was requested"
    if new_head:
        return NEW_HEAD
    if name not in here:
        return f"the model has no head {name!r}" if name else "the model's heads have names"
    if there[name] != here[name]:
        return f"the file's head has {there[name]} classes, the model's {here[name]}"
    if theirs.pre_logits != ours.pre_logits:
        return f"the file has pre_logits {theirs.pre_logits}, the model {ours.pre_logits}"
    return None


def read_rule(source: str, rule: Rule, arrays: Mapping[str, np.ndarray]) -> tuple[list[np.ndarray], list[str]]:
    """The parameters of a rule in float32, of the sizes in the file, and how their dtypes were converted.

    Raises:
        UserError: an array is not of finite floating-point numbers, or its shape does not fit.
    """
    raw, details = [], []
    for name in rule.names:
        array = arrays[name]
        if array.dtype.kind != "f" and array.dtype != ml_dtypes.bfloat16:
            raise UserError(
                f"{name} is {array.dtype}: parameters must be floating-point numbers\n"
                "  use the file of the model before quantization"
            )
        files.check_finite(f"{source}: {name}", array)
        if array.dtype != np.float32:
            details.append(f"{array.dtype} -> float32")
            array = array.astype(np.float32)
            files.check_finite(f"{source}: {name} in float32", array)
        raw.append(array)
    try:
        values = rule.form.read(raw)
    except (ValueError, IndexError) as error:  # incompatible shapes
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in zip(rule.names, raw, strict=True))
        raise UserError(
            f"these arrays cannot be converted to {rule.paths[0]}: {shapes} ({error})\n"
            "  use a complete file of one model"
        ) from None
    return values, details


def _read(
    source: str,
    rule: Rule,
    description: Description,
    arrays: Mapping[str, np.ndarray],
    model: VisionTransformer,
    grid: tuple[int, int] | None,
    channels: int,
) -> tuple[Row, list[np.ndarray]]:
    values, details = read_rule(source, rule, arrays)
    action, fitted = rule.form.word, []
    for path, value in zip(rule.paths, values, strict=True):
        value, did = _fitted(path, value, description, model, grid, channels)
        details += [what for _, what in did]
        action = did[-1][0] if did else action
        fitted.append(value)
    return Row(action, rule.names, rule.paths, "; ".join(dict.fromkeys(details))), fitted


def _fitted(
    path: str,
    value: np.ndarray,
    description: Description,
    model: VisionTransformer,
    grid: tuple[int, int] | None,
    channels: int,
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """A parameter converted to the model's images, and what was done: (action, detail) for each conversion."""
    theirs, did = description.model, []
    first = "embedding/projection/kernel" if theirs.stem is None else "stem/convolution_root/kernel"
    if path == first and channels != description.channels:
        side = theirs.patch_size if theirs.stem is None else value.shape[0]
        kernel = fit.adapt_channels(value.reshape(side, side, -1, value.shape[-1]), channels)
        value = kernel.reshape(-1, value.shape[-1]) if theirs.stem is None else kernel
        did.append(("adapted", fit.how_channels(description.channels, channels)))
    if path == "embedding/projection/kernel" and model.patch_size != theirs.patch_size:
        value = fit.resize_patches(value, theirs.patch_size, model.patch_size)
        did.append(("resampled", f"patch {theirs.patch_size} -> {model.patch_size}"))
    parent, _, name = path.rpartition("/")
    if parent.split("/")[-1] == "positions" and grid != description.grid:
        old, new = description.grid, grid
        value = fit.fit_positions(name, value, old, new, description.resampling)
        how = "" if description.resampling == "bilinear" else f", {description.resampling}"
        did.append(("resampled", f"grid {old[0]}x{old[1]} -> {new[0]}x{new[1]}{how}"))
    return value, did


def _initialize(
    flat: dict[str, np.ndarray],
    wanted: Mapping[str, tuple[int, ...]],
    description: Description,
    seed: int,
    new_head: bool,
    head_bias: float,
) -> list[Row]:
    """Initializes the heads that the file does not have; other missing parameters are an error."""
    missing = [path for path in wanted if path not in flat]
    foreign = [path for path in missing if not path.startswith("head/")]
    if foreign:
        raise UserError(
            f"the file has no arrays for {few(foreign, 6)}: nothing was loaded\n  use a complete file of the model"
        )
    rows = []
    had = ", ".join(f"{count} classes" for count in heads(description.model.classes).values()) or "no head"
    why = NEW_HEAD if new_head else f"the file has {had}"
    for number, path in enumerate(missing):
        drawn, start = path.endswith("pre_logits/kernel"), head_bias if path.endswith("/logits/bias") else 0.0
        if drawn:
            key = jax.random.fold_in(jax.random.key(seed), number)
            flat[path] = np.asarray(nn.initializers.lecun_normal()(key, wanted[path], jnp.float32))
        else:
            flat[path] = np.full(wanted[path], start, np.float32)
        how = "drawn" if drawn else f"{start:g}" if start else "zero"
        rows.append(Row("initialized", (), (path,), f"{how}: {why}"))
    return rows
