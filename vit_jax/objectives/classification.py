"""The objective of telling the classes of images, with one head or several."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from vit_jax.data.spec import LABEL
from vit_jax.models.vit import VisionTransformer
from vit_jax.objectives import losses
from vit_jax.objectives.base import Objective, last_split


@dataclasses.dataclass(frozen=True)
class Classification(Objective):
    """Tells the classes of images.

    Attributes:
        weights: the factor of each head's loss; the first one's accuracy is reported without its name.
        loss: one of `losses.LOSSES`.
        smoothing: share of a label that is spread over all classes.
    """

    weights: Mapping[str, float] = dataclasses.field(default_factory=lambda: {LABEL: 1.0})
    loss: str = "softmax"
    smoothing: float = 0.0
    primary_metric = "accuracy"

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Classification":
        return cls(losses.loss_weights(config), config.train.loss, config.train.label_smoothing)

    @property
    def metrics(self) -> tuple[str, ...]:
        return losses.metric_names(self.weights)

    def module(self, model: VisionTransformer, mean: tuple[float, ...], std: tuple[float, ...]) -> nn.Module:
        return model

    def targets(self, labels: Any, module: nn.Module) -> losses.Logits:
        return losses.make_targets(labels, module.classes, self.smoothing)

    def loss_and_metrics(self, module, parameters, inputs, targets, key, train):
        logits = module.apply({"params": parameters}, inputs, train=train, rngs={"dropout": key})
        return losses.measure(logits, targets, self.weights, self.loss)

    def eval_sums(self, module, parameters, views, labels, example_ids):
        views = [module.apply({"params": parameters}, view) for view in views]
        mean = lambda *heads: losses.mean_probability(heads, self.loss)  # noqa: E731
        logits = views[0] if len(views) == 1 else jax.tree.map(mean, *views)
        if isinstance(logits, Mapping):
            return {name: losses.score(logits[name], labels[name], example_ids >= 0, self.loss) for name in labels}
        return losses.score(logits, labels, example_ids >= 0, self.loss)

    def summarise(self, split: str, sums: Mapping[str, Any]) -> dict[str, float | int]:
        """'<split>/accuracy', '/top5', '/loss' and '/examples'.

        With several heads these are the first one's, and '<split>/<head>/accuracy', ... are each one's.
        """
        if len(self.weights) == 1:
            return {**_class_means(split, sums), f"{split}/examples": sums["examples"]}
        first = sums[next(iter(self.weights))]
        metrics = {**_class_means(split, first), f"{split}/examples": first["examples"]}
        for name in self.weights:
            metrics |= _class_means(f"{split}/{name}", sums[name])
        return metrics

    def describe(self, split: str, metrics: Mapping[str, float]) -> str:
        accuracy, top5, loss, count = (metrics[f"{split}/{name}"] for name in ("accuracy", "top5", "loss", "examples"))
        named = {name: metrics[f"{split}/{name}/accuracy"] for name in list(self.weights)[1:]}
        others = "".join(f", {name}: accuracy {100 * value:.2f} %" for name, value in named.items())
        own = f"accuracy {100 * accuracy:.2f} %, top-5 {100 * top5:.2f} %, loss {loss:.4f}"
        return f"{own}{others} on {count:,} examples"

    def summary_line(self, summary: Mapping[str, float]) -> str:
        """'test accuracy 97.50 % (351 of 360)'."""
        split = last_split(summary)
        accuracy, count = summary[f"{split}/accuracy"], summary[f"{split}/examples"]
        return f"{split} accuracy {100 * accuracy:.2f} % ({round(accuracy * count):,} of {count:,})"


def _class_means(prefix: str, sums: Mapping[str, float | int]) -> dict[str, float]:
    names = {"accuracy": "correct", "top5": "top5", "loss": "loss"}
    return {f"{prefix}/{metric}": sums[name] / sums["examples"] for metric, name in names.items()}


CLASSIFY = Classification()
