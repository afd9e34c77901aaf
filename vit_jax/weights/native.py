"""Checkpoints of our own runs: the newest, the best or any step of a workdir, or a file of the average of several."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_jax.checkpoint import integrity
from vit_jax.errors import UserError
from vit_jax.models import variants
from vit_jax.models.vit import VisionTransformer, token_grid
from vit_jax.weights import files
from vit_jax.weights import rules as forms
from vit_jax.weights.describe import Choices, Description, check_names, few, pixels_per_patch
from vit_jax.weights.files import Stored
from vit_jax.weights.rules import Rule
from vit_jax.weights.shapes import parameter_shapes

LABEL = "a run of our own"
AVERAGE = "an average of our own checkpoints"

# As training names them (vit_jax/checkpoint/manager.py), which must not be imported here.
FOLDER = "checkpoints"
METRIC, LOSS = "validation/accuracy", "validation/loss"
STATE = "state"
INPUTS = "data.json"
BACKBONE = "backbone"
WRITTEN = "_CHECKPOINT_METADATA"
SEALED = "vit_jax.parameters"  # key of what stands in the header of a file of ours: config, steps and digests
KIND = "parameters"  # the first word of the names in such a file


def recognise(path: Path) -> bool:
    """Whether the path is a workdir with checkpoints, its folder of them, or one of them."""
    return _checkpoints(path) is not None


def _checkpoints(path: Path) -> tuple[Path, int | None] | None:
    """The folder of checkpoints, and the step where the path is one's."""
    if not path.is_dir():
        return None
    path = path.resolve()
    if (path / FOLDER).is_dir():
        return path / FOLDER, None
    if path.name == FOLDER:
        return path, None
    if path.parent.name == FOLDER and re.fullmatch(r"[0-9]+", path.name):
        return path.parent, int(path.name)
    return None


def describe(path: Path, step: int | str | None) -> tuple[Description, Mapping[str, np.ndarray]]:
    """The model of a checkpoint, and its parameters by name: the averaged ones where there are any, as evaluation does.

    Args:
        path: as in `recognise`.
        step: a step, 'best' (by validation accuracy) or None for the newest.

    Raises:
        UserError: there is no such checkpoint, or it does not hold the model that its config describes.
    """
    folder, named = _checkpoints(path)
    step = _step(folder, named if step is None else step)
    kind, parameters, others, config = _read(folder, step)
    notes = (f"the {'averaged ' if kind == 'averaged' else ''}parameters of step {step}",)
    size = _image_size(folder.parent, config)
    return _description(LABEL, parameters, kind, others, config, notes, size), parameters


def _image_size(workdir: Path, config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of the images that a run was trained on, where it tells."""
    side = (config.get("data") or {}).get("image_size")
    if side is not None:
        return side, side
    try:
        return tuple(json.loads((workdir / INPUTS).read_text())["image_shape"][:2])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _read(folder: Path, step: int) -> tuple[str, dict[str, np.ndarray], dict[str, Any], dict[str, Any]]:
    """Of a checkpoint: which parameters, those by name and verified, what else is in its state, and its config."""
    from orbax.checkpoint import v1 as ocp

    beside, tree = _beside(folder / str(step)), ocp.checkpointables_metadata(folder / str(step)).metadata[STATE]
    kind = "averaged" if "averaged" in tree else "parameters"
    config = beside["metadata"].get("config")
    if config is None:
        raise UserError(f"the checkpoint of step {step} does not say of which config it is")
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), tree[kind])
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            state = ocp.load_checkpointables(folder / str(step), {STATE: {kind: abstract}})[STATE]
    except Exception as error:  # Orbax and TensorStore raise many kinds for files that they cannot understand
        raise UserError(f"the checkpoint of step {step} is damaged: {_one_line(error)}") from error
    parameters = {name: np.asarray(leaf) for name, leaf in _flat(state[kind], f"{kind}/").items()}
    changed = [name for name, array in parameters.items() if integrity.digest(array) != beside["digests"].get(name)]
    if changed:
        raise UserError(f"the checkpoint of step {step} is damaged: {few(changed)} not as written")
    return kind, parameters, {name: tree[name] for name in tree if name != kind}, config


def average(path: Path, wanted: list[int], target: Path) -> None:
    """Writes the mean of several checkpoints' parameters, taken in float64, to a .safetensors file of our own naming.

    Of each checkpoint they are the parameters that `describe` finds, every array compared with its digest. The file
    carries the newest one's config and digests of its own.

    Args:
        path: a workdir.
        wanted: steps.
        target: the file.

    Raises:
        UserError: a checkpoint is damaged, or the file cannot be written.
    """
    folder, sums = _checkpoints(path)[0], {}
    for step in sorted(wanted):
        kind, parameters, _, config = _read(folder, step)
        for name, array in parameters.items():
            name = f"{KIND}/{name.removeprefix(kind + '/')}"
            sums[name] = sums.get(name, 0.0) + array.astype(np.float64)
    means = {name: np.asarray(total / len(wanted), np.float32) for name, total in sums.items()}
    content = {"config": config, "steps": sorted(wanted), "digests": integrity.digests(means)}
    files.write_safetensors(target, means, {SEALED: json.dumps(integrity.seal(content))})


def is_ours(stored: Stored) -> bool:
    """Whether a file is one that `average` wrote."""
    return SEALED in stored.metadata


def describe_file(stored: Stored) -> tuple[Description, Mapping[str, np.ndarray]]:
    """The model of such a file, and its parameters by name.

    Raises:
        UserError: it is not as it was written.
    """
    try:
        content = json.loads(stored.metadata[SEALED])
    except ValueError:
        content = None
    if not integrity.is_sealed(content):
        raise UserError("the file is damaged: its header is not the one that was written")
    parameters = dict(stored.arrays)
    found = integrity.digests(parameters)
    changed = [name for name in {**found, **content["digests"]} if found.get(name) != content["digests"].get(name)]
    if changed:
        raise UserError(f"the file is damaged: {few(changed)} not as written")
    notes = (f"the mean of the parameters of steps {few(map(str, content['steps']))}",)
    size = _image_size(Path(), content["config"])
    return _description(AVERAGE, parameters, KIND, {}, content["config"], notes, size), parameters


def _beside(path: Path) -> dict[str, Any]:
    """What was sealed beside a checkpoint's arrays: metadata, metrics, digests."""
    from orbax.checkpoint import v1 as ocp

    try:
        content = ocp.checkpointables_metadata(path).custom_metadata
    except Exception as error:
        raise UserError(
            f"{path.name} is no checkpoint that can be read: {' '.join(str(error).split())[:200]}"
        ) from error
    if not integrity.is_sealed(content):
        raise UserError(f"the checkpoint of step {path.name} is damaged: its metadata are not those that were written")
    return content


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _step(folder: Path, wanted: int | str | None) -> int:
    steps = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit() and (path / WRITTEN).exists())
    if wanted is None and steps:
        return steps[-1]
    if wanted == "best":
        ranked = [(_goodness(_beside(folder / str(step))["metrics"]), step) for step in steps]
        ranked = [(value, step) for value, step in ranked if value is not None]
        if ranked:
            return max(ranked)[1]
        raise UserError(f"{folder} has no checkpoint that was validated; leave step out for the newest")
    if wanted not in steps:
        of = "" if wanted is None else f" of step {wanted}"
        raise UserError(f"{folder} has no checkpoint{of}; there are: {few(map(str, steps)) or 'none'}")
    return wanted


def _goodness(metrics: Mapping[str, float]) -> float | None:
    return metrics.get(METRIC, -metrics[LOSS] if LOSS in metrics else None)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by their path; of what is no dictionary, by JAX's own."""
    flat = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        flat[prefix + "/".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)] = leaf
    return flat


def _description(
    label: str,
    parameters: Mapping[str, np.ndarray],
    kind: str,
    others: Mapping[str, Any],
    config: Mapping[str, Any],
    notes: tuple[str, ...],
    image_size: tuple[int, int] | None,
) -> Description:
    # Pre-training has the model inside another module.
    inside = any(name.startswith(f"{kind}/{BACKBONE}/") for name in parameters)
    prefix = f"{kind}/{BACKBONE}/" if inside else f"{kind}/"
    shapes = {name[len(prefix) :]: array.shape for name, array in parameters.items() if name.startswith(prefix)}
    try:
        # What computes attention is a matter of the machine, and not of the parameters.
        section = {key: value for key, value in config["model"].items() if key != "attention_kernel"}
        fields = variants.fields_of_options(section)
        model = VisionTransformer(classes=_classes(shapes), **{**fields, "scan": False})
        model = _with_grid(model, image_size)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"its config describes no model of this version: {error}") from None
    kernel = shapes.get("embedding/projection/kernel", (0,))
    channels = kernel[0] // model.patch_size**2
    if model.stem is not None:
        channels = shapes.get("stem/convolution_root/kernel", (0, 0, 0))[2]
    choices = Choices({})
    grid = _grid(shapes, model, (config.get("data") or {}).get("image_size"), choices)
    scanned = any(name.startswith("encoder/blocks/") for name in shapes)
    rules = []
    for path in parameter_shapes(model, grid, channels):
        if not scanned or not path.startswith("encoder/block_"):
            rules.append(Rule((prefix + path,), (path,), forms.SAME))
        elif path.startswith("encoder/block_0/"):
            block = Rule((prefix + path.replace("block_0", "blocks"),), (path,), forms.SAME)
            rules.append(forms.scanned(block, model.depth))
    why = {"parameters": "evaluation takes the averaged ones", "optimizer": "the optimiser's state"}
    ignored = {
        name.rstrip("/"): why.get(part, "training's own")
        for part, tree in others.items()
        for name in _flat(tree, f"{part}/")
    }
    ignored |= {name: _of_pretraining(name) for name in parameters if not name.startswith(prefix)}
    check_names([*parameters, *ignored], rules, ignored, (), label)
    labels = (config.get("data") or {}).get("labels")
    return Description(
        label,
        model,
        channels,
        grid,
        tuple(rules),
        ignored,
        (),
        tuple(choices.made),
        notes,
        head_name=labels,
        normalization=(config.get("data") or {}).get("normalization", "set"),
    )


def _with_grid(model: VisionTransformer, image_size: tuple[int, int] | None) -> VisionTransformer:
    """The model, bound to the (square) grid that it was trained on where its positions are computed from one."""
    if model.position != "sincos_2d" or model.position_grid is not None or image_size is None:
        return model
    rows, columns = token_grid(model, image_size)
    return model.clone(position_grid=rows) if rows == columns else model


def _of_pretraining(name: str) -> str:
    """Why an array beside the model's is left out."""
    return "the decoder of pre-training" if "/decoder/" in name else "pre-training's own"


def _classes(shapes: Mapping[str, tuple[int, ...]]) -> int | dict[str, int] | None:
    found = {}
    for name, shape in shapes.items():
        match = re.fullmatch(r"head/(?:(\w+)/)?logits/kernel", name)
        if match:
            found[match[1]] = shape[1]
    return found.get(None, found or None)


def _grid(
    shapes: Mapping[str, tuple[int, ...]], model: VisionTransformer, image_size: int | None, choices: Choices
) -> tuple[int, int] | None:
    """Rows and columns of the position embedding, wherever it is."""
    tables = {name.split("/")[-1]: shape for name, shape in shapes.items() if "positions/" in name}
    if "table" in tables:
        return choices.grid(tables["table"][-2] - int(model.class_token), pixels_per_patch(model), image_size)
    if "rows" in tables:
        return tables["rows"][-2], tables["columns"][-2]
    if "offsets" in tables:
        return tuple((size + 1) // 2 for size in tables["offsets"][-2:])
    return None
