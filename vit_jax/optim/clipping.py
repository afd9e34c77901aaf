"""Gradient clipping by the global norm."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

JOINED_SIZE = 16_384  # leaves with at most this many elements are concatenated before they are summed


def global_norm(tree: Any) -> jax.Array:
    """Returns the Euclidean norm of all leaves together, computed in float32.

    Small leaves, such as biases, are concatenated first: on an accelerator each sum is a kernel of its own.
    """
    leaves = [leaf.ravel() for leaf in jax.tree.leaves(tree)]
    small = [leaf for leaf in leaves if leaf.size <= JOINED_SIZE]
    large = [leaf for leaf in leaves if leaf.size > JOINED_SIZE]
    if small:
        large.append(jnp.concatenate(small))
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in large))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Returns optax's `clip_by_global_norm` with our `global_norm`; it has the same (empty) state."""

    def update(updates: Any, state: Any, parameters: Any = None) -> tuple[Any, Any]:
        norm = global_norm(updates)
        return jax.tree.map(lambda leaf: jnp.where(norm < max_norm, leaf, leaf / norm * max_norm), updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)
