"""The interface of an objective: everything that the training step, evaluation and the loop need to know about it."""

import abc
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
from flax.typing import Dtype
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8
from ml_collections import ConfigDict

from vit_jax.models import summary
from vit_jax.models.vit import VisionTransformer

Metrics = dict[str, jax.Array]
Targets = Any  # class probabilities [batch, classes], or a tree of them


class PrimaryMetric(NamedTuple):
    """The metric by which checkpoints, learning rates and seeds are compared, such as 'accuracy'."""

    name: str
    higher_is_better: bool


def final_split(summary: Mapping[str, float]) -> str:
    """Returns the split that a finished run reports: 'test', or 'validation' if the run has no test split."""
    return "test" if "test/examples" in summary else "validation"


@dataclasses.dataclass(frozen=True)
class Objective(abc.ABC):
    """What a run learns. The fields of a subclass are its options.

    Attributes:
        metrics: names of what the training step logs: what `loss_and_metrics` returns, and last 'gradient_norm'.
        primary_metric: how two runs of this objective are compared.
        needs_labels: whether it learns from labels; the model then has a classifier.
        min_patches: minimum number of patches per image.
        backbone_path: where the Vision Transformer's parameters are in the module's: () if the module is the model.
    """

    metrics: ClassVar[tuple[str, ...]]
    primary_metric: ClassVar[PrimaryMetric]
    needs_labels: ClassVar[bool] = True
    min_patches: ClassVar[int] = 1
    backbone_path: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abc.abstractmethod
    def from_config(cls, config: ConfigDict) -> "Objective":
        """Returns the objective with the options of a config."""

    @abc.abstractmethod
    def make_module(self, model: VisionTransformer, mean: tuple[float, ...], std: tuple[float, ...]) -> nn.Module:
        """Returns the module to train: the model itself, or one that contains it at `backbone_path`.

        Args:
            model: the Vision Transformer, with a classifier if `needs_labels`.
            mean: of each channel, of pixels in [0, 1], by which images are normalized.
            std: likewise.
        """

    def input_dtype(self, model: VisionTransformer) -> Dtype:
        """Returns the dtype of the module's inputs."""
        return model.dtype

    def make_targets(self, labels: Any, module: nn.Module) -> Targets:
        """Returns the targets, which augmentation mixes like the images: class probabilities; by default none."""
        return {}

    def make_views(
        self,
        augment: Callable,
        key: PRNGKeyArray,
        images: UInt8[Array, "batch ..."] | Float[Array, "batch ..."],
        targets: Targets,
    ) -> tuple[Any, Targets]:
        """Returns the inputs of a step: one view of each image (or stored features), or a tuple of several views."""
        return augment(key, images, targets)

    def init_state(self, parameters: Any) -> Any:
        """Returns extra arrays that training carries and saves, such as a teacher's parameters; None for none."""
        return None

    @abc.abstractmethod
    def loss_and_metrics(
        self,
        module: nn.Module,
        parameters: Any,
        inputs: Any,
        targets: Targets,
        key: PRNGKeyArray,
        train: bool,
        state: Any = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Returns the loss, as the mean over the batch, and the metrics.

        Entries beyond `metrics` are not logged; `after_update` receives them, as the mean over the microbatches.

        Args:
            module: of `make_module`.
            parameters: of the module.
            inputs: of `make_views`, or a microbatch of it.
            targets: of `make_views`.
            key: for dropout, and for what the objective draws.
            train: whether dropout and stochastic depth are on.
            state: of `init_state`, as of the last update; not differentiated.
        """

    def after_update(self, state: Any, parameters: Any, metrics: Metrics, step: Int[Array, ""]) -> Any:
        """Returns the extra state after a parameter update, such as the teacher's moving average."""
        return state

    @abc.abstractmethod
    def eval_sums(
        self,
        module: nn.Module,
        parameters: Any,
        views: Sequence[Float[Array, "batch ..."]],
        labels: Any,
        example_ids: Int[Array, " batch"],
    ) -> dict[str, Any]:
        """Returns sums over the examples of an evaluation batch.

        `example_ids` are indices into the split, which seed whatever is random; -1 marks padding, which is not counted.
        """

    def eval_batch(
        self,
        module: nn.Module,
        parameters: Any,
        views: Sequence[Float[Array, "batch ..."]],
        labels: Any,
        example_ids: Int[Array, " batch"],
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns `eval_sums`, and the predictions for each example of the batch by head; by default none.

        The predictions of a head are arrays [batch] by the names of the fields of `evaluation.per_class.Predictions`.
        """
        return self.eval_sums(module, parameters, views, labels, example_ids), {}

    @abc.abstractmethod
    def summarize(self, split: str, sums: Mapping[str, Any]) -> dict[str, float | int]:
        """Returns the metrics of a whole split from the sums over it: '<split>/loss', ... and '<split>/examples'."""

    @abc.abstractmethod
    def describe(self, split: str, metrics: Mapping[str, float], module: nn.Module) -> str:
        """Returns the metrics of a split in one line for the terminal; `module` is that of `make_module`."""

    @abc.abstractmethod
    def summary_line(self, summary: Mapping[str, float]) -> str:
        """Returns the result of a finished run in one line, such as 'test accuracy 97.50 % (351 of 360)'."""

    def init_from_backbone(self, backbone: Any, initialize: Callable[[], Any]) -> Any:
        """Returns the module's parameters: those of the backbone as given, the others from `initialize()`."""
        return _replace(initialize(), self.backbone_path, backbone) if self.backbone_path else backbone

    def backbone(self, parameters: Any) -> Any:
        """Returns the Vision Transformer's parameters among the module's."""
        for key in self.backbone_path:
            parameters = parameters[key]
        return parameters

    def forward_flops(self, module: Any, image_size: tuple[int, int], channels: int) -> int:
        """Returns the FLOPs of one image's forward pass, as `summary.forward_flops` counts them."""
        return summary.forward_flops(module, image_size, channels)


def _replace(tree: Any, path: tuple[str, ...], value: Any) -> Any:
    if not path:
        return value
    return {**tree, path[0]: _replace(tree[path[0]], path[1:], value)}
