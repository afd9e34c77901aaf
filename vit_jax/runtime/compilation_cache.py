"""The cache of compiled programs on disk."""

import hashlib
import os
import platform
from pathlib import Path

import jax

from vit_jax.runtime import hardware


def cache_compilations() -> None:
    """Keeps compiled programs in the user's cache directory, so that the next start does not compile them again.

    Programs for a CPU depend on its instruction set: each kind of processor has a directory of its own. A cache that
    the user has configured for JAX stays in use instead.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / f"xla-{_processor()}"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def cache_dir() -> Path:
    """Returns the user's directory for files that can be made again at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vit_jax"


def _processor() -> str:
    known = " ".join(sorted(hardware.cpu_flags())) or platform.machine() + platform.processor()
    return hashlib.sha256(known.encode()).hexdigest()[:12]
