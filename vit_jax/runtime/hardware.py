"""Hardware facts: peak FLOP/s for model FLOPs utilization (MFU), compute dtypes, and compilation for a platform."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax.sharding import Mesh

from vit_jax import sharding
from vit_jax.errors import UserError

# Dense bfloat16 FLOP/s of one device as JAX counts devices (a TPU v2 or v3 device is one of a chip's two cores). Keys
# are prefixes of `device_kind`; the longest one that matches applies.
PEAKS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10": 125e12,
    "Tesla V100": 125e12,
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak(device_kind: str) -> float | None:
    """Returns the dense bfloat16 FLOP/s of a device kind (`jax.Device.device_kind`); None if it is not in `PEAKS`."""
    for name in sorted(PEAKS, key=len, reverse=True):
        if device_kind.startswith(name):
            return PEAKS[name]
    return None


def compute_dtypes(name: str, platform: str | None = None) -> tuple[Dtype, Dtype | None]:
    """Returns the model's `dtype` and `matmul_dtype` for a value of `config.model.dtype`.

    'auto' is float32 on a CPU and bfloat16 elsewhere. With bfloat16 on a CPU, only the operands of large matmuls are
    bfloat16: the CPU has no other bfloat16 instructions, and everything else would be slower.

    Args:
        name: 'auto', 'float32' or 'bfloat16'.
        platform: 'cpu', 'gpu' or 'tpu'; None for the default backend.

    Raises:
        UserError: bfloat16 on a CPU without instructions for it.
    """
    platform = platform or jax.default_backend()
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    if name == "bfloat16" and platform == "cpu":
        if not cpu_flags() & {"avx512_bf16", "amx_bf16"}:
            raise UserError(
                "config.model.dtype is 'bfloat16', but this CPU has no instructions for it (AVX512-BF16 or AMX)\n"
                "  allowed: 'float32', which is faster here"
            )
        return jnp.dtype("float32"), jnp.dtype("bfloat16")
    return jnp.dtype(name), None


def jit_on(mesh: Mesh, f: Callable, *, out_shardings: Any = None, **options: Any) -> Callable:
    """Returns `jax.jit(f)` with the XLA options of the mesh's platform.

    Args:
        mesh: the devices.
        f: the function.
        out_shardings: layouts of the results; None to replicate them.
        options: other arguments of `jax.jit`.
    """
    out_shardings = sharding.replicated(mesh) if out_shardings is None else out_shardings
    xla_options = compiler_options(mesh.devices.flat[0].platform)
    return jax.jit(f, out_shardings=out_shardings, compiler_options=xla_options, **options)


def compiler_options(platform: str) -> dict[str, Any]:
    """Returns the XLA options for a platform; those that this version of XLA does not know are left out.

    On a CPU with AVX-512, XLA uses 256-bit vectors by default (docs/optimizations.md).
    """
    options = {"xla_cpu_prefer_vector_width": 512} if platform == "cpu" and "avx512f" in cpu_flags() else {}
    return options if _are_known(tuple(options.items())) else {}


@functools.cache
def _are_known(options: tuple[tuple[str, Any], ...]) -> bool:
    if not options:
        return True
    try:
        jax.jit(lambda x: x).lower(0.0).compile(compiler_options=dict(options))
    except (jax.errors.JaxRuntimeError, ValueError):
        return False
    return True


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Returns the instruction-set extensions of this CPU as named by Linux; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split()[2:])
