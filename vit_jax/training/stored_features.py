"""Training heads on stored features (`config.data.features`): everything that such a run does differently.

The backbone is frozen and its features were computed once (`python -m vit_jax.features`). They are the source in place
of images, they are neither normalized nor augmented, and only the head is applied to them. The run's parameters are
still those of the whole model, so that its checkpoints classify images.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, PRNGKeyArray
from ml_collections import ConfigDict

from vit_jax import config as options
from vit_jax import paths
from vit_jax.data import feature_store
from vit_jax.data.augment import Augment, Targets
from vit_jax.data.feature_store import FeatureSource
from vit_jax.data.sources import Source
from vit_jax.errors import UserError
from vit_jax.models.pooling import Head, Heads
from vit_jax.models.vit import VisionTransformer
from vit_jax.optim import trainable

COMMAND = "python -m vit_jax.features"


class HeadOnly(nn.Module):
    """The head of a model without the model: logits of features, by the parameters `head/...` of the whole model.

    Attributes:
        classes: as of `VisionTransformer`, but not None.
        pre_logits: as of `VisionTransformer`.
    """

    classes: int | Mapping[str, int]
    pre_logits: int | None = None

    @nn.compact
    def __call__(
        self, features: Float[Array, "*leading width"], train: bool = False
    ) -> Float[Array, "*leading classes"] | dict[str, Float[Array, "*leading _"]]:
        """Returns the logits; of several heads, by name."""
        head = Heads if isinstance(self.classes, Mapping) else Head
        return head(self.classes, self.pre_logits, name="head")(features)


class NoAugment(Augment):
    """Returns features unchanged, in training and in evaluation."""

    def __call__(
        self, key: PRNGKeyArray, images: Float[Array, "batch *features"], targets: Targets
    ) -> tuple[Float[Array, "batch *features"], Targets]:
        """Returns features and targets unchanged."""
        return images, targets

    def normalize(self, images: Float[Array, "batch *features"]) -> Float[Array, "batch *features"]:
        """Returns the features unchanged."""
        return images

    def views(self, images: Float[Array, "batch *features"]) -> list[Float[Array, "batch *features"]]:
        """Returns one view: the features unchanged."""
        return [images]


def in_use(sources: Mapping[str, Source]) -> bool:
    """Returns whether a run with these sources trains on stored features."""
    return isinstance(sources["train"], FeatureSource)


def head_and_augment(model: VisionTransformer) -> tuple[HeadOnly, NoAugment]:
    """Returns what training and evaluation apply in place of the model, and in place of augmentation."""
    return HeadOnly(model.classes, model.pre_logits), NoAugment(mean=(), std=())


def check_config(config: ConfigDict) -> None:
    """Checks the options that stored features restrict: parameters to start from, heads only, no augmentation.

    Raises:
        UserError: `config.data.features` is set, and another option does not allow it.
    """
    if config.data.features is None:
        return
    if config.checkpoint.init_from is None:
        raise UserError(
            "config.data.features requires the backbone that computed the features\n"
            "  set config.checkpoint.init_from to its run directory or file"
        )
    patterns, shown = (
        config.optimizer.trained or (),
        options.OPTIONS["optimizer"]["trained"].quoted(config.optimizer.trained),
    )
    if not patterns or not all(pattern.startswith("head/") for pattern in patterns):
        raise UserError(
            f"config.optimizer.trained is {shown}, but "
            "only heads can be trained on config.data.features\n  allowed: 'head/*', or patterns below it"
        )
    defaults = options.default().augment
    for key, value in config.augment.items():
        if value != defaults[key]:
            raise UserError(
                f"config.augment.{key} is {value!r}, but stored features (config.data.features) are not augmented\n"
                f"  allowed: --config.augment.{key}={defaults[key]}"
            )


def check_files(config: ConfigDict) -> None:
    """Raises UserError if the directory of `config.data.features` has no features of the train split."""
    feature_store.find(paths.expand(config.data.features, "config.data.features"), "train")


def load(config: ConfigDict, splits: Mapping[str, str]) -> dict[str, Source]:
    """Returns the stored features of each role as a source, with the labels of `config.data.labels`.

    Args:
        config: a config whose `data.features` is not None.
        splits: split expressions by role: 'train', 'validation', 'test'.

    Raises:
        UserError: the features of a role are missing, damaged, or of other examples or another normalization.
    """
    directory, labels = paths.expand(config.data.features, "config.data.features"), config.data.labels
    sources: dict[str, Source] = {}
    for role, split in splits.items():
        stored = feature_store.read(feature_store.find(directory, role))
        actual, expected = (stored.about["name"], stored.about["split"]), (config.data.name, split)
        if actual != expected:
            raise UserError(
                f"config.data.features: {stored.path} holds {' '.join(actual)}, not {' '.join(expected)}\n"
                f"  recompute them: {COMMAND} --help; or use that split: --config.data.{role}='{actual[1]}'"
            )
        normalization = stored.about.get("normalization", config.data.normalization)
        if normalization != config.data.normalization:
            raise UserError(
                f"config.data.normalization is {config.data.normalization!r}, but {stored.path} was computed with "
                f"{normalization!r}\n  allowed: --config.data.normalization={normalization}"
            )
        sources[role] = stored.source(labels)
    return sources


def check_backbone(config: ConfigDict, parameters: Any, sources: Mapping[str, Source]) -> None:
    """Checks that stored features were computed by the backbone in `parameters`; nothing to check for images.

    Raises:
        UserError: they were computed by another backbone.
    """
    if not in_use(sources):
        return
    digest = trainable.backbone_digest(parameters)
    for source in sources.values():
        if source.stored.backbone != digest:
            raise UserError(
                f"config.data.features: {source.stored.path} was computed by another backbone\n"
                f"  recompute it with that of {config.checkpoint.init_from}: {COMMAND} --help"
            )
