"""Every option there is: its default, its unit, one line of meaning; and the check of a whole config."""

import dataclasses
import difflib
import importlib.util
import inspect
import math
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, config_dict

from vit_jax.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
INIT_FROM = "init_from"  # of options that are as the parameters to start from have them


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a config.

    Attributes:
        default: its value where a config says nothing. None means "not set", and is allowed there, and where
            `optional` says so.
        kind: bool, int, float or str.
        meaning: one line, with the unit.
        least: the smallest number allowed.
        below: numbers must stay under this.
        choices: the values allowed, where they are few.
        optional: None is allowed although it is not the default.
        words: texts allowed besides.
    """

    default: Any
    kind: type
    meaning: str
    least: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    optional: bool = False

    def may_be_none(self) -> bool:
        """Whether None is allowed."""
        return self.optional or self.default is None

    def allowed(self) -> str:
        """What may be given, in words."""
        words = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}[self.kind]
        if self.choices:
            words = " or ".join(repr(choice) for choice in self.choices)
        if self.least is not None:
            words += f" of at least {self.least:g}"
        if self.below is not None:
            words += f" below {self.below:g}"
        words += "".join(f" or {word!r}" for word in self.words)
        return words + (", or None" if self.may_be_none() else "")


OPTIONS: dict[str, dict[str, Option]] = {
    "model": {
        "variant": Option(
            "Ti/4",
            str,
            "size and patch size (pixels): Ti, S, B, L, H or a hybrid, a slash, any patch size; "
            "or init_from: the model that checkpoint.init_from holds",
        ),
        "width": Option(None, int, "size of a token; None: the variant's", least=1),
        "depth": Option(None, int, "encoder blocks; None: the variant's", least=1),
        "heads": Option(None, int, "attention heads; None: the variant's", least=1),
        "mlp_width": Option(None, int, "hidden width of the MLPs; None: the variant's", least=1),
        "class_token": Option(None, bool, "a class token before the patches; None: where pooling needs one"),
        "registers": Option(0, int, "learned tokens besides that no head reads", least=0),
        "pooling": Option("token", str, "what the head reads", choices=("token", "mean", "map")),
        "position": Option("learned", str, "position embedding; see docs/models.md"),
        "position_at": Option(None, str, "where it acts: input, layers or shared; None: where its kind usually does"),
        "position_width": Option(0, int, "channels it is concatenated in; 0: it is added", least=0),
        "position_grid": Option(
            None, int, "patches a side of the grid that sincos_2d is of; None: as the images have", least=1
        ),
        "mlp": Option("gelu", str, "MLP of the blocks: gelu or swiglu"),
        "gelu": Option("tanh", str, "form of the GELU: tanh or exact"),
        "qkv_bias": Option(True, bool, "queries, keys and values have a bias"),
        "qk_norm": Option(False, bool, "queries and keys are normalised, each head by itself"),
        "layer_scale": Option(
            None, float, "start of the learned factors on the branches; None: no such factors", least=0
        ),
        "parallel": Option(False, bool, "attention and MLP side by side"),
        "layer_norm_epsilon": Option(1e-6, float, "added to the variance", least=0),
        "pre_logits": Option(
            None, int, "width of a Dense + tanh layer before the classifier; None: no such layer", least=1
        ),
        "head_bias": Option(0.0, float, "start of the biases of the classes; -10 suits the sigmoid loss"),
        "norm_after_pooling": Option(False, bool, "the last LayerNorm acts on the patches' mean, not before it"),
        "dropout": Option(0.0, float, "rate after the position embedding and the dense layers", least=0, below=1),
        "attention_dropout": Option(0.0, float, "rate on the attention weights", least=0, below=1),
        "stochastic_depth": Option(0.0, float, "rate of the last block's branches", least=0, below=1),
        "stochastic_depth_schedule": Option("linear", str, "over the blocks: linear from 0, or constant"),
        "remat": Option(
            False,
            bool,
            "compute blocks again in the backward pass; True or full: all, dots: but for products; see docs/models.md",
            words=("none", "full", "dots", "dots_no_batch"),
        ),
        "scan": Option(False, bool, "compile one block and run it depth times: a faster compile"),
        "attention_kernel": Option(
            "auto",
            str,
            "backend of attention; auto: the fastest for the device and the run's shapes, timed at the start on a GPU",
            choices=("auto", "plain", "heads_first", "cudnn", "pallas", "pallas_two_pass_64", "pallas_two_pass_32"),
        ),
        "dtype": Option(
            "auto",
            str,
            "arithmetic; auto: float32 on CPU, bfloat16 on accelerators; on CPU bfloat16 is for the products alone",
            choices=("auto", "float32", "bfloat16"),
        ),
    },
    "data": {
        "name": Option("digits", str, "digits (embedded), folder, arrays, or a set of TFDS: cifar10, ..."),
        "labels": Option(
            "label", str, "what is learned; several of the set's kinds of label get a head each: 'label,coarse_label'"
        ),
        "features": Option(
            None, str, "folder of stored features (python -m vit_jax.features) that heads are trained on, not images"
        ),
        "train": Option("train", str, "training split, in TFDS's syntax: 'train', 'train[:98%]', ..."),
        "validation": Option(None, str, "validation split, e.g. 'train[98%:]'; None: no validation"),
        "test": Option(
            "test", str, "test split; None: it is left alone, and the validation split is reported", optional=True
        ),
        "image_size": Option(None, int, "height and width of the images, pixels; None: as they are", least=1),
        "dir": Option(None, str, "of folder and arrays; or of TFDS's, None: TFDS_DATA_DIR or ~/tensorflow_datasets"),
        "skip_broken": Option(False, bool, "of a folder: leave out files that cannot be decoded, and count them"),
        "cache_dir": Option(None, str, "where decoded sets are kept; None: ~/.cache/vit_jax/data"),
        "decoded": Option(True, bool, "keep decoded images on disk; False: decode them each time they are read"),
        "workers": Option(4, int, "threads that read what is not resident; 0: nothing is read ahead of use", least=0),
        "ahead": Option(2, int, "dispatches that they read ahead", least=1),
        "worker_timeout": Option(120.0, float, "seconds that reading one image may take", least=0.001),
        "normalization": Option(
            "set",
            str,
            "mean and std of the pixels: of the set's train split, 0.5 and 0.5, ImageNet's, or as init_from's were",
            choices=("set", "half", "imagenet", "init_from"),
        ),
        "patches": Option(False, bool, "deliver normalised flattened patches in place of images"),
        "resident": Option(
            "auto",
            str,
            "keep the whole set on the device; auto: where it fits",
            choices=("auto", "always", "never"),
        ),
    },
    "augment": {
        "crop_padding": Option(0, int, "random crop from the image padded by so many pixels a side", least=0),
        "crop_border": Option("black", str, "what these pixels are", choices=("black", "reflect")),
        "resized_crop": Option(False, bool, "random crop of random area and ratio, scaled to the image's size"),
        "min_crop_area": Option(0.08, float, "of resized_crop: least share of the area", least=0.01, below=1.0001),
        "max_crop_area": Option(1.0, float, "of resized_crop: largest share of the area", least=0.01, below=1.0001),
        "crop_ratio": Option(4 / 3, float, "of resized_crop: largest ratio of the sides, either way", least=1),
        "flip": Option(False, bool, "mirror half of the images, at random"),
        "rotation": Option(0.0, float, "turn by up to so many degrees, at random", least=0, below=180.0001),
        "scaling": Option(0.0, float, "enlarge or shrink by up to this share, at random", least=0, below=1),
        "policy": Option(
            "none",
            str,
            "operations drawn for each image; see docs/data.md",
            choices=("none", "rand_augment", "trivial_augment", "auto_augment", "three_augment"),
        ),
        "policy_operations": Option(2, int, "of rand_augment: operations an image (n)", least=1),
        "policy_magnitude": Option(9.0, float, "of rand_augment: their strength (m), 0 to 10", least=0, below=10.0001),
        "policy_std": Option(0.5, float, "of rand_augment: standard deviation of the strength", least=0),
        "policy_probability": Option(
            0.5, float, "of rand_augment: with which each operation is done", least=0, below=1.0001
        ),
        "fill": Option("mean", str, "what a policy moves in from outside the image", choices=("mean", "black", "grey")),
        "brightness": Option(0.0, float, "colour jitter by a factor of 1 - x to 1 + x", least=0),
        "contrast": Option(0.0, float, "likewise", least=0),
        "saturation": Option(0.0, float, "likewise", least=0),
        "hue": Option(0.0, float, "colour jitter by up to this share of the circle, either way", least=0, below=0.5001),
        "erasing": Option(0.0, float, "share of the images that lose a random rectangle", least=0, below=1.0001),
        "erasing_mode": Option(
            "constant", str, "what stands there: the mean, or normal noise", choices=("constant", "noise")
        ),
        "min_erasing_area": Option(0.02, float, "least share of the area it has", least=0, below=1),
        "max_erasing_area": Option(1 / 3, float, "largest share of the area it has", least=0, below=1),
        "erasing_ratio": Option(10 / 3, float, "largest ratio of its sides, either way", least=1),
        "mixup": Option(
            0.0, float, "alpha of mixup: each image blended with another, by Beta(alpha, alpha); 0: off", least=0
        ),
        "cutmix": Option(
            0.0, float, "alpha of cutmix: a rectangle taken from another, by Beta(alpha, alpha); 0: off", least=0
        ),
        "mix_probability": Option(1.0, float, "with which images are mixed at all", least=0, below=1.0001),
        "mix_switch": Option(0.5, float, "share of cutmix where mixup is on too", least=0, below=1.0001),
        "mix_per": Option("example", str, "who draws: each example, or the batch as one", choices=("example", "batch")),
        "repeats": Option(
            1, int, "times each example stands in a batch, augmented anew; a pass then takes so many epochs", least=1
        ),
        "test_flip": Option(False, bool, "evaluate the mean over image and mirror image"),
        "test_shift": Option(
            0, int, "evaluate the mean over the image and its shifts by so many pixels in four directions", least=0
        ),
    },
    "optimizer": {
        "name": Option("adamw", str, "the rule", choices=("adamw", "adam", "sgd")),
        "learning_rate": Option(1e-3, float, "peak learning rate", least=0),
        "schedule": Option("cosine", str, "course after the warm-up", choices=("cosine", "linear", "constant")),
        "warmup_steps": Option(0, int, "steps in which the rate rises from 0", least=0),
        "final_learning_rate": Option(0.0, float, "rate at the last step (cosine, linear)", least=0),
        "weight_decay": Option(
            0.0, float, "on matrices alone; adamw: decoupled, others: added to the gradient", least=0
        ),
        "beta1": Option(0.9, float, "Adam's decay of the mean", least=0, below=1),
        "beta2": Option(0.999, float, "Adam's decay of the square", least=0, below=1),
        "epsilon": Option(1e-8, float, "Adam's epsilon", least=0),
        "momentum": Option(0.9, float, "SGD's momentum", least=0, below=1),
        "layer_decay": Option(
            1.0, float, "factor of the rate from each block to the one below it; 1: all alike", least=0, below=1.0001
        ),
        "gradient_clip": Option(None, float, "largest global norm of the gradient; None: not clipped", least=0),
        "trained": Option(
            None, str, "patterns of the parameters' names that are trained, the rest frozen: 'head/*'; None: all"
        ),
        "frozen": Option(None, str, "patterns of those that are not: 'embedding/*,positions/*'; None: none"),
        "average_decay": Option(
            0.0, float, "decay of the averaged parameters, which are then the ones evaluated; 0: none", least=0, below=1
        ),
    },
    "train": {
        "seed": Option(0, int, "everything random follows from it", least=0, below=2**31),
        "seeds": Option(
            None, str, "several runs, with mean and spread: how many, from seed on ('5'), or which ('0,3,7'); None: one"
        ),
        "seeds_at_once": Option(
            None, int, "number of seeds to vectorize in one program; None: one after another", least=1
        ),
        "batch_size": Option(
            128,
            int,
            "examples an update, over all devices and microbatches; auto: the most that fit an accelerator's memory",
            least=1,
            words=("auto",),
        ),
        "steps": Option(None, int, "updates; None: by epochs", least=1),
        "epochs": Option(None, float, "passes over the training split; None: by steps", least=0),
        "accumulation": Option(1, int, "microbatches an update is summed from", least=1),
        "loss_weights": Option(
            None, str, "factors of several heads' losses: 'label=1,coarse_label=0.5'; None: 1 for each"
        ),
        "objective": Option(
            "classify",
            str,
            "what is learned: classes, or what hidden patches were; see docs/pretraining.md",
            choices=("classify", "masked_patches", "masked_autoencoder"),
        ),
        "loss": Option(
            "softmax",
            str,
            "of classes: cross-entropy over all of them, or of each by itself, summed",
            choices=("softmax", "sigmoid"),
        ),
        "masked_share": Option(
            None,
            float,
            "share of the patches that are hidden; None: 0.5 of masked_patches, 0.75 of masked_autoencoder",
            least=0.001,
            below=1,
        ),
        "label_smoothing": Option(0.0, float, "share of the label spread over all classes", least=0, below=1),
        "evaluate_every": Option(0, int, "steps between evaluations; 0: at the end alone", least=0),
        "evaluation_batch_size": Option(None, int, "examples a step of evaluation; None: as batch_size", least=1),
        "steps_per_dispatch": Option(
            50, int, "the most updates that the device makes between two words with the host", least=1
        ),
        "max_minutes": Option(None, float, "save and stop after so many minutes; the same command goes on", least=0),
    },
    "decoder": {
        "width": Option(128, int, "of masked_autoencoder's decoder: size of a token", least=4),
        "depth": Option(2, int, "of it: blocks", least=1),
        "heads": Option(4, int, "of it: attention heads", least=1),
        "mlp_width": Option(512, int, "of it: hidden width of the MLPs", least=1),
        "normalize_patches": Option(True, bool, "it tells pixels normalised within their patch, not as they are"),
    },
    "checkpoint": {
        "every": Option(0, int, "steps between checkpoints; 0: at the end, and at each new best validation", least=0),
        "init_from": Option(
            None, str, "parameters to start from: a run's folder, or any file that docs/weights.md lists; None: random"
        ),
        "init_head": Option(
            "keep",
            str,
            "head of init_from: kept where its classes agree; or new: a layer of zeros in place of the whole head",
            choices=("keep", "new"),
        ),
        "keep": Option(2, int, "how many of the newest are kept", least=1),
        "keep_best": Option(
            1, int, "how many of the best on validation (accuracy, else loss) are kept besides", least=0
        ),
    },
    "mesh": {
        "devices": Option(None, int, "devices to use; None: all", least=1),
        "distributed": Option(False, bool, "join the other processes of a cluster (jax.distributed.initialize)"),
    },
    "log": {
        "every": Option(50, int, "steps between records; train/... are means over them", least=1),
        "tensorboard": Option(True, bool, "write TensorBoard events beside metrics.jsonl"),
        "profile": Option(
            None, str, "steps 'START:STOP' whose course on the devices is written to WORKDIR/profile; None: of none"
        ),
    },
}


def default() -> ConfigDict:
    """A config with every option at its default, locked: a misspelt name raises where it is written."""

    def start(option: Option) -> Any:
        if option.words:  # values of two types
            return config_dict.FieldReference(option.default, field_type=object)
        # A placeholder is None that knows its type, so that a whole number given for a float becomes one.
        return config_dict.placeholder(option.kind) if option.default is None else option.default

    sections = {name: {key: start(option) for key, option in section.items()} for name, section in OPTIONS.items()}
    return ConfigDict(sections).lock()


def from_dict(values: dict[str, dict[str, Any]]) -> ConfigDict:
    """The config of a config.json.

    Raises:
        UserError: it has an option that does not exist (any more), or a value that is not allowed.
    """
    config = default()
    for section, keys in values.items():
        for key, value in keys.items():
            _option(f"{section}.{key}", value)
            config[section][key] = value
    check(config)
    return config


def names() -> list[str]:
    """All options, as 'section.key'."""
    return [f"{section}.{key}" for section, keys in OPTIONS.items() for key in keys]


def load(spec: str) -> ConfigDict:
    """The config of 'FILE' or 'FILE:ARG': what `get_config()` or `get_config(ARG)` of that Python file returns.

    FILE is looked for from the current folder, then from the project's own, so that configs/... works from anywhere.

    Raises:
        UserError: no such file, no get_config in it, an argument that it refuses, or an option that does not exist.
    """
    path, _, argument = spec.partition(":")
    file = next((p for p in (Path(path).expanduser(), ROOT / path) if p.is_file()), None)
    if file is None:
        known = ", ".join(sorted(f"configs/{p.name}" for p in (ROOT / "configs").glob("*.py") if p.stem != "__init__"))
        raise UserError(f"--config={spec}: there is no file {path}\n  known: {known}")
    try:
        module_spec = importlib.util.spec_from_file_location(f"config_{file.stem}", file)
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--config={spec}: {file} does not run: {_one_line(error)}") from error
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"--config={spec}: {file} has no function get_config")
    if argument and not inspect.signature(module.get_config).parameters:
        raise UserError(f"--config={spec}: {file} takes no argument\n  given: {argument}")
    try:
        config = module.get_config(argument) if argument else module.get_config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"--config={spec}: {_one_line(error)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config={spec}: get_config returned {type(config).__name__}, not an ml_collections.ConfigDict"
        )
    return config


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def override(config: ConfigDict, assignment: str) -> None:
    """Applies one 'section.key=value' of the command line to `config`.

    Raises:
        UserError: no such option, or a value of the wrong type.
    """
    name, equals, text = assignment.partition("=")
    option = _option(name, text if equals else None)
    if not equals:
        raise UserError(f"--config.{name} has no value\n  allowed: --config.{name}={option.allowed()}")
    section, key = name.split(".")
    config[section][key] = _parse(name, option, text)


def _option(name: str, given: Any) -> Option:
    section, _, key = name.partition(".")
    option = OPTIONS.get(section, {}).get(key)
    if option is not None:
        return option
    # A name in the wrong section is as frequent a mistake as a misspelt one.
    near = [known for known in names() if key and known.split(".")[1] == key]
    near += difflib.get_close_matches(name, names(), n=1, cutoff=0.0)
    known = OPTIONS[near[0].split(".")[0]][near[0].split(".")[1]]
    shown = "" if given is None else f" (given: {given})"
    raise UserError(f"config.{name} is no option{shown}\n  nearest: config.{near[0]}, {known.meaning}")


def _parse(name: str, option: Option, text: str) -> Any:
    if text == "None" and option.may_be_none():
        return None
    if text in option.words:
        return text
    try:
        if option.kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[text.lower()]
        if option.kind is int:
            number = float(text) if not text.lstrip("+-").isdigit() else int(text)
            if number != int(number):
                raise ValueError
            return int(number)
        return option.kind(text)
    except (ValueError, KeyError, OverflowError):
        raise UserError(f"config.{name} is {text!r}\n  allowed: {option.allowed()}") from None


def check(config: ConfigDict) -> None:
    """Checks everything about a config that needs neither data nor devices.

    Raises:
        UserError: an unknown or missing option, a wrong type, or an impossible value or combination; it says which,
            what was given and what is allowed.
    """
    for section, keys in config.items():
        if section not in OPTIONS or not isinstance(keys, ConfigDict):
            near = difflib.get_close_matches(section, OPTIONS, n=1, cutoff=0.0)[0]
            raise UserError(f"config.{section} is no section\n  nearest: config.{near}")
        for key, value in keys.items():
            _check_value(f"{section}.{key}", _option(f"{section}.{key}", value), value)
    missing = [name for name in names() if name.split(".")[1] not in config.get(name.split(".")[0], {})]
    if missing:
        raise UserError(
            f"config.{missing[0]} is missing\n  start from vit_jax.config.default(), which has every option"
        )
    _check_together(config)


def _check_value(name: str, option: Option, value: Any) -> None:
    if (value is None and option.may_be_none()) or (isinstance(value, str) and value in option.words):
        return
    kinds = (int, float) if option.kind is float else (option.kind,)
    right = isinstance(value, kinds) and (option.kind is bool or not isinstance(value, bool))
    if right and option.kind in (int, float):
        right = math.isfinite(value) and not (option.least is not None and value < option.least)
        right = right and not (option.below is not None and value >= option.below)
    if right and option.choices:
        right = value in option.choices
    if not right:
        raise UserError(f"config.{name} is {value!r}\n  allowed: {option.allowed()}")


def _check_together(config: ConfigDict) -> None:
    from vit_jax import objectives
    from vit_jax.data import augment
    from vit_jax.objectives import losses
    from vit_jax.runtime import profiling
    from vit_jax.training import build_model, seeds

    train = config.train
    if (train.steps is None) == (not train.epochs):
        given = f"steps {train.steps}, epochs {train.epochs}"
        raise UserError(f"config.train needs either steps or epochs\n  given: {given}")
    if train.batch_size != "auto" and train.batch_size % train.accumulation:
        raise UserError(
            f"config.train.batch_size is {train.batch_size}, which {train.accumulation} microbatches do not divide\n"
            f"  allowed: a multiple of config.train.accumulation"
        )
    if INIT_FROM in (config.model.variant, config.data.normalization):
        raise UserError(
            "config.checkpoint.init_from is None, and the config starts from parameters that there are\n"
            "  give a run's folder or a file (docs/weights.md): --config.checkpoint.init_from=PATH"
        )
    if config.data.test is None and config.data.validation is None:
        raise UserError(
            "config.data.test and config.data.validation are None: nothing would say how good the model is\n"
            "  give one of them, e.g. --config.data.validation='train[98%:]'"
        )
    losses.loss_weights(config)
    profiling.span(config.log.profile)
    seeds.check(config)
    _check_features(config)
    augment.check(config)
    objectives.check(config)
    try:
        built = build_model.build(config.model, classes=2, dtype="float32")
        objectives.make(config).module(built, (0.5,), (0.5,))
    except ValueError as error:
        raise UserError(f"config.model: {error}") from None


def _check_features(config: ConfigDict) -> None:
    """Heads on stored features: what was computed once can be neither trained nor augmented."""
    if config.data.features is None:
        return
    if config.checkpoint.init_from is None:
        raise UserError(
            "config.data.features needs the backbone that made them\n  give its run as config.checkpoint.init_from"
        )
    patterns = (config.optimizer.trained or "").split(",")
    if not all(pattern.strip().startswith("head/") for pattern in patterns):
        raise UserError(
            f"config.data.features goes with heads alone; config.optimizer.trained is {config.optimizer.trained!r}\n"
            "  allowed: 'head/*', or patterns below it"
        )
    for key, value in config.augment.items():
        if value != OPTIONS["augment"][key].default:
            raise UserError(
                f"config.data.features are of images as they are; config.augment.{key} is {value!r}\n"
                f"  allowed: --config.augment.{key}={OPTIONS['augment'][key].default}"
            )


def differences(old: dict, new: dict) -> list[str]:
    """What differs between two configs as nested dictionaries: 'train.steps: 100 -> 200', in order."""
    rows = []
    for section in sorted({*old, *new}):
        before, after = old.get(section, {}), new.get(section, {})
        for key in sorted({*before, *after}):
            if before.get(key) != after.get(key):
                rows.append(f"{section}.{key}: {before.get(key)} -> {after.get(key)}")
    return rows
