"""What keeps the compiler from merging too much of the augmentation into one loop."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata


def no_fuse(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of arrays, computed once and by itself.

    XLA merges what is cheap into the loop that uses it, and counts the looking-up of a pixel as cheap: a chain of
    operations is then computed anew for each pixel that looks up another, 10 to 100 times slower. On CPU barriers are
    gone before the merging, so that there the function stays a call in the program.
    """

    @functools.wraps(function)
    def call(*arrays: Any) -> Any:
        if jax.default_backend() != "cpu":
            return jax.lax.optimization_barrier(function(*jax.lax.optimization_barrier(arrays)))
        with set_xla_metadata(inlineable="false"):
            return jax.jit(inside)(*arrays)

    def inside(*arrays: Any) -> Any:
        with set_xla_metadata(inlineable=None):  # what the function itself calls may be merged
            return function(*arrays)

    return call
