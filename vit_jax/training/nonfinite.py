"""When numbers go bad for good: where they do so first, and all that is needed to see it again."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vit_jax.checkpoint import integrity
from vit_jax.data import order, pipeline
from vit_jax.optim import trainable
from vit_jax.training import step
from vit_jax.training.setup import Run
from vit_jax.training.state import TrainState

REPORT = "not_finite.json"


def report(run: Run, state: TrainState, learning_rate: float) -> dict[str, Any]:
    """What the last step before `state`, whose update was left out, had to do with.

    `step`, `learning_rate`, `loss`, `gradient_norm`, `first` (the first module whose output, or parameter whose
    gradient, is not finite), and the `batch`: the examples' places in the training split.
    """
    train, place = run.config.train, int(state.step) + int(state.shift) - 1
    examples = len(run.sources["train"])
    (batch,) = pipeline.train_indices(train.seed, train.batch_size, place, 1, 1, examples, run.config.augment.repeats)
    source = run.sources["train"]
    labels = jax.tree.map(lambda kind: kind[batch], source.targets())
    augment_key, dropout_key = order.keys(train.seed, place)
    targets = run.objective.targets(labels, run.applied)
    inputs, targets = run.augment(augment_key, jnp.asarray(source.read(batch)), targets)
    parameters = jax.device_get(state.parameters)
    gradients, metrics = jax.jit(
        lambda *arrays: step.accumulate(run.applied, *arrays, train.accumulation, run.objective, run.mask)
    )(parameters, inputs, targets, dropout_key)
    bad = integrity.not_finite(gradients)
    first = first_module(run, parameters, inputs, targets, dropout_key)
    first = first or (f"gradient of {bad[0]}" if bad else "nothing")
    norm = np.sqrt(sum(float(np.sum(np.square(np.asarray(leaf, np.float64)))) for leaf in jax.tree.leaves(gradients)))
    return {
        "step": int(state.step),
        "learning_rate": learning_rate,
        "loss": str(float(metrics["loss"])),
        "gradient_norm": str(float(norm)),
        "first": first,
        "batch": [int(index) for index in batch],
    }


def first_module(run: Run, parameters: Any, inputs: jax.Array, targets: Any, key: jax.Array) -> str | None:
    """The first module, in the order of the computation, whose output is not finite; 'inputs' for the inputs.

    Within scanned or rematerialised blocks nothing can be seen; the module around them is then the first.
    """
    if not np.isfinite(np.asarray(inputs, np.float32)).all():
        return "inputs"
    found: list[str] = []

    def look(call: Any, arguments: tuple, keywords: dict, context: nn.module.InterceptorContext) -> Any:
        outputs = call(*arguments, **keywords)
        is_array = lambda leaf: isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)  # noqa: E731
        leaves = [leaf for leaf in jax.tree.leaves(outputs) if is_array(leaf)]
        if not found and not all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in leaves):
            found.append("/".join(context.module.path) or "logits")
        return outputs

    with nn.intercept_methods(look):
        train = not trainable.only_head(run.mask)
        run.objective.loss_and_metrics(run.applied, parameters, inputs, targets, jax.random.fold_in(key, 0), train)
    return found[0] if found else None
