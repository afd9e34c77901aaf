"""Learning-rate schedules and optax chains; which parameters decay."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vit_jax.optim import layer_decay

JOINED = 16_384  # values of a leaf that `global_norm` joins with others


def schedule(section: ConfigDict, steps: int) -> optax.Schedule:
    """The learning rate at a step: linear warm-up from 0, then cosine, linear or constant until the last step.

    As in the published code, the decay takes the steps after the warm-up, from the peak to `final_learning_rate`, and
    the learning rate of an update is the schedule at the number of updates before it.
    """
    peak, final, warmup = section.learning_rate, section.final_learning_rate, min(section.warmup_steps, steps)
    rest = max(steps - warmup, 1)
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=final / peak if peak else 0.0),
        "linear": optax.linear_schedule(peak, final, rest),
        "constant": optax.constant_schedule(peak),
    }[section.schedule]
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def learning_rate(schedule: optax.Schedule, count: int) -> float:
    """The schedule after `count` updates, computed on the host where JAX has a CPU backend.

    On an accelerator it would be queued after the steps that are still running, and the host would wait for them.
    """
    try:
        host = jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        host = contextlib.nullcontext()
    with host:
        return float(schedule(count))


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


def global_norm(tree: Any) -> jax.Array:
    """The Euclidean norm of all leaves together, in float32.

    Small leaves, such as biases, are joined before they are summed: on an accelerator each sum is a kernel of its own.
    """
    leaves = [leaf.ravel() for leaf in jax.tree.leaves(tree)]
    small = [leaf for leaf in leaves if leaf.size <= JOINED]
    large = [leaf for leaf in leaves if leaf.size > JOINED]
    if small:
        large.append(jnp.concatenate(small))
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in large))


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Clipping by `global_norm`; its state in a checkpoint is that of optax's."""

    def update(updates: Any, state: Any, parameters: Any = None) -> tuple[Any, Any]:
        norm = global_norm(updates)
        return jax.tree.map(lambda leaf: jnp.where(norm < limit, leaf, leaf / norm * limit), updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def make(section: ConfigDict, steps: int, factors: Any | None = None) -> optax.GradientTransformation:
    """Clipping, the optimizer, weight decay, the schedule and each parameter's factor of it in one optax chain.

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
    # Without clipping there is an identity in its position: a run may resume with or without it.
    clip = optax.identity() if section.gradient_clip is None else clip_by_global_norm(section.gradient_clip)
    # Last, and without a state: a run resumes with or without it, and with checkpoints from before there was one.
    layerwise = optax.identity() if factors is None else layer_decay.scale(factors)
    return optax.chain(clip, *rules, optax.scale_by_learning_rate(schedule(section, steps)), layerwise)
