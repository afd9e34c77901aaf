"""The objectives of pre-training without labels: telling what hidden patches of an image were.

What they train is a Vision Transformer inside another module, below `backbone` in its parameters; a classifier can
start from it.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, Num
from ml_collections import ConfigDict

from vit_jax.models import masked_autoencoder, masked_patches, summary
from vit_jax.models.masked_autoencoder import MaskedAutoencoder
from vit_jax.models.masked_patches import MaskedPatchPrediction
from vit_jax.models.patches import patchify
from vit_jax.models.vit import VisionTransformer
from vit_jax.objectives.base import Objective, last_split
from vit_jax.objectives.losses import Logits

BACKBONE = "backbone"
# Folded into a step's key, which dropout uses as it is.
_MASKS = 1


@dataclasses.dataclass(frozen=True)
class Masked(Objective):
    """Hides patches of images and learns to tell what they were.

    In training, an image's hidden patches follow from the step's key; in evaluation from its place in the split alone,
    so that every evaluation of every run asks for the same.

    Attributes:
        share: of the patches that are hidden.
    """

    share: float = 0.5
    primary_metric = "loss"

    @abc.abstractmethod
    def each(
        self,
        module: nn.Module,
        outputs: Float[Array, "batch patches outputs"],
        patches: Num[Array, "batch patches pixels"],
    ) -> dict[str, Float[Array, "batch patches"]]:
        """The metrics, 'loss' among them, of every patch."""

    def targets(self, labels: Any, module: nn.Module) -> Logits:
        return {}

    def loss_and_metrics(self, module, parameters, inputs, targets, key, train):
        keys = jax.random.split(jax.random.fold_in(key, _MASKS), len(inputs))
        values = self._of_images(module, parameters, inputs, keys, train=train, rngs={"dropout": key})
        metrics = {name: value.mean() for name, value in values.items()}
        return metrics["loss"], metrics

    def eval_sums(self, module, parameters, views, labels, example_ids):
        values = self._of_images(module, parameters, views[0], evaluation_keys(example_ids))
        sums = {name: jnp.where(example_ids >= 0, value, 0.0).sum() for name, value in values.items()}
        return {**sums, "examples": (example_ids >= 0).sum()}

    def _of_images(
        self, module: nn.Module, parameters: Any, inputs: jax.Array, keys: Key[Array, " batch"], **how: Any
    ) -> dict[str, Float[Array, " batch"]]:
        """The metrics of every image: means over its hidden patches."""
        outputs, hidden = module.apply({"params": parameters}, inputs, keys, **how)
        patches = inputs if inputs.ndim == 3 else patchify(inputs, module.backbone.patch_size)
        return {name: hidden_mean(values, hidden) for name, values in self.each(module, outputs, patches).items()}

    def summarise(self, split: str, sums: Mapping[str, Any]) -> dict[str, float | int]:
        """'<split>/<metric>' of each metric, the mean over all images, and '<split>/examples'."""
        count = sums["examples"]
        return {**{f"{split}/{name}": sums[name] / count for name in self.metrics[:-1]}, f"{split}/examples": count}

    def describe(self, split: str, metrics: Mapping[str, float]) -> str:
        named = (f"{name.replace('_', ' ')} {metrics[f'{split}/{name}']:.4f}" for name in self.metrics[:-1])
        return f"{', '.join(named)} on {metrics[f'{split}/examples']:,} examples"

    def summary_line(self, summary: Mapping[str, float]) -> str:
        """'test loss 0.4321 on all 10,000 images'."""
        split = last_split(summary)
        return f"{split} loss {summary[f'{split}/loss']:.4f} on all {summary[f'{split}/examples']:,} images"

    def init_from_backbone(self, parameters: Any, initialize: Callable[[], Any]) -> Any:
        return {**initialize(), BACKBONE: parameters}

    def backbone(self, parameters: Any) -> Any:
        return parameters[BACKBONE]


@dataclasses.dataclass(frozen=True)
class PatchPrediction(Masked):
    """Tells the mean colours of corrupted patches (arXiv 2010.11929, appendix B.1.2)."""

    metrics = ("loss", "colour_accuracy", "gradient_norm")

    @classmethod
    def from_config(cls, config: ConfigDict) -> "PatchPrediction":
        return cls(config.train.masked_share or 0.5)

    def module(self, model: VisionTransformer, mean: tuple[float, ...], std: tuple[float, ...]) -> nn.Module:
        return MaskedPatchPrediction(_encoder(model), mean, std, self.share)

    def each(self, module, outputs, patches):
        colours = masked_patches.mean_colours(patches, module.mean, module.std)
        loss = -jnp.take_along_axis(jax.nn.log_softmax(outputs), colours[..., None], axis=-1)[..., 0]
        return {"loss": loss, "colour_accuracy": (outputs.argmax(axis=-1) == colours).astype(jnp.float32)}

    def forward_flops(self, module: MaskedPatchPrediction, image_size: tuple[int, int], channels: int) -> int:
        return summary.masked_patches_flops(module, image_size, channels)


@dataclasses.dataclass(frozen=True)
class Autoencoding(Masked):
    """Tells the pixels of patches that the encoder did not see (arXiv 2111.06377).

    Attributes:
        normalize: whether the target of a patch are its pixels normalised by their own mean and standard deviation.
        decoder: fields of `MaskedAutoencoder` that describe the decoder.
    """

    share: float = 0.75
    normalize: bool = True
    decoder: Mapping[str, int] = dataclasses.field(default_factory=dict)
    metrics = ("loss", "gradient_norm")

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Autoencoding":
        section = config.decoder
        names = ("width", "depth", "heads", "mlp_width")
        decoder = {f"decoder_{name}": section[name] for name in names}
        return cls(config.train.masked_share or 0.75, section.normalize_patches, decoder)

    def module(self, model: VisionTransformer, mean: tuple[float, ...], std: tuple[float, ...]) -> nn.Module:
        return MaskedAutoencoder(_encoder(model), self.share, **self.decoder)

    def each(self, module, outputs, patches):
        patches = patches.astype(jnp.float32)
        wanted = masked_autoencoder.normalize_patches(patches) if self.normalize else patches
        return {"loss": jnp.square(outputs - wanted).mean(axis=-1)}

    def pixels(
        self, outputs: Float[Array, "batch patches pixels"], patches: Num[Array, "batch patches pixels"]
    ) -> Float[Array, "batch patches pixels"]:
        """The outputs as pixels; where those were normalised, by mean and standard deviation of the true patches."""
        if not self.normalize:
            return outputs
        mean, std = masked_autoencoder.pixel_statistics(patches)
        return outputs * std + mean

    def forward_flops(self, module: MaskedAutoencoder, image_size: tuple[int, int], channels: int) -> int:
        return summary.masked_autoencoder_flops(module, image_size, channels)


def hidden_mean(values: Float[Array, "batch patches"], hidden: Bool[Array, "batch patches"]) -> Float[Array, " batch"]:
    """The mean of every image's values over its hidden patches."""
    return jnp.where(hidden, values, 0.0).sum(axis=1) / hidden.sum(axis=1)


def evaluation_keys(example_ids: Int[Array, " batch"]) -> Key[Array, " batch"]:
    """The keys by which evaluation hides patches: those of an image follow from its place in the split alone."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), example_ids)


def _encoder(model: VisionTransformer) -> VisionTransformer:
    return model.clone(classes=None, pooling="none")
