"""The state that a run starts or resumes from: random parameters, other parameters, or its newest checkpoint."""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from vit_jax import config as options
from vit_jax import weights
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.errors import UserError
from vit_jax.models import variants
from vit_jax.sharding import multihost
from vit_jax.training import stored_features
from vit_jax.training.setup import Experiment
from vit_jax.training.state import ADDED, TrainState


def complete_config(config: ConfigDict) -> None:
    """Fills in what the config takes from `checkpoint.init_from`: `model.variant` and `data.normalization`.

    Options of the model that are at their defaults become those of the file. Others stay; whether they fit the file's
    parameters is checked when these are loaded.

    Raises:
        UserError: the file cannot be read, or no config describes its model.
    """

    def value(section: str, key: str) -> Any:  # the config is not checked yet, and may lack whole sections
        return config.get(section, {}).get(key)

    source = value("checkpoint", "init_from")
    if source is None or options.INIT_FROM not in (value("model", "variant"), value("data", "normalization")):
        return
    overrides = {"heads": config.model.heads} if config.model.heads is not None else {}
    description = weights.recognise(source, **overrides)
    if config.data.normalization == options.INIT_FROM:
        config.data.normalization = description.normalization
    if config.model.variant != options.INIT_FROM:
        return
    try:
        found = variants.options_of(description.model)
    except ValueError as error:
        raise UserError(f"config.checkpoint.init_from is {source}: {error}") from None
    config.model.variant = found.pop("variant")
    defaults = {key: option.default for key, option in options.OPTIONS["model"].items()}
    if found["pooling"] == "none":  # the file's head, which reads every token, is not used
        found["pooling"] = defaults["pooling"]
    for key, value in found.items():
        if config.model[key] == defaults[key]:
            config.model[key] = value


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
    say(str(report))
    stored_features.check_backbone(config, parameters, experiment.sources)
    return experiment.init_state(seed, parameters)


def restore(experiment: Experiment, checkpoints: CheckpointManager, step: int | None = None) -> TrainState:
    """Returns the state of the checkpoint of `step`; None: of the newest intact one.

    Raises:
        UserError: there is none, it is corrupt, or it belongs to another model.
    """
    like = experiment.abstract_state()
    arrays = like.to_arrays()
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
