"""A fusion barrier for XLA."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata


def no_fuse(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function` with a fusion barrier around it: XLA computes its result once and stores it.

    `function` takes and returns arrays. XLA fuses cheap operations into the loop that reads them and considers a
    gather cheap: a chain of image operations is then recomputed for each pixel that gathers another, which is 10 to
    100 times slower. On accelerators the barrier is `jax.lax.optimization_barrier`. XLA's CPU compiler removes such
    barriers before it fuses, so there the function becomes a call that must not be inlined.

    The platform is that of `jax.default_backend()` at trace time, which is the one the training step runs on.
    `jax.lax.platform_dependent` would defer the choice to lowering, but it puts each function into a
    `stablehlo.case`, which may change the fusions around it, and so the rounding of floating-point results. A program
    that is lowered for another platform than it was traced on is correct, but slow.
    """

    @functools.wraps(function)
    def call(*arrays: Any) -> Any:
        if jax.default_backend() != "cpu":
            return jax.lax.optimization_barrier(function(*jax.lax.optimization_barrier(arrays)))
        with set_xla_metadata(inlineable="false"):
            return jax.jit(inside)(*arrays)

    def inside(*arrays: Any) -> Any:
        with set_xla_metadata(inlineable=None):  # functions called by `function` may be inlined
            return function(*arrays)

    return call
