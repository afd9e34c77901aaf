"""Every objective there is, by its name in a config, and the check of what a config asks of it."""

from ml_collections import ConfigDict

from vit_jax.errors import UserError
from vit_jax.models import masking
from vit_jax.models.vit import VisionTransformer, token_grid
from vit_jax.objectives.base import Objective
from vit_jax.objectives.classification import Classification
from vit_jax.objectives.masked import Autoencoding, PatchPrediction

OBJECTIVES: dict[str, type[Objective]] = {
    "classify": Classification,
    "masked_patches": PatchPrediction,
    "masked_autoencoder": Autoencoding,
}
# What only a classifier reads.
_OF_LABELS = (
    "train.loss",
    "train.label_smoothing",
    "model.pre_logits",
    "model.head_bias",
    "data.features",
    "augment.test_",
)


def make(config: ConfigDict) -> Objective:
    """The objective that a config describes."""
    return OBJECTIVES[config.train.objective].from_config(config)


def check(config: ConfigDict) -> None:
    """Checks the options of the objective, and that none is set that it does not read.

    Raises:
        UserError: which option, what it is, and what is allowed.
    """
    from vit_jax.config import OPTIONS

    unread = {
        "classify": ("train.masked_share", "decoder."),
        "masked_patches": (*_OF_LABELS, "decoder."),
        "masked_autoencoder": _OF_LABELS,
    }
    name = config.train.objective
    for section, keys in OPTIONS.items():
        for key, option in keys.items():
            if f"{section}.{key}".startswith(unread[name]) and config[section][key] != option.default:
                raise UserError(
                    f"config.{section}.{key} is {config[section][key]!r}, which objective {name!r} does not read\n"
                    f"  allowed: --config.{section}.{key}={option.default}, or another config.train.objective"
                )
    if name != "classify" and (config.model.pooling == "map" or config.model.norm_after_pooling):
        what = "pooling 'map'" if config.model.pooling == "map" else "norm_after_pooling"
        raise UserError(
            f"config.model has {what}, which config.train.objective {name!r} does not train\n"
            "  allowed: pooling 'token' or 'mean', norm_after_pooling False"
        )


def check_shape(config: ConfigDict, model: VisionTransformer, image_size: tuple[int, int]) -> None:
    """Raises ValueError where images of (height, width) `image_size` have too few patches for some to be hidden."""
    if config.train.objective != "classify":
        rows, columns = token_grid(model, image_size)
        masking.hidden_count(0.5, rows * columns)
