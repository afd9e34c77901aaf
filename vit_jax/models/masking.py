"""Random choice of the patches that are hidden from a model: a fixed number per image, one key per image."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


def hidden_count(share: float, patches: int) -> int:
    """The number of hidden patches: `share` of them, rounded, at least one and at most all but one.

    Raises:
        ValueError: there are fewer than two patches.
    """
    if patches < 2:
        raise ValueError(
            f"an image has {patches} patch: masked pre-training needs at least 2, one hidden and one visible"
        )
    return max(1, min(patches - 1, round(share * patches)))


def draw_hidden(keys: Key[Array, " batch"], patches: int, count: int) -> Bool[Array, "batch patches"]:
    """True for `count` patches of every image, drawn uniformly.

    The choice for an image depends only on its key, not on the rest of the batch or the devices.
    """
    noise = jax.vmap(lambda key: jax.random.uniform(key, (patches,)))(keys)
    return noise.argsort(axis=1).argsort(axis=1) < count


def visible_indices(hidden: Bool[Array, "batch patches"], count: int) -> Int[Array, "batch visible"]:
    """Indices of the patches that are not among the `count` hidden ones, in ascending order."""
    return jnp.argsort(hidden, axis=1, stable=True)[:, : hidden.shape[1] - count]


def take(
    tokens: Float[Array, "batch tokens width"], indices: Int[Array, "batch taken"]
) -> Float[Array, "batch taken width"]:
    """The tokens with these indices, for each image separately."""
    return jax.vmap(lambda tokens, indices: tokens[indices])(tokens, indices)


def default_keys(batch: int) -> Key[Array, " batch"]:
    """Keys for callers without any, as for initialization: they depend only on the index in the batch."""
    return jax.random.split(jax.random.key(0), batch)
