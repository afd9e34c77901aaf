"""How much memory a device has."""

from typing import Any

SHARE = 0.9  # of a device's memory that a training step may use; the rest is for evaluation and fragmentation


def device_memory_limit(device: Any) -> int | None:
    """Returns the bytes of a `jax.Device` that this process may use; None if the device does not report them."""
    return (device.memory_stats() or {}).get("bytes_limit")


def free_device_memory(device: Any) -> int:
    """Returns the bytes of a `jax.Device` that are not in use yet; 0 if the device does not report them."""
    return (device_memory_limit(device) or 0) - (device.memory_stats() or {}).get("bytes_in_use", 0)
