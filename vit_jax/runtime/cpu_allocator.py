"""Memory on a CPU: kept by the process from step to step, in huge pages.

XLA allocates the working memory of a training step from the C library and frees it after the step. The C library maps
such large blocks anew each time, and the system zeroes their pages one by one: a quarter of the time of a small model's
step (docs/optimizations.md).
"""

import ctypes
import os
import platform
import sys
from pathlib import Path

# Constants of mallopt(3) and madvise(2).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_MADV_HUGEPAGE = 14
_HUGE_PAGE = 2**21  # bytes
_HUGE_PAGE_FRACTION = 4  # a quarter of the machine's memory may be in huge pages
_done: list[bool] = []


def keep_memory() -> bool:
    """Makes this process keep freed memory for later allocations; returns whether that is in effect.

    Only on Linux with the GNU C library and without an accelerator. Must be called before JAX is imported, because
    threads that run already have heaps of their own. Huge pages are marked, not allocated.
    """
    if not _done:
        applies = platform.libc_ver()[0] == "glibc" and "jax" not in sys.modules and not _has_accelerator()
        _done.append(applies and _configure_malloc())
    return _done[0]


def _has_accelerator() -> bool:
    """Returns whether JAX may find an accelerator; JAX itself is not imported yet."""
    if os.environ.get("JAX_PLATFORMS"):
        return os.environ["JAX_PLATFORMS"] != "cpu"
    return any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0", "/dev/kfd"))


def _configure_malloc() -> bool:
    library = ctypes.CDLL(None)
    # All threads share one heap that never shrinks, and no allocation bypasses it.
    for option, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 2**28)):
        if not library.mallopt(option, ctypes.c_int(value)):
            return False
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _HUGE_PAGE_FRACTION
    start = library.malloc(size)
    if start:  # without it (the address space is limited) small pages are used
        first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
        length = (start + size - first) // _HUGE_PAGE * _HUGE_PAGE
        library.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _MADV_HUGEPAGE)
        library.free(start)
    return True
