"""What the chips can do: dense bfloat16 peaks by the makers' data sheets, for model FLOPs utilisation (MFU)."""

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
