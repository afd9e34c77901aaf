"""The one door: a file of any project, or a checkpoint of our own, to a model and its parameters, or into a model."""

import contextlib
import dataclasses
import difflib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from vit_jax.errors import UserError
from vit_jax.models.positions import POSITIONS
from vit_jax.models.vit import VisionTransformer, position_at, token_grid
from vit_jax.weights import files, fit, google, hub, huggingface, native, stacked, timm
from vit_jax.weights.describe import Description, few, pair
from vit_jax.weights.report import Report, Row
from vit_jax.weights.rules import Rule
from vit_jax.weights.shapes import heads, parameter_shapes

FAMILIES = (google, timm, huggingface)
TOLD = ("heads", "gelu", "layer_norm_epsilon", "pooling", "position")
OVERRIDES = ("classes", "image_size", "patch_size", "channels", "dtype", "scan", "step", *TOLD)

# What parameters depend on: a file of other ones is none of the model.
ARCHITECTURE: dict[str, Callable[[VisionTransformer], Any]] = {
    **{
        name: lambda model, name=name: getattr(model, name)
        for name in ("width", "depth", "heads", "mlp_width", "class_token", "registers", "position", "position_width")
    },
    "position_at": position_at,
    **{
        name: lambda model, name=name: getattr(model, name)
        for name in ("mlp", "qkv_bias", "qk_norm", "parallel", "stem", "stem_width", "norm_after_pooling")
    },
    "layer scale": lambda model: model.layer_scale is not None,
    "attention pooling": lambda model: model.pooling == "map",
}
FUNCTION = ("gelu", "layer_norm_epsilon", "pooling")  # what changes the function alone
NEW_HEAD = "a new head is asked for"


def load(path_or_name: str | os.PathLike, **overrides: Any) -> tuple[VisionTransformer, dict[str, Any], Report]:
    """The model that a file holds, its parameters, and what was done with every array.

    Args:
        path_or_name: a file (.npz, .safetensors), a folder of one, a URL, the name of a published model, or a workdir
            of a run of our own.
        **overrides: fields that shall differ from the file's: `classes` (a new zero head where the number is another;
            a mapping for several; None for the features alone), `image_size` (pixels, an int or (height, width)),
            `patch_size`, `channels`, `dtype` (arithmetic), `scan` (blocks stacked). Where the arrays do not tell them:
            `heads`, `gelu`, `layer_norm_epsilon`, `pooling`, `position`. For a workdir: `step`, a number or 'best'.

    Returns:
        The model; its parameters as `model.apply({"params": ...})` takes them, NumPy arrays in float32 (some of them
        views that are not contiguous); the report.

    Raises:
        UserError: there is no such file, it is refused, is no whole model, or cannot be what the overrides ask for.
    """
    _check_overrides(overrides)
    given = {name: overrides[name] for name in (*TOLD, "image_size") if name in overrides}
    source, description, arrays = _understand(path_or_name, given, overrides.get("step"))
    with _as_user_error(source):
        _check_told(description, overrides)
        if description.head_refusal and "classes" not in overrides:
            raise UserError(
                f"{description.head_refusal}\n  give classes=N for a new head, or classes=None for the features"
            )
        model = _overridden(description.model, overrides)
        size = pair(overrides.get("image_size")) or description.image_size()
        channels = overrides.get("channels", description.channels)
        # A new head is one linear layer: what stands before the old one goes with it.
        if not _same_head(description, model):
            model = model.clone(pre_logits=None)
        return (model, *_take(source, description, arrays, model, size, channels))


def load_into(
    path_or_name: str | os.PathLike,
    model: VisionTransformer,
    image_size: int | tuple[int, int],
    channels: int,
    seed: int = 0,
    new_head: bool = False,
) -> tuple[dict[str, Any], Report]:
    """Parameters of a given model from a file of the same architecture; its heads may be others, or several.

    A head is taken where name and classes agree and else starts at zero. Positions, patches and channels are fitted.

    Args:
        path_or_name: as in `load`.
        model: the model.
        image_size: height and width of its images, pixels.
        channels: values a pixel.
        seed: of what is drawn: the layer before a new head's logits, where the model has one.
        new_head: whether no head is taken, though it would agree: all of the model's start at zero.

    Raises:
        UserError: as in `load`, or the file's model has other parameters; what differs is named.
    """
    given = {"image_size": image_size, "heads_otherwise": model.heads, "position": model.position}
    source, description, arrays = _understand(path_or_name, given, None)
    with _as_user_error(source):
        description = _named(description, model)
        theirs = description.model
        different = [
            f"{name} {field(theirs)!r}, not {field(model)!r}"
            for name, field in ARCHITECTURE.items()
            if field(theirs) != field(model)
        ]
        if different:
            raise UserError(f"its model is another than the one to load into: it has {few(different)}")
        notes = tuple(
            f"the file's model has {name} {getattr(theirs, name)!r}, this one {getattr(model, name)!r}"
            for name in FUNCTION
            if getattr(theirs, name) != getattr(model, name)
        )
        side = theirs.position_grid
        if model.position_grid is None and side not in (None, *token_grid(model, pair(image_size))):
            notes += (f"its positions are of {side}x{side} patches: config.model.position_grid={side} keeps them",)
        description = dataclasses.replace(description, notes=(*description.notes, *notes))
        return _take(source, description, arrays, model, pair(image_size), channels, seed, new_head)


def recognise(path_or_name: str | os.PathLike, **given: Any) -> Description:
    """What a file is of: its model, and how that model's images were normalised.

    Args:
        path_or_name: as in `load`.
        **given: what the arrays may not tell: `heads`, `gelu`, `layer_norm_epsilon`, `pooling`, `position`.

    Raises:
        UserError: as in `load`.
    """
    return _understand(path_or_name, given, None)[1]


def _named(description: Description, model: VisionTransformer) -> Description:
    """A file's only head under its name, where it is to be one of several."""
    name, theirs = description.head_name, description.model
    if not (isinstance(model.classes, Mapping) and isinstance(theirs.classes, int) and name in model.classes):
        return description
    rename = lambda path: path.replace("head/", f"head/{name}/", 1) if path.startswith("head/") else path  # noqa: E731
    rules = (dataclasses.replace(rule, paths=tuple(map(rename, rule.paths))) for rule in description.rules)
    return dataclasses.replace(description, model=theirs.clone(classes={name: theirs.classes}), rules=tuple(rules))


@contextlib.contextmanager
def _as_user_error(source: str) -> Iterator[None]:
    """What a model says of fields that cannot be is the user's to mend, and every message says which file."""
    try:
        yield
    except UserError as error:
        raise error if str(error).startswith(source) else UserError(f"{source}: {error}") from None
    except ValueError as error:
        raise UserError(f"{source}: {error}") from None


def _check_overrides(overrides: Mapping[str, Any]) -> None:
    for name in overrides:
        if name not in OVERRIDES:
            near = difflib.get_close_matches(name, OVERRIDES, n=1, cutoff=0.0)[0]
            raise UserError(f"{name} is no override; nearest: {near}\n  there are: {', '.join(OVERRIDES)}")
    for name in ("patch_size", "channels", "heads"):
        value = overrides.get(name, 1)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{name} is {value!r}: a whole number of at least 1")
    size = pair(overrides["image_size"]) if "image_size" in overrides else (1, 1)
    if size is None or min(size) < 1:
        raise UserError(f"image_size is {overrides['image_size']!r}: pixels, or (height, width)")
    if overrides.get("pooling") == "map":
        raise UserError("pooling 'map' has parameters of its own, and cannot be given: token, mean or none")


def _understand(
    path_or_name: str | os.PathLike, given: Mapping[str, Any], step: int | str | None
) -> tuple[str, Description, Mapping[str, np.ndarray]]:
    """What the file is called in messages, what it is, and its arrays."""
    path = Path(hub.fetch(os.fspath(path_or_name)))
    if native.recognise(path):
        with _as_user_error(str(path)):
            return (str(path), *native.describe(path, step))
    if step is not None:
        raise UserError(f"step is {step!r}, but {path} is a file: only a workdir of a run has steps")
    stored = files.open_file(path)
    source = str(stored.path)
    with _as_user_error(source):
        if native.is_ours(stored):
            return source, *native.describe_file(stored)
        for family in FAMILIES:
            if family.recognise(stored.shapes):
                return source, family.describe(stored, given), stored.arrays
        raise UserError(
            f"no Vision Transformer is known by these names: {few(stored.shapes)}\n"
            "  read are Google's (.npz), timm's and Hugging Face's (.safetensors) and workdirs of runs"
        )


def _check_told(description: Description, overrides: Mapping[str, Any]) -> None:
    decided = {decision.field for decision in description.decisions}
    for name in TOLD:
        if name in overrides and name not in decided and getattr(description.model, name) != overrides[name]:
            raise UserError(f"{name} is {overrides[name]!r}, but the file tells: {getattr(description.model, name)!r}")


def _overridden(model: VisionTransformer, overrides: Mapping[str, Any]) -> VisionTransformer:
    fields = {name: overrides[name] for name in ("classes", "patch_size", "scan") if name in overrides}
    if "dtype" in overrides:
        try:
            fields["dtype"] = jnp.dtype(overrides["dtype"])
        except TypeError:
            raise UserError(f"dtype is {overrides['dtype']!r}: float32 or bfloat16, for example") from None
    classes = fields.get("classes")
    if classes is not None and not isinstance(classes, int | Mapping):
        raise UserError(f"classes is {classes!r}: a number, a mapping from names to numbers, or None for features")
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
    """Every rule's arrays read, fitted and put in their place; heads made that the file has not."""
    grid = None if image_size is None else token_grid(model, image_size)
    if grid is None and not POSITIONS[model.position].fixed and model.position != "none":
        raise UserError(f"the file has no positions, and how many {model.position!r} ones there are, image_size tells")
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
                    f"{', '.join(rule.names)}: as {path} it is {list(value.shape)}, where a model of the file's other "
                    f"arrays has {list(wanted.get(path, ()))}"
                )
            flat[path] = value
        rows.append(row)
    rows += [Row("ignored", (name,), (), why) for name, why in description.ignored.items()]
    rows += _initialise(flat, wanted, description, seed, new_head, model.head_bias)
    if model.scan:
        flat, rows = stacked.stack(flat, model.depth), stacked.stack_rows(rows)
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
    )
    return nested(flat), report


def _left_out(rule: Rule, theirs: VisionTransformer, ours: VisionTransformer, new_head: bool) -> str | None:
    """Why an array of a head is not taken, where it is not."""
    if not rule.paths[0].startswith("head/"):
        return None
    there, here = heads(theirs.classes), heads(ours.classes)
    name = rule.paths[0].split("/")[1] if "" not in there else ""
    if not here:
        return "no head is asked for"
    if new_head:
        return NEW_HEAD
    if name not in here:
        return f"there is no head {name!r} in the model" if name else "the model's heads have names"
    if there[name] != here[name]:
        return f"the file's head has {there[name]} classes, the model's {here[name]}"
    if theirs.pre_logits != ours.pre_logits:
        return f"the file has pre_logits {theirs.pre_logits}, the model {ours.pre_logits}"
    return None


def _read(
    source: str,
    rule: Rule,
    description: Description,
    arrays: Mapping[str, np.ndarray],
    model: VisionTransformer,
    grid: tuple[int, int] | None,
    channels: int,
) -> tuple[Row, list[np.ndarray]]:
    raw, details = [], []
    for name in rule.names:
        array = arrays[name]
        if array.dtype.kind != "f" and array.dtype != ml_dtypes.bfloat16:
            raise UserError(f"{name} is {array.dtype}: parameters are floating-point numbers, not quantised ones")
        files.check_finite(f"{source}: {name}", array)
        if array.dtype != np.float32:
            details.append(f"{array.dtype} -> float32")
            array = array.astype(np.float32)
            files.check_finite(f"{source}: {name} in float32", array)
        raw.append(array)
    try:
        values = rule.form.read(raw)
    except (ValueError, IndexError) as error:  # shapes that do not go together
        shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in zip(rule.names, raw, strict=True))
        raise UserError(f"these do not make {rule.paths[0]} together: {shapes} ({error})") from None
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
    """A parameter made to suit the model's images, and what was done: (action, detail) each."""
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
        value = fit.fit_positions(name, value, old, new)
        did.append(("resampled", f"grid {old[0]}x{old[1]} -> {new[0]}x{new[1]}"))
    return value, did


def _initialise(
    flat: dict[str, np.ndarray],
    wanted: Mapping[str, tuple[int, ...]],
    description: Description,
    seed: int,
    new_head: bool,
    head_bias: float,
) -> list[Row]:
    """Makes the heads that the file does not have; anything else that is missing is an error."""
    missing = [path for path in wanted if path not in flat]
    foreign = [path for path in missing if not path.startswith("head/")]
    if foreign:
        raise UserError(f"the file has nothing for {few(foreign)}; nothing was loaded")
    rows = []
    had = ", ".join(f"{count} classes" for count in heads(description.model.classes).values()) or "no head to take"
    why = NEW_HEAD if new_head else f"the file has {had}"
    for number, path in enumerate(missing):
        drawn, start = path.endswith("pre_logits/kernel"), head_bias if path.endswith("/logits/bias") else 0.0
        if drawn:
            key = jax.random.fold_in(jax.random.key(seed), number)
            flat[path] = np.asarray(nn.initializers.lecun_normal()(key, wanted[path], jnp.float32))
        else:
            flat[path] = np.full(wanted[path], start, np.float32)
        how = "drawn" if drawn else f"{start:g}" if start else "zero"
        rows.append(Row("initialised", (), (path,), f"{how}: {why}"))
    return rows


def nested(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The tree of parameters from their paths."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return tree
