"""The start of JAX's devices, and JAX's settings that would change or prevent a run."""

import functools
import os
import re
import subprocess
import sys
from typing import Any

import jax

from vit_jax import terminal
from vit_jax.errors import UserError, few, one_line

# JAX's settings on which results would depend, or with which the code does not run, and the only supported value.
# A run is a function of (config, seed). Settings that show or check something (jax_debug_nans) stay as they are.
SETTINGS: dict[str, Any] = {
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_enable_custom_prng": False,
    "jax_legacy_prng_key": "allow",
    "jax_high_dynamic_range_gumbel": False,
    "jax_disable_jit": False,
    "jax_no_tracing": False,
    "jax_no_execution": False,
    "jax_softmax_custom_jvp": False,
    "jax_transfer_guard": "allow",
    "jax_transfer_guard_host_to_device": "allow",
    "jax_transfer_guard_device_to_host": "allow",
    "jax_transfer_guard_device_to_device": "allow",
    "jax_array_garbage_collection_guard": "allow",
    "jax_thread_guard": False,
    "jax_check_tracer_leaks": False,
    "jax_error_checking_behavior_nan": "ignore",
    "jax_error_checking_behavior_divide": "ignore",
    "jax_error_checking_behavior_oob": "ignore",
}
# Environment variables that choose the devices.
VARIABLES = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME", "JAX_NUM_CPU_DEVICES", "CUDA_VISIBLE_DEVICES", "XLA_FLAGS")


def start() -> list[jax.Device]:
    """Returns JAX's devices, which are started if they are not yet; commands call `override_settings` before.

    Raises:
        UserError: a setting of JAX has an unsupported value, or the devices do not start.
    """
    if changed := _changed():
        name, value = next(iter(changed.items()))
        raise UserError(
            f"{name} is {value!r}, which changes results or prevents a run\n"
            f"  allowed: {SETTINGS[name]!r}; unset {name.upper()}, or jax.config.update({name!r}, {SETTINGS[name]!r})"
        )
    _check_xla_flags(os.environ.get("XLA_FLAGS", ""))
    try:
        return jax.devices()
    except (RuntimeError, AssertionError, AttributeError) as error:  # AttributeError: with -O, without JAX's assertion
        message = str(error) if isinstance(error, RuntimeError) else ""
        reason = re.split(r" \((?:set|you may need)", message)[0] or f"no {jax.config.jax_platforms} was found"
        found = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
        shown = ", ".join(f"{name}={value}" for name, value in found.items()) or "nothing that chooses the devices"
        raise UserError(
            f"JAX cannot start its devices: {one_line(reason)}\n  given: {shown}\n"
            f"  {f'unset {few(found)}, or ' if found else ''}use the CPU: JAX_PLATFORMS=cpu"
        ) from error


def override_settings() -> None:
    """Sets the settings of JAX in `SETTINGS` to the supported values; prints one line about those that differed."""
    changed = _changed()
    for name in changed:
        jax.config.update(name, SETTINGS[name])
    if changed:
        shown = few(f"{name.upper()}={getattr(value, 'value', value)}" for name, value in changed.items())
        terminal.warn(f"warning: JAX settings that change results or prevent a run are ignored: {shown}")


def _changed() -> dict[str, Any]:
    """Returns the settings of JAX that have an unsupported value, and the value."""
    found = {}
    for name, supported in SETTINGS.items():
        value = getattr(jax.config, name, supported)  # other versions of JAX have other settings
        value = getattr(value, "value", value)
        if value is not None and value != supported:
            found[name] = value
    return found


@functools.cache
def _check_xla_flags(flags: str) -> None:
    """Checks XLA_FLAGS in another process, because XLA ends the process that has a wrong one.

    Raises:
        UserError: XLA does not accept them.
    """
    if not flags:
        return
    code = "from jaxlib import xla_client; xla_client.CompileOptions()"
    try:
        tried = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, errors="replace")
    except OSError:
        return
    if reason := re.search(r"^F\d.*?\] (.*)", tried.stderr, re.M):  # a fatal error in XLA's log
        raise UserError(f"XLA_FLAGS is {flags!r}: {one_line(reason[1])}\n  unset it, or correct it")
