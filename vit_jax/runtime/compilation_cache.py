"""The cache of compiled programs on disk."""

import hashlib
import os
import platform
from pathlib import Path

import jax

from vit_jax.runtime import hardware


def cache_compilations() -> None:
    """Keeps compiled programs in the user's cache folder, so that a second start need not wait for the compiler.

    Host programs are tied to the processor's instructions, so each processor has a folder of its own.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / f"xla-{_processor()}"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def cache_folder() -> Path:
    """The user's folder for what may be made again at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vit_jax"


def _processor() -> str:
    known = " ".join(sorted(hardware.cpu_flags())) or platform.machine() + platform.processor()
    return hashlib.sha256(known.encode()).hexdigest()[:12]
