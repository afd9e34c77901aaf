"""What the chips can do, and how to have it: peaks for model FLOPs utilisation (MFU), arithmetic, compiler options."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype

from vit_jax.errors import UserError

# FLOP/s of one device as JAX counts them (a TPU v2 or v3 device is one of a chip's two cores). Keys are looked for at
# the start of `device_kind`; longer ones first.
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
    """Dense bfloat16 FLOP/s of a device kind as `jax.Device.device_kind` names it; None where it is not known."""
    for name in sorted(PEAKS, key=len, reverse=True):
        if device_kind.startswith(name):
            return PEAKS[name]
    return None


def compute_dtypes(name: str, platform: str | None = None) -> tuple[Dtype, Dtype | None]:
    """What `config.model.dtype` stands for on a platform: `dtype` and `matmul_dtype` of the model.

    'auto' is float32 on a CPU and bfloat16 elsewhere. On a CPU bfloat16 is for the operands of the large products
    alone: there is no other arithmetic in it there, and all else would be slower.

    Raises:
        UserError: bfloat16 on a CPU that would be slower with it.
    """
    platform = platform or jax.default_backend()
    if name == "auto":
        name = "float32" if platform == "cpu" else "bfloat16"
    if name == "bfloat16" and platform == "cpu":
        if not cpu_flags() & {"avx512_bf16", "amx_bf16"}:
            raise UserError(
                "config.model.dtype is 'bfloat16', and this CPU has no instructions for it (AVX512-BF16 or AMX)\n"
                "  allowed: 'float32', which is faster here"
            )
        return jnp.dtype("float32"), jnp.dtype("bfloat16")
    return jnp.dtype(name), None


def compiler_options(platform: str) -> dict[str, Any]:
    """XLA's options for a platform, of those that this XLA knows.

    On a CPU with AVX-512 XLA computes 256 bits at a time unless told (docs/performance.md).
    """
    wanted = {"xla_cpu_prefer_vector_width": 512} if platform == "cpu" and "avx512f" in cpu_flags() else {}
    return wanted if _are_known(tuple(wanted.items())) else {}


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
    """What this CPU can do, in Linux's words; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split()[2:])
