"""Checkpoints of our own runs: the newest, the best or any step of a run directory, or a file with their average."""

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vit_jax import atomic
from vit_jax.checkpoint import input_spec, integrity
from vit_jax.checkpoint.input_spec import InputSpec
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.checkpoint.run_files import CHECKPOINTS, is_step, read_config
from vit_jax.data import normalization
from vit_jax.errors import UserError, few
from vit_jax.models import variants
from vit_jax.models.parameters import parameter_shapes
from vit_jax.models.vit import VisionTransformer, token_grid
from vit_jax.weights import files
from vit_jax.weights import rules as forms
from vit_jax.weights.describe import Choices, Description, check_names, pixels_per_patch
from vit_jax.weights.files import Stored
from vit_jax.weights.preprocessing import AS_IN_TRAINING
from vit_jax.weights.rules import Rule

LABEL = "a run of vit_jax"
AVERAGE = "an average of checkpoints of vit_jax"
BACKBONE = "backbone"  # the name of the model inside a pre-training module
SEALED = "vit_jax.parameters"  # key of config, steps and digests in the header of a file written by `average`
MAX_GRID = 4096  # patches per side; an image with more is none that a model was trained on
PARAMETERS, AVERAGED = "parameters", "averaged"  # top-level names in a checkpoint; files of averages use the first


def recognise(path: Path) -> bool:
    """Whether the path is a run directory with checkpoints, its directory of checkpoints, or one checkpoint.

    Other programs have directories called 'checkpoints' too, which hold weights files.

    Raises:
        UserError: it is a run directory without checkpoints.
    """
    if _locate(path) is not None:
        return True
    if path.is_dir() and not files.holds_weights(path) and _is_run(path):
        seeds = sorted(entry.name for entry in path.glob("seed-*"))
        way_out = f"give the directory of one seed: {few(seeds)}" if seeds else "run the training command again"
        raise UserError(f"{path} is a run directory without checkpoints\n  {way_out}")
    return False


def _is_run(path: Path) -> bool:
    try:
        config = read_config(path)
    except UserError:  # of another program
        return False
    return config is not None and {"model", "data", "train"} <= set(config)


def _locate(path: Path) -> tuple[Path, int | None] | None:
    """The run directory, and the step if the path is a single checkpoint; None if there is no checkpoint."""
    if not path.is_dir():
        return None
    path = path.resolve()
    if (path / CHECKPOINTS).is_dir() and _has_checkpoints(path / CHECKPOINTS, path):
        return path, None
    if path.name == CHECKPOINTS and _has_checkpoints(path):
        return path.parent, None
    if path.parent.name == CHECKPOINTS and _is_checkpoint(path):
        return path.parent.parent, int(path.name)
    return None


def _has_checkpoints(path: Path, *others: Path) -> bool:
    """Whether a directory called 'checkpoints' is of a run: it has a checkpoint, or nothing here holds weights."""
    below = [entry for entry in path.iterdir() if entry.is_dir()]
    return any(map(_is_checkpoint, below)) or not any(map(files.holds_weights, (path, *below, *others)))


def _is_checkpoint(path: Path) -> bool:
    """Whether a directory is one of our checkpoints, perhaps a damaged one: its name is a step."""
    return is_step(path.name) and path.is_dir() and ((path / "state").exists() or not files.holds_weights(path))


def describe(path: Path, step: int | str | None) -> tuple[Description, Mapping[str, np.ndarray]]:
    """The model of a checkpoint and its parameters by name: the averaged ones if there are any, as in evaluation.

    Args:
        path: as for `recognise`.
        step: a step, 'best' (by the validation metric) or None for the newest.

    Raises:
        UserError: there is no such checkpoint, or it does not contain the model that its config describes.
    """
    workdir, named = _locate(path)
    manager = CheckpointManager(workdir, read_only=True)
    step = manager.find(named if step is None else step)
    kind, parameters, others, config = _read(manager, step)
    notes = (f"the {'averaged ' if kind == AVERAGED else ''}parameters of step {step}",)
    return _description(LABEL, parameters, kind, others, config, notes, _inputs(workdir)), parameters


def _inputs(workdir: Path) -> InputSpec | None:
    """The images and class names of a run; None if they are unknown."""
    try:
        return input_spec.read(workdir)
    except UserError:  # the parameters do not need it
        return None


def _read(manager: CheckpointManager, step: int) -> tuple[str, dict[str, np.ndarray], list[str], dict[str, Any]]:
    """AVERAGED or PARAMETERS, these parameters by name, the names of the other arrays, and the config."""
    content = manager.content(step)
    config = content["metadata"].get("config")
    if config is None:
        raise UserError(
            f"the checkpoint of step {step} contains no config\n  use another checkpoint: step=N, or --step=N"
        )
    names = list(content["digests"])
    kind = AVERAGED if any(name.startswith(f"{AVERAGED}/") for name in names) else PARAMETERS
    parameters = manager.read_part(step, kind)
    return kind, parameters, [name for name in names if name not in parameters], config


def average(path: Path, steps: list[int], target: Path) -> None:
    """Writes the mean of the parameters of several checkpoints, computed in float64, to a .safetensors file.

    Uses the same parameters as `describe`. The file has the config of the newest checkpoint, the images and class names
    of the run, and digests of its own.

    Args:
        path: a run directory.
        steps: of the checkpoints.
        target: the file.

    Raises:
        UserError: a checkpoint is corrupt, or the file cannot be written.
    """
    manager, sums = CheckpointManager(path, read_only=True), {}
    for step in sorted(steps):
        kind, parameters, _, config = _read(manager, step)
        for name, array in parameters.items():
            name = f"{PARAMETERS}/{name.removeprefix(kind + '/')}"
            sums[name] = sums.get(name, 0.0) + array.astype(np.float64)
    means = {name: np.asarray(total / len(steps), np.float32) for name, total in sums.items()}
    inputs = _inputs(path)
    content = {"config": config, "steps": sorted(steps), "digests": integrity.digests(means)}
    content["inputs"] = None if inputs is None else dataclasses.asdict(inputs)
    files.write_safetensors(target, means, {SEALED: atomic.to_json(integrity.seal(content))})


def is_ours(stored: Stored) -> bool:
    """Whether a file was written by `average`."""
    return SEALED in stored.metadata


def describe_file(stored: Stored) -> tuple[Description, Mapping[str, np.ndarray]]:
    """The model of a file written by `average`, and its parameters by name.

    Raises:
        UserError: the file is corrupt.
    """
    try:
        content = json.loads(stored.metadata[SEALED])
    except ValueError:
        content = None
    if not integrity.is_sealed(content):
        raise UserError(
            "the file is corrupt: its header changed since it was written\n"
            "  average the checkpoints again: python -m vit_jax.checkpoints average --help"
        )
    parameters = dict(stored.arrays)
    found = integrity.digests(parameters)
    changed = [name for name in {**found, **content["digests"]} if found.get(name) != content["digests"].get(name)]
    if changed:
        raise UserError(
            f"the file is corrupt: {few(changed, 6)} changed since it was written\n"
            "  average the checkpoints again: python -m vit_jax.checkpoints average --help"
        )
    notes = (f"the mean of the parameters of steps {few(map(str, content['steps']), 6)}",)
    inputs = content.get("inputs")  # files of older versions have none
    inputs = None if inputs is None else input_spec.from_dict(inputs)
    return _description(AVERAGE, parameters, PARAMETERS, [], content["config"], notes, inputs), parameters


def _description(
    label: str,
    parameters: Mapping[str, np.ndarray],
    kind: str,
    others: list[str],
    config: Mapping[str, Any],
    notes: tuple[str, ...],
    inputs: InputSpec | None,
) -> Description:
    # In pre-training the model is a submodule.
    is_pretraining = any(name.startswith(f"{kind}/{BACKBONE}/") for name in parameters)
    prefix = f"{kind}/{BACKBONE}/" if is_pretraining else f"{kind}/"
    shapes = {name[len(prefix) :]: array.shape for name, array in parameters.items() if name.startswith(prefix)}
    data = config.get("data") or {}
    side = data.get("image_size")
    image_size = (side, side) if side is not None else None if inputs is None else inputs.image_shape[:2]
    model = _model(config, shapes, image_size)
    check_depth(model.depth, shapes)
    channels = shapes.get("embedding/projection/kernel", (0,))[0] // model.patch_size**2
    if model.stem is not None:
        channels = shapes.get("stem/convolution_root/kernel", (0, 0, 0))[2]
    if not channels:
        raise UserError(
            f"its config says model.variant={config['model']['variant']!r}, which its patch embedding does not have\n"
            "  use the config.json that the run wrote"
        )
    choices = Choices({})
    grid = _grid(shapes, model, image_size, choices)
    rules = _rules(parameter_shapes(model, grid, channels), shapes, prefix, model.depth)
    ignored = {
        name: "the averaged parameters are used" if name.startswith(f"{PARAMETERS}/") else "training state"
        for name in others
    }
    ignored |= {
        name: "the decoder of pre-training" if "/decoder/" in name else "used in pre-training only"
        for name in parameters
        if not name.startswith(prefix)
    }
    check_names([*parameters, *ignored], rules, ignored, (), label)
    labels, name = data.get("labels") or (), data.get("normalization", "set")
    names = labels.split(",") if isinstance(labels, str) else labels  # older configs have 'label,parity'
    return Description(
        label,
        model,
        channels,
        grid,
        tuple(rules),
        ignored,
        decisions=tuple(choices.made),
        notes=notes,
        head_name=names[0] if len(names) == 1 else None,
        normalization=name,
        recorded_size=image_size,
        evaluation=_evaluation(config),
        **_recorded(inputs, model, channels, name),
    )


def _recorded(inputs: InputSpec | None, model: VisionTransformer, channels: int, name: str) -> dict[str, Any]:
    """The fields of `Description` that come from data.json, where it is that of the model, and the config's `name`."""
    try:
        found = {"statistics": normalization.constants(name, channels)}
    except UserError:  # of another number of channels: the config was changed
        found = {}
    if inputs is not None and len(inputs.mean) == channels:
        found["statistics"] = inputs.mean, normalization.divisors(inputs.std)
    if inputs is not None and list(map(len, inputs.classes.values())) == [model.classes]:
        found["class_names"] = next(iter(inputs.classes.values()))
    return found


def _evaluation(config: Mapping[str, Any]) -> dict[str, Any]:
    """How the run decodes images in evaluation, its loss and its test-time views, as `preprocessing.EVALUATION`."""
    options = {**(config.get("augment") or {}), **(config.get("train") or {})}
    unusual = {"loss": options.get("loss") != "softmax", **dict.fromkeys(("test_flip", "test_shift"), True)}
    found = {name: options[name] for name, is_unusual in unusual.items() if options.get(name) and is_unusual}
    return {**AS_IN_TRAINING, **found}


def check_depth(depth: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Checks the number of blocks against the stored arrays, before a model with so many is built.

    Args:
        depth: number of blocks by the config.
        shapes: of the arrays, by their names in the model or in a checkpoint.

    Raises:
        ValueError: the arrays have another number of blocks.
    """
    single = {int(match[1]) for name in shapes if (match := re.search(r"\bencoder/block_(\d+)/", name))}
    stacked = {shape[0] for name, shape in shapes.items() if re.search(r"\bencoder/blocks/", name) and shape}
    found = max(single) + 1 if single else max(stacked, default=depth)
    if found != depth:
        raise ValueError(f"the config has model.depth={depth:,}, but the arrays are those of {found:,} blocks")


def _model(
    config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], image_size: tuple[int, int] | None
) -> VisionTransformer:
    try:
        # The attention backend depends on the machine, not on the parameters.
        section = {key: value for key, value in config["model"].items() if key != "attention_kernel"}
        fields = variants.fields_of_options(section)
        model = _with_grid(VisionTransformer(classes=_classes(shapes), **{**fields, "scan": False}), image_size)
        if (model.position_grid or 0) > MAX_GRID:  # its table of positions would not fit into memory
            raise ValueError(f"position_grid is {model.position_grid:,}: more than {MAX_GRID:,} patches per side")
        return model
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"its config is not valid in this version: {error}\n  use the version that trained the run"
        ) from None


def _rules(paths: Iterable[str], shapes: Mapping[str, tuple[int, ...]], prefix: str, depth: int) -> list[Rule]:
    """One rule per parameter; per parameter of a block, if the checkpoint has the blocks stacked (`scan`)."""
    is_stacked = any(name.startswith("encoder/blocks/") for name in shapes)
    rules = []
    for path in paths:
        if not is_stacked or not path.startswith("encoder/block_"):
            rules.append(Rule((prefix + path,), (path,), forms.SAME))
        elif path.startswith("encoder/block_0/"):
            block = Rule((prefix + path.replace("block_0", "blocks"),), (path,), forms.SAME)
            rules.append(forms.scanned(block, depth))
    return rules


def _with_grid(model: VisionTransformer, image_size: tuple[int, int] | None) -> VisionTransformer:
    """The model with its training grid as `position_grid`, if its positions are computed and the grid is square."""
    if model.position != "sincos_2d" or model.position_grid is not None or image_size is None:
        return model
    rows, columns = token_grid(model, image_size)
    return model.clone(position_grid=rows) if rows == columns else model


def _classes(shapes: Mapping[str, tuple[int, ...]]) -> int | dict[str, int] | None:
    """The number of classes of the head, or of each head by name; None without a head."""
    found = {}
    for name, shape in shapes.items():
        match = re.fullmatch(r"head/(?:(\w+)/)?logits/kernel", name)
        if match:
            found[match[1]] = shape[1]
    return found.get(None, found or None)


def _grid(
    shapes: Mapping[str, tuple[int, ...]],
    model: VisionTransformer,
    image_size: tuple[int, int] | None,
    choices: Choices,
) -> tuple[int, int] | None:
    """Rows and columns of the position embedding, whether it is at the input or in the layers; None without one."""
    tables = {name.split("/")[-1]: shape for name, shape in shapes.items() if "positions/" in name}
    if "table" in tables:
        return choices.grid(tables["table"][-2] - int(model.class_token), pixels_per_patch(model), image_size)
    if "rows" in tables:
        return tables["rows"][-2], tables["columns"][-2]
    if "offsets" in tables:
        return tuple((size + 1) // 2 for size in tables["offsets"][-2:])
    return None
