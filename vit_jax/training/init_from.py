"""The state that a run starts or resumes from: random parameters, other parameters, or its newest checkpoint."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vit_jax import config as options
from vit_jax import paths, weights
from vit_jax.checkpoint import input_spec, integrity
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.errors import UserError
from vit_jax.models import variants
from vit_jax.models.vit import VisionTransformer, pixels_per_patch
from vit_jax.progress import Counter
from vit_jax.sharding import multihost
from vit_jax.training import initial_weights, run_directory, stored_features
from vit_jax.training.setup import Experiment
from vit_jax.training.state import ADDED, TrainState
from vit_jax.weights import native
from vit_jax.weights.describe import Description


def complete_config(config: ConfigDict, workdir: Path | None = None) -> None:
    """Fills in what the config takes from `checkpoint.init_from`: `model.variant` and `data.normalization`.

    Options of the model that are at their defaults become those of the file. Others stay; whether they fit the file's
    parameters is checked when these are loaded. With the file's variant, `data.image_size` of a folder is that of the
    file's images, if it is not set.

    Args:
        config: not checked yet.
        workdir: run directory. If a run has begun in it, its config.json has these options, and the file is not needed.

    Raises:
        UserError: the file cannot be read, or no config describes its model.
    """

    def value(section: str, key: str) -> Any:  # the config is not checked yet, and may lack whole sections
        return config.get(section, {}).get(key)

    source = value("checkpoint", "init_from")
    if source is None or options.INIT_FROM not in (value("model", "variant"), value("data", "normalization")):
        return
    if isinstance(source, str):  # else config.check refuses it
        paths.check_source(source, "config.checkpoint.init_from")
    begun = None if workdir is None else _begun(workdir, source)
    if begun is not None:
        normalization, found, size = begun["data"]["normalization"], begun["model"], begun["data"]["image_size"]
    else:
        overrides = {"heads": config.model.heads} if config.model.heads is not None else {}
        description = weights.recognise(source, **overrides)
        normalization, found = description.normalization, None
        size = _image_side(description, source)
    if config.data.normalization == options.INIT_FROM:
        config.data.normalization = normalization
    if config.model.variant == options.INIT_FROM:
        if config.data.name == "folder" and config.data.image_size is None:
            config.data.image_size = size
        _complete_model(config, _model_options(description, source) if found is None else found)


def _image_side(description: Description, source: str) -> int | None:
    """The height and width of the images of a file's model, in pixels; None if they are not recorded, or differ."""
    size, model = description.image_size(), description.model
    if size is None and model.position_grid is not None:
        size = (model.position_grid * pixels_per_patch(model),) * 2
    if size is None and (recorded := input_spec.read(Path(source))) is not None:
        size = recorded.image_shape[:2]
    return size[0] if size is not None and size[0] == size[1] else None


def _begun(workdir: Path, source: str) -> dict[str, Any] | None:
    """The config of the run that has begun in a directory from these weights; None if there is no such run."""
    config = run_directory.recorded_config(workdir)
    config = None if config is None else options.complete(config)
    is_same = config is not None and initial_weights.is_same(workdir, config["checkpoint"]["init_from"], source)
    return config if is_same else None


def _model_options(description: Description, source: str) -> dict[str, Any]:
    """The options of a config that describe a file's model."""
    try:
        found = variants.options_of(description.model)
    except ValueError as error:
        raise UserError(f"config.checkpoint.init_from is {source}: {error}") from None
    if found["pooling"] == "none":  # the file's head, which reads every token, is not used
        found["pooling"] = options.OPTIONS["model"]["pooling"].default
    return found


def _complete_model(config: ConfigDict, found: Mapping[str, Any]) -> None:
    """Sets the variant, and what else describes a model and is at its default."""
    config.model.variant = found["variant"]
    described = variants.options_of(VisionTransformer(classes=None, **variants.fields("Ti/4")))
    for key in described.keys() - {"variant"}:
        if config.model[key] == options.OPTIONS["model"][key].default:
            config.model[key] = found[key]


def initial_state(experiment: Experiment, seed: int, say: Callable[[str], Any]) -> TrainState:
    """Returns the state before the first step: with the parameters of `checkpoint.init_from`, or random ones.

    Raises:
        UserError: the parameters cannot be read or do not fit the model.
    """
    config, path = experiment.config, experiment.config.checkpoint.init_from
    if path is None:
        return experiment.init_state(seed)
    height, width, channels = experiment.image_shape
    new_head = config.checkpoint.init_head == "new"
    parameters, report = weights.load_into(path, experiment.model, (height, width), channels, new_head=new_head)
    say(report.changes(path))
    stored_features.check_backbone(config, parameters, experiment.sources)
    return experiment.init_state(seed, parameters)


def check_depth(config: ConfigDict, content: Mapping[str, Any]) -> None:
    """Raises ValueError if the model of a config has another number of blocks than the arrays of a checkpoint.

    Args:
        config: of the run.
        content: of the checkpoint (`CheckpointManager.content`).
    """
    shapes = {name: integrity.shape_of(text) for name, text in content["digests"].items()}
    model = variants.fields_of_options(config.model.to_dict())
    backbone = {name: shape for name, shape in shapes.items() if "/decoder/" not in name}
    native.check_depth(model["depth"], backbone)


def restore(experiment: Experiment, checkpoints: CheckpointManager, step: int | None = None) -> TrainState:
    """Returns the state of the checkpoint of `step`; None: of the newest intact one.

    Raises:
        UserError: there is none, it is corrupt, or it belongs to another model.
    """
    like = experiment.abstract_state()
    arrays = like.to_arrays()
    with Counter(f"reading a checkpoint from {checkpoints.directory}", enabled=multihost.is_rank_0()):
        if step is None:
            state = like.with_arrays(checkpoints.restore_newest(arrays, optional=ADDED))
        else:
            state = like.with_arrays(checkpoints.restore(arrays, step, optional=ADDED))
    stored_features.check_backbone(experiment.config, state.for_evaluation(), experiment.sources)
    return state


def start(
    experiment: Experiment, seed: int, checkpoints: CheckpointManager, say: Callable[[str], Any]
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the state that a run starts or resumes from, and the metadata of its checkpoint ({} if there is none).

    Raises:
        UserError: as `restore` and `initial_state`. If every checkpoint is corrupt, the run does not silently start
            again from scratch.
    """
    if not multihost.on_rank_0(lambda: bool(checkpoints.steps() or checkpoints.corrupt())):
        return initial_state(experiment, seed, say), {}
    state = restore(experiment, checkpoints)
    step = int(state.step)
    return state, multihost.on_rank_0(lambda: checkpoints.metadata(step))
