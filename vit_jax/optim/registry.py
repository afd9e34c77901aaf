"""Optimizers by name, and the whole optax chain of a run.

To add an optimizer, write a function (in a file of its own if it is long) that reads its options from the config
section, and add it to `OPTIMIZERS`; its options and its name are declared in the config schema.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vit_jax.optim import layer_decay
from vit_jax.optim.clipping import clip_by_global_norm
from vit_jax.optim.schedules import schedule

# From `config.optimizer` to the transformations between clipping and the learning rate. A builder that treats
# parameters differently, by shape or by name, gives optax a function of the parameter tree (`optax.partition`,
# `optax.masked`), as `decay_mask` is one. The result is a sequence because `make` chains it without nesting: each
# transformation's position in the chain is part of the array names in a checkpoint.
Builder = Callable[[ConfigDict], Sequence[optax.GradientTransformation]]


def decay_mask(parameters: Any) -> Any:
    """Returns a tree of True where weight decay applies: kernels; not biases, norms, tokens or position embeddings."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", parameters)


def weight_decay(section: ConfigDict) -> optax.GradientTransformation:
    """Adds `weight_decay` times the parameter to each update where `decay_mask` is True."""
    return optax.add_decayed_weights(section.weight_decay, mask=decay_mask)


def adamw(section: ConfigDict) -> Sequence[optax.GradientTransformation]:
    """Adam with decoupled weight decay (arXiv 1711.05101)."""
    return optax.scale_by_adam(section.beta1, section.beta2, section.epsilon), weight_decay(section)


def adam(section: ConfigDict) -> Sequence[optax.GradientTransformation]:
    """Adam (arXiv 1412.6980) with L2 regularization: weight decay is added to the gradient."""
    return weight_decay(section), optax.scale_by_adam(section.beta1, section.beta2, section.epsilon)


def sgd(section: ConfigDict) -> Sequence[optax.GradientTransformation]:
    """SGD with momentum and L2 regularization."""
    return weight_decay(section), optax.trace(section.momentum)


OPTIMIZERS: dict[str, Builder] = {"adamw": adamw, "adam": adam, "sgd": sgd}


def make(section: ConfigDict, steps: int, factors: Any | None = None) -> optax.GradientTransformation:
    """Returns the optax chain: gradient clipping, the optimizer, the learning-rate schedule, layer-wise decay.

    Clipping and layer-wise decay have no state, and an identity takes their position when they are off. A run can
    therefore be resumed with or without them.

    Args:
        section: `config.optimizer`.
        steps: updates of the whole run.
        factors: result of `layer_decay.factors`, with None for frozen parameters; None if all factors are 1.
    """
    clip = optax.identity() if section.gradient_clip is None else clip_by_global_norm(section.gradient_clip)
    optimizer = OPTIMIZERS[section.name](section)
    layerwise = optax.identity() if factors is None else layer_decay.scale(factors)
    return optax.chain(clip, *optimizer, optax.scale_by_learning_rate(schedule(section, steps)), layerwise)


def legacy_update_count(optimizer_state: Any) -> jax.Array:
    """Returns the number of updates that an optax state records, int32 []: the count of its learning-rate schedule.

    Only for checkpoints of versions that did not save a counter of their own. With several schedules (as of
    `optax.partition`) this is the largest count; with none it is 0.
    """
    states = jax.tree.leaves(optimizer_state, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))
    counts = [state.count for state in states if isinstance(state, optax.ScaleByScheduleState)]
    if len(counts) == 1:
        return counts[0]
    return jnp.max(jnp.stack(counts)) if counts else jnp.zeros((), jnp.int32)
