"""Which patches of an image are hidden from the model: exactly so many, drawn for each image by a key of its own."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


def hidden_count(share: float, patches: int) -> int:
    """How many of an image's patches are hidden: the share of them, rounded, but not none and not all.

    Raises:
        ValueError: there are fewer than two patches.
    """
    if patches < 2:
        raise ValueError(f"an image of {patches} patch: what is hidden is told from what is not, so there must be two")
    return max(1, min(patches - 1, round(share * patches)))


def draw_hidden(keys: Key[Array, " batch"], patches: int, count: int) -> Bool[Array, "batch patches"]:
    """True at `count` patches of every image, each choice equally likely.

    An image's choice depends on its own key alone: not on the images beside it, nor on the devices.
    """
    noise = jax.vmap(lambda key: jax.random.uniform(key, (patches,)))(keys)
    return noise.argsort(axis=1).argsort(axis=1) < count


def visible_places(hidden: Bool[Array, "batch patches"], count: int) -> Int[Array, "batch visible"]:
    """The numbers of the patches that are not among the `count` hidden ones, in ascending order."""
    return jnp.argsort(hidden, axis=1, stable=True)[:, : hidden.shape[1] - count]


def take(
    tokens: Float[Array, "batch tokens width"], places: Int[Array, "batch taken"]
) -> Float[Array, "batch taken width"]:
    """The tokens at these places, of each image its own."""
    return jax.vmap(lambda tokens, places: tokens[places])(tokens, places)


def default_keys(batch: int) -> Key[Array, " batch"]:
    """Keys where a caller gives none, as when parameters are initialised: by the image's place in the batch alone."""
    return jax.random.split(jax.random.key(0), batch)
