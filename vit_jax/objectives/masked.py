"""Self-supervised pre-training: reconstruct hidden patches of an image from the visible ones.

The trained module contains a Vision Transformer, at 'backbone' in its parameters, from which a classifier can start.
"""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int, Key, Num
from ml_collections import ConfigDict

from vit_jax.models import masked_autoencoder, masked_patches, summary
from vit_jax.models.masked_autoencoder import MaskedAutoencoder
from vit_jax.models.masked_patches import MaskedPatchPrediction
from vit_jax.models.patches import patchify
from vit_jax.models.vit import VisionTransformer
from vit_jax.objectives.base import Objective, PrimaryMetric, final_split

# Folded into the step's key, which dropout uses unchanged.
_MASK_STREAM = 1


@dataclasses.dataclass(frozen=True)
class Masked(Objective):
    """Hides patches of images and reconstructs them.

    In training, the hidden patches of an image depend on the step's key; in evaluation on the image's index in the
    split alone, so that every evaluation of every run hides the same patches.

    Attributes:
        share: of the patches that are hidden.
    """

    share: float = 0.5
    primary_metric = PrimaryMetric("loss", higher_is_better=False)
    needs_labels = False
    min_patches = 2  # one hidden, one visible
    backbone_path = ("backbone",)

    @abc.abstractmethod
    def patch_metrics(
        self,
        module: nn.Module,
        outputs: Float[Array, "batch patches outputs"],
        patches: Num[Array, "batch patches pixels"],
    ) -> dict[str, Float[Array, "batch patches"]]:
        """Returns the metrics of every patch, 'loss' among them."""

    def input_dtype(self, model: VisionTransformer) -> Dtype:
        # Reconstruction targets stay float32; the model casts its inputs.
        return jnp.dtype("float32")

    def loss_and_metrics(self, module, parameters, inputs, targets, key, train, state=None):
        keys = jax.random.split(jax.random.fold_in(key, _MASK_STREAM), len(inputs))
        values = self._image_metrics(module, parameters, inputs, keys, train=train, rngs={"dropout": key})
        metrics = {name: value.mean() for name, value in values.items()}
        return metrics["loss"], metrics

    def eval_sums(self, module, parameters, views, labels, example_ids):
        values = self._image_metrics(module, parameters, views[0], evaluation_keys(example_ids))
        sums = {name: jnp.where(example_ids >= 0, value, 0.0).sum() for name, value in values.items()}
        return {**sums, "examples": (example_ids >= 0).sum()}

    def _image_metrics(
        self, module: nn.Module, parameters: Any, inputs: jax.Array, keys: Key[Array, " batch"], **options: Any
    ) -> dict[str, Float[Array, " batch"]]:
        """Returns the metrics of every image: means over its hidden patches."""
        outputs, hidden = module.apply({"params": parameters}, inputs, keys, **options)
        patches = inputs if inputs.ndim == 3 else patchify(inputs, module.backbone.patch_size)
        metrics = self.patch_metrics(module, outputs, patches)
        return {name: hidden_mean(values, hidden) for name, values in metrics.items()}

    def summarize(self, split: str, sums: Mapping[str, Any]) -> dict[str, float | int]:
        """Returns '<split>/<metric>' for each metric, the mean over all images, and '<split>/examples'."""
        count = sums["examples"]
        return {**{f"{split}/{name}": sums[name] / count for name in self.metrics[:-1]}, f"{split}/examples": count}

    def describe(self, split: str, metrics: Mapping[str, float], module: nn.Module) -> str:
        named = (f"{name.replace('_', ' ')} {metrics[f'{split}/{name}']:.4f}" for name in self.metrics[:-1])
        return f"{', '.join(named)} on {metrics[f'{split}/examples']:,} examples"

    def summary_line(self, summary: Mapping[str, float]) -> str:
        """Returns 'test loss 0.4321 on all 10,000 images'."""
        split = final_split(summary)
        return f"{split} loss {summary[f'{split}/loss']:.4f} on all {summary[f'{split}/examples']:,} images"


@dataclasses.dataclass(frozen=True)
class PatchPrediction(Masked):
    """Predicts the mean colours of corrupted patches (arXiv 2010.11929, appendix B.1.2)."""

    metrics = ("loss", "colour_accuracy", "gradient_norm")

    @classmethod
    def from_config(cls, config: ConfigDict) -> "PatchPrediction":
        return cls(config.train.masked_share or 0.5)

    def make_module(self, model: VisionTransformer, mean: tuple[float, ...], std: tuple[float, ...]) -> nn.Module:
        return MaskedPatchPrediction(_encoder(model), mean, std, self.share)

    def patch_metrics(self, module, outputs, patches):
        colours = masked_patches.mean_colours(patches, module.mean, module.std)
        loss = -jnp.take_along_axis(jax.nn.log_softmax(outputs), colours[..., None], axis=-1)[..., 0]
        return {"loss": loss, "colour_accuracy": (outputs.argmax(axis=-1) == colours).astype(jnp.float32)}

    def forward_flops(self, module: MaskedPatchPrediction, image_size: tuple[int, int], channels: int) -> int:
        return summary.forward_flops(module, image_size, channels)


@dataclasses.dataclass(frozen=True)
class Autoencoding(Masked):
    """Predicts the pixels of patches that the encoder does not see (arXiv 2111.06377).

    Attributes:
        normalize: whether the target of a patch is its pixels normalized by their own mean and standard deviation.
        decoder: the decoder's fields of `MaskedAutoencoder`.
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

    def make_module(self, model: VisionTransformer, mean: tuple[float, ...], std: tuple[float, ...]) -> nn.Module:
        return MaskedAutoencoder(_encoder(model), self.share, **self.decoder)

    def patch_metrics(self, module, outputs, patches):
        patches = patches.astype(jnp.float32)
        target = masked_autoencoder.normalize_patches(patches) if self.normalize else patches
        return {"loss": jnp.square(outputs - target).mean(axis=-1)}

    def pixels(
        self, outputs: Float[Array, "batch patches pixels"], patches: Num[Array, "batch patches pixels"]
    ) -> Float[Array, "batch patches pixels"]:
        """Returns the outputs as pixels; normalized ones are rescaled by the mean and std of the true patches."""
        if not self.normalize:
            return outputs
        mean, std = masked_autoencoder.pixel_statistics(patches)
        return outputs * std + mean

    def forward_flops(self, module: MaskedAutoencoder, image_size: tuple[int, int], channels: int) -> int:
        return summary.forward_flops(module, image_size, channels)


def hidden_mean(values: Float[Array, "batch patches"], hidden: Bool[Array, "batch patches"]) -> Float[Array, " batch"]:
    """Returns the mean of every image's values over its hidden patches."""
    return jnp.where(hidden, values, 0.0).sum(axis=1) / hidden.sum(axis=1)


def evaluation_keys(example_ids: Int[Array, " batch"]) -> Key[Array, " batch"]:
    """Returns the keys that choose the hidden patches in evaluation; they depend on the examples' indices alone."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), example_ids)


def _encoder(model: VisionTransformer) -> VisionTransformer:
    return model.clone(classes=None, pooling="none")
