"""Image classification, with one head or several."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from vit_jax.data.spec import LABEL
from vit_jax.models.vit import VisionTransformer
from vit_jax.objectives import losses
from vit_jax.objectives.base import Objective, PrimaryMetric, final_split


@dataclasses.dataclass(frozen=True)
class Classification(Objective):
    """Image classification.

    Attributes:
        weights: head -> weight of its loss; the metrics of the first head are reported without its name.
        loss: one of `losses.LOSSES`.
        smoothing: label smoothing.
        class_weights: head -> weight of each class in the training loss; None for equal weights.
    """

    weights: Mapping[str, float] = dataclasses.field(default_factory=lambda: {LABEL: 1.0})
    loss: str = "softmax"
    smoothing: float = 0.0
    class_weights: Mapping[str, Float[np.ndarray, " _"]] | None = None
    primary_metric = PrimaryMetric("accuracy", higher_is_better=True)

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Classification":
        return cls(losses.loss_weights(config), config.train.loss, config.train.label_smoothing)

    def balanced(
        self, labels: Mapping[str, Int[np.ndarray, " examples"]], class_names: Mapping[str, Sequence[str]]
    ) -> "Classification":
        """Returns the objective with the class weights that balance these training labels, by head."""
        weights = {name: losses.balanced_weights(labels[name], len(class_names[name])) for name in self.weights}
        return dataclasses.replace(self, class_weights=weights)

    @property
    def metrics(self) -> tuple[str, ...]:
        return losses.metric_names(self.weights)

    def make_module(self, model: VisionTransformer, mean: tuple[float, ...], std: tuple[float, ...]) -> nn.Module:
        return model

    def make_targets(self, labels: Any, module: nn.Module) -> losses.Logits:
        return losses.make_targets(labels, module.classes, self.smoothing)

    def loss_and_metrics(self, module, parameters, inputs, targets, key, train, state=None):
        logits = module.apply({"params": parameters}, inputs, train=train, rngs={"dropout": key})
        return losses.loss_and_metrics(logits, targets, self.weights, self.loss, self.class_weights)

    def eval_sums(self, module, parameters, views, labels, example_ids):
        return self.eval_batch(module, parameters, views, labels, example_ids)[0]

    def eval_batch(self, module, parameters, views, labels, example_ids):
        logits = losses.average_views([module.apply({"params": parameters}, view) for view in views], self.loss)
        real = example_ids >= 0
        if isinstance(logits, Mapping):
            sums = {name: losses.eval_sums(logits[name], labels[name], real, self.loss) for name in labels}
            return sums, {name: losses.predictions(logits[name], labels[name], self.loss) for name in labels}
        (head,) = self.weights
        return losses.eval_sums(logits, labels, real, self.loss), {head: losses.predictions(logits, labels, self.loss)}

    def summarize(self, split: str, sums: Mapping[str, Any]) -> dict[str, float | int]:
        """Returns '<split>/accuracy', '/top5', '/loss' and '/examples'.

        With several heads these are the first one's, and '<split>/<head>/accuracy', ... are those of each head.
        """
        if len(self.weights) == 1:
            return {**_means(split, sums), f"{split}/examples": sums["examples"]}
        first = sums[next(iter(self.weights))]
        metrics = {**_means(split, first), f"{split}/examples": first["examples"]}
        for name in self.weights:
            metrics |= _means(f"{split}/{name}", sums[name])
        return metrics

    def describe(self, split: str, metrics: Mapping[str, float], module: nn.Module) -> str:
        """Returns 'accuracy 97.50 %, top-5 99.17 %, loss 0.0912 on 360 examples'; no top-5 of five classes or fewer."""
        accuracy, top5, loss, count = (metrics[f"{split}/{name}"] for name in ("accuracy", "top5", "loss", "examples"))
        first, *others = self.weights
        classes = module.classes[first] if isinstance(module.classes, Mapping) else module.classes
        parts = [f"accuracy {100 * accuracy:.2f} %", f"loss {loss:.4f}"]
        if classes > losses.TOP:
            parts.insert(1, f"top-5 {100 * top5:.2f} %")
        parts += [f"{name}: accuracy {100 * metrics[f'{split}/{name}/accuracy']:.2f} %" for name in others]
        return f"{', '.join(parts)} on {count:,} examples"

    def summary_line(self, summary: Mapping[str, float]) -> str:
        """Returns 'test accuracy 97.50 % (351 of 360)'."""
        split = final_split(summary)
        accuracy, count = summary[f"{split}/accuracy"], summary[f"{split}/examples"]
        return f"{split} accuracy {100 * accuracy:.2f} % ({round(accuracy * count):,} of {count:,})"


def _means(prefix: str, sums: Mapping[str, float | int]) -> dict[str, float]:
    names = {"accuracy": "correct", "top5": "top5", "loss": "loss"}
    return {f"{prefix}/{metric}": sums[name] / sums["examples"] for metric, name in names.items()}
