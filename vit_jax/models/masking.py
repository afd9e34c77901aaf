"""Masks: checks of those that callers pass, and random choice of the patches that are hidden from a model."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key


def check_mask(name: str, mask: Any, shape: tuple[int, ...]) -> None:
    """Checks a boolean mask; other types are refused, because other libraries' masks mean something else.

    Raises:
        TypeError: it is not an array of booleans. An additive mask of 0 and -inf would be read as its opposite.
        ValueError: it does not have as many axes as `shape`, or does not broadcast to it.
    """
    if not jnp.issubdtype(getattr(mask, "dtype", object), jnp.bool_):
        kind = f"an array of {mask.dtype}" if hasattr(mask, "dtype") else f"of type {type(mask).__name__}"
        raise TypeError(
            f"{name} is {kind}\n  allowed: an array of booleans, True where a token may be attended to or is chosen\n"
            f"  for an additive mask of 0 and -inf, pass {name} == 0; for a mask of 1 and 0, {name} == 1"
        )
    if mask.ndim != len(shape) or any(size not in (1, full) for size, full in zip(mask.shape, shape, strict=True)):
        is_per_token = (mask.ndim, len(shape)) == (2, 4)
        way_out = f"\n  for one value per token, pass {name}[:, None, None, :]" if is_per_token else ""
        raise ValueError(
            f"{name} has shape {list(mask.shape)}\n  allowed: a shape that broadcasts to {list(shape)}{way_out}"
        )


def check_lengths(name: str, lengths: Any, batch: int) -> None:
    """Checks the number of valid tokens of each example.

    Raises:
        TypeError: it is not an array of integers.
        ValueError: it does not have one number per example.
    """
    if not jnp.issubdtype(getattr(lengths, "dtype", bool), jnp.integer):
        kind = f"an array of {lengths.dtype}" if hasattr(lengths, "dtype") else f"of type {type(lengths).__name__}"
        raise TypeError(f"{name} is {kind}\n  allowed: an array of integers, the number of valid tokens per example")
    if lengths.shape != (batch,):
        raise ValueError(f"{name} has shape {list(lengths.shape)}\n  allowed: [{batch}], one number per example")


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
    check_mask("hidden", hidden, getattr(hidden, "shape", ()))
    return jnp.argsort(hidden, axis=1, stable=True)[:, : hidden.shape[1] - count]


def take(
    tokens: Float[Array, "batch tokens width"], indices: Int[Array, "batch taken"]
) -> Float[Array, "batch taken width"]:
    """The tokens with these indices, for each image separately."""
    return jax.vmap(lambda tokens, indices: tokens[indices])(tokens, indices)


def default_keys(batch: int) -> Key[Array, " batch"]:
    """Keys for callers without any, as for initialization: they depend only on the index in the batch."""
    return jax.random.split(jax.random.key(0), batch)
