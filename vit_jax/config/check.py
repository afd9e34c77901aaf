"""The check of a whole config: everything that needs neither data nor devices."""

from ml_collections import ConfigDict

from vit_jax import objectives, paths
from vit_jax.config.load import check_values
from vit_jax.config.option import MAX_SEED
from vit_jax.config.schema import INIT_FROM, OPTIONS
from vit_jax.errors import UserError
from vit_jax.training import build_model, stored_features


def check_config(config: ConfigDict) -> None:
    """Checks a config: each option by itself, that something reads every option that is set, and rules across sections.

    Raises:
        UserError: an unknown or missing option, an impossible value or combination, or an option that has no effect
            under the others; the message says which, what was given and what is allowed.
    """
    check_values(config)
    _check_paths(config)
    _check_length(config)
    _check_sources(config)
    _check_seeds(config)
    _check_unread(config)
    _check_loss_weights(config)
    stored_features.check_config(config)
    _check_augment(config)
    _check_model(config)


def _check_paths(config: ConfigDict) -> None:
    for name in ("data.dir", "data.cache_dir", "data.features", "checkpoint.init_from"):
        section, key = name.split(".")
        if config[section][key] is not None:
            paths.check_source(config[section][key], f"config.{name}")


def _check_length(config: ConfigDict) -> None:
    train = config.train
    if (train.steps is None) == (not train.epochs):
        raise UserError(
            f"config.train.steps is {train.steps} and config.train.epochs is {train.epochs}\n"
            "  allowed: exactly one of the two"
        )
    if train.batch_size == "auto":
        return
    if train.batch_size % train.accumulation:
        raise UserError(
            f"config.train.batch_size is {train.batch_size}, not divisible into {train.accumulation} microbatches\n"
            "  allowed: a multiple of config.train.accumulation"
        )
    if train.batch_size % config.augment.repeats:
        raise UserError(
            f"config.augment.repeats is {config.augment.repeats}\n"
            f"  allowed: a divisor of config.train.batch_size, {train.batch_size}"
        )


def _check_sources(config: ConfigDict) -> None:
    """Checks that what the run starts from, and what it is evaluated on, is given."""
    if INIT_FROM in (config.model.variant, config.data.normalization):
        raise UserError(
            "config.checkpoint.init_from is None, but the config takes its model or normalization from it\n"
            "  set it to a run directory or a file (docs/weights.md): --config.checkpoint.init_from=PATH"
        )
    if config.data.test is None and config.data.validation is None:
        raise UserError(
            "config.data.test and config.data.validation are None: there is no split to evaluate on\n"
            "  set one of them, for example --config.data.validation='train[98%:]'"
        )


def _check_seeds(config: ConfigDict) -> None:
    seeds = config.train.seeds
    if seeds is None:
        return
    if config.train.batch_size == "auto":
        raise UserError(
            f"config.train.seeds is {seeds!r}, with config.train.batch_size='auto'\n"
            "  allowed: a number for config.train.batch_size, such as the one that a run of a single seed prints"
        )
    if config.mesh.distributed:
        raise UserError(
            f"config.train.seeds is {seeds!r}, with config.mesh.distributed\n"
            "  train one seed per command in a cluster: --config.train.seed=SEED"
        )
    if isinstance(seeds, int) and config.train.seed + seeds > MAX_SEED + 1:
        raise UserError(
            f"config.train.seeds is {seeds}, and config.train.seed is {config.train.seed}\n"
            f"  allowed: seeds up to {MAX_SEED}"
        )
    if isinstance(seeds, tuple) and config.train.seed != OPTIONS["train"]["seed"].default:
        text = OPTIONS["train"]["seeds"].text(seeds)
        raise UserError(
            f"config.train.seed is {config.train.seed}, which has no effect with train.seeds={text}\n"
            "  allowed: 0 (the default), or train.seeds as a number of seeds that start at train.seed"
        )


def _check_unread(config: ConfigDict) -> None:
    """Refuses options that are not at their defaults although nothing reads them, see `Option.read_by`."""
    for section, keys in OPTIONS.items():
        for key, option in keys.items():
            reason = option.unread_reason(f"{section}.{key}", config)
            if reason is not None and config[section][key] != option.default:
                raise UserError(reason)


def _check_loss_weights(config: ConfigDict) -> None:
    if config.train.loss_weights is None:
        return
    labels, weights = config.data.labels, dict(config.train.loss_weights)
    text = OPTIONS["train"]["loss_weights"].text(config.train.loss_weights)
    if not set(weights) <= set(labels):
        allowed = ",".join(f"{label}=1" for label in labels)
        raise UserError(
            f"config.train.loss_weights is {text!r}\n  allowed: weights of config.data.labels, as '{allowed}'"
        )
    if not any(weights.get(label, 1) for label in labels):
        raise UserError(f"config.train.loss_weights is {text!r}\n  allowed: at least one weight above 0")


def _check_augment(config: ConfigDict) -> None:
    section = config.augment
    if section.crop_padding and section.resized_crop:
        raise UserError(
            f"config.augment.resized_crop is True and crop_padding is {section.crop_padding}\n"
            "  allowed: one of the two crops; set crop_padding=0 or resized_crop=False"
        )
    for name in ("crop_area", "erasing_area"):
        minimum, maximum = section[f"min_{name}"], section[f"max_{name}"]
        if minimum > maximum:
            raise UserError(f"config.augment.min_{name} is {minimum:g}\n  allowed: at most max_{name}, {maximum:g}")


def _check_model(config: ConfigDict) -> None:
    """Checks that the model and what the objective builds around it can be built."""
    if not objectives.make(config).needs_labels and config.model.pooling == "map":
        raise UserError(
            f"config.model.pooling is 'map', which config.train.objective={config.train.objective!r} does not train\n"
            "  allowed: 'token' or 'mean'"
        )
    try:
        built = build_model.build(config.model, classes=2, dtype="float32")
        objectives.make(config).make_module(built, (0.5,), (0.5,))
    except ValueError as error:
        raise UserError(f"config.model: {error}") from None
