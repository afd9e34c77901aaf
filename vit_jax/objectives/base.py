"""What a run learns to do, seen from the step and the loop: module, targets, loss, metrics, evaluation."""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

from vit_jax.models import summary
from vit_jax.models.vit import VisionTransformer
from vit_jax.objectives.losses import Logits

Metrics = dict[str, jax.Array]


def last_split(summary: Mapping[str, float]) -> str:
    """The split that a finished run is judged by: 'test', or 'validation' where there is none."""
    return "test" if "test/examples" in summary else "validation"


@dataclasses.dataclass(frozen=True)
class Objective(abc.ABC):
    """What a run learns to do; its fields are the options that it has."""

    @classmethod
    @abc.abstractmethod
    def from_config(cls, config: ConfigDict) -> "Objective":
        """As a config says."""

    @property
    @abc.abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """The names of what a training step records: what `measure` returns, and last 'gradient_norm'."""

    @property
    @abc.abstractmethod
    def primary_metric(self) -> str:
        """The metric of the validation split by which the best checkpoint is told: 'accuracy' or 'loss'."""

    @abc.abstractmethod
    def module(self, model: VisionTransformer, mean: tuple[float, ...], std: tuple[float, ...]) -> nn.Module:
        """What is trained: the model, or what is built around it; images are normalised by `mean` and `std`."""

    @abc.abstractmethod
    def targets(self, labels: Any, module: nn.Module) -> Logits:
        """What augmentation mixes as it mixes the images: class probabilities [batch, classes], a tree of them."""

    @abc.abstractmethod
    def loss_and_metrics(
        self,
        module: nn.Module,
        parameters: Any,
        inputs: Float[Array, "batch *example"],
        targets: Logits,
        key: PRNGKeyArray,
        train: bool,
    ) -> tuple[Float[Array, ""], Metrics]:
        """The loss of a batch, its mean over the examples, and the metrics."""

    @abc.abstractmethod
    def eval_sums(
        self,
        module: nn.Module,
        parameters: Any,
        views: Sequence[Float[Array, "batch *example"]],
        labels: Any,
        example_ids: Int[Array, " batch"],
    ) -> dict[str, Any]:
        """Sums over the real examples of a batch of evaluation.

        `example_ids` are their places in the split, which decide what is random; -1 for an example that does not count.
        """

    @abc.abstractmethod
    def summarise(self, split: str, sums: Mapping[str, Any]) -> dict[str, float | int]:
        """Metrics of a whole split from the sums over it, named '<split>/loss', ..., and '<split>/examples'."""

    @abc.abstractmethod
    def describe(self, split: str, metrics: Mapping[str, float]) -> str:
        """The metrics of a split in words."""

    @abc.abstractmethod
    def summary_line(self, summary: Mapping[str, float]) -> str:
        """What a finished run came to, in words."""

    def init_from_backbone(self, parameters: Any, initialize: Callable[[], Any]) -> Any:
        """The module's parameters from those of its Vision Transformer; others from `initialize`."""
        return parameters

    def backbone(self, parameters: Any) -> Any:
        """The parameters of the Vision Transformer among the module's."""
        return parameters

    def forward_flops(self, module: Any, image_size: tuple[int, int], channels: int) -> int:
        """Floating-point operations of one image's forward pass, as `summary.forward_flops` counts them."""
        return summary.forward_flops(module, image_size, channels)
