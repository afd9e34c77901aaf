"""How much memory a device and this machine have."""

import os
from typing import Any

import psutil

SHARE = 0.9  # of a device's memory that a training step may use; the rest is for evaluation and fragmentation


def device_memory_limit(device: Any) -> int | None:
    """Returns the bytes of a `jax.Device` that this process may use; None if the device does not report them."""
    return (device.memory_stats() or {}).get("bytes_limit")


def free_device_memory(device: Any) -> int:
    """Returns the bytes of a `jax.Device` that are not in use yet; 0 if the device does not report them."""
    return (device_memory_limit(device) or 0) - (device.memory_stats() or {}).get("bytes_in_use", 0)


def free_host_memory() -> int:
    """Returns the bytes of this machine's memory that programs can use without swapping."""
    try:
        return psutil.virtual_memory().available
    except OSError:  # there is no /proc
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
