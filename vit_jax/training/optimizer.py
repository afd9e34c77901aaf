"""Learning-rate schedules and optax chains; which parameters decay."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from vit_jax.training import layers


def schedule(section: ConfigDict, steps: int) -> optax.Schedule:
    """The learning rate at a step: linear warm-up from 0, then cosine, linear or constant until the last step.

    As in the published code, the course after the warm-up runs over the steps that are left, from the peak to
    `final_learning_rate`, and the rate of an update is the schedule at the number of updates before it.
    """
    peak, final, warmup = section.learning_rate, section.final_learning_rate, min(section.warmup_steps, steps)
    rest = max(steps - warmup, 1)
    course = {
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=final / peak if peak else 0.0),
        "linear": optax.linear_schedule(peak, final, rest),
        "constant": optax.constant_schedule(peak),
    }[section.schedule]
    if not warmup:
        return course
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), course], [warmup])


def update_count(state: Any) -> jax.Array:
    """How many updates an optimiser's state has seen, which is where its schedule stands; int32."""
    (count,) = [
        leaf.count
        for leaf in jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, optax.ScaleByScheduleState))
        if isinstance(leaf, optax.ScaleByScheduleState)
    ]
    return count


def matrices(parameters: Any) -> Any:
    """True where weight decay applies: kernels; not biases, norms, class token or position embeddings."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", parameters)


def make(section: ConfigDict, steps: int, factors: Any | None = None) -> optax.GradientTransformation:
    """Clipping, the rule, weight decay, the schedule and each parameter's factor of it in one optax chain.

    `adamw` decays the parameters themselves, at the learning rate (arXiv 1711.05101); `adam` and `sgd` add the decay
    to the gradient, as classical L2 regularisation does.

    Args:
        section: `config.optimizer`.
        steps: of the whole run.
        factors: of `layers.factors`, with None where a parameter is frozen; None for all parameters alike.
    """
    adam = optax.scale_by_adam(section.beta1, section.beta2, section.epsilon)
    decay = optax.add_decayed_weights(section.weight_decay, mask=matrices)
    rules = {
        "adamw": [adam, decay],
        "adam": [decay, adam],
        "sgd": [decay, optax.trace(section.momentum)],
    }[section.name]
    # The place of the clipping is taken in any case: a run may go on with or without it.
    clip = optax.identity() if section.gradient_clip is None else optax.clip_by_global_norm(section.gradient_clip)
    # Last, and without a state: a run goes on with or without it, and with checkpoints from before there was one.
    layerwise = optax.identity() if factors is None else layers.scale(factors)
    return optax.chain(clip, *rules, optax.scale_by_learning_rate(schedule(section, steps)), layerwise)
