"""The cache of compiled programs on disk."""

import contextlib
import hashlib
import platform
from pathlib import Path

import jax

from vit_jax import paths
from vit_jax.runtime import hardware


def cache_compilations() -> None:
    """Keeps compiled programs in the user's cache directory, so that the next start does not compile them again.

    Programs for a CPU depend on its instruction set: each kind of processor has a directory of its own. A cache that
    the user has configured for JAX stays in use instead.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    directory = paths.cache_dir() / f"xla-{_processor()}"
    _remove_empty(directory)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _remove_empty(directory: Path) -> None:
    """Removes the empty files that a power failure leaves of programs: JAX would never replace them."""
    with contextlib.suppress(OSError):
        for path in directory.glob("*-cache"):
            if not path.stat().st_size:
                path.unlink(missing_ok=True)


def _processor() -> str:
    known = " ".join(sorted(hardware.cpu_flags())) or platform.machine() + platform.processor()
    return hashlib.sha256(known.encode()).hexdigest()[:12]
