"""Memory on a CPU: kept from step to step, in large pages.

XLA asks the C library for a step's whole working memory and gives it back afterwards. The library passes such sizes on
to the system, which hands the pages out anew, zeroed, one by one, at each step: a quarter of a small model's step
(docs/performance.md).
"""

import ctypes
import os
import platform
import sys
from pathlib import Path

# Of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_HUGE = 2**21  # bytes of a large page
_MADV_HUGEPAGE = 14
_SHARE = 4  # of the machine's memory, a quarter is in large pages at most
_done: list[bool] = []


def keep_memory() -> bool:
    """Has this process keep what it frees, for itself, until it ends; whether that could be arranged.

    For Linux with the GNU C library, where there is no accelerator. It must come before JAX is imported: a thread that
    runs has a heap of its own already. Room in large pages is only marked as such, not taken.
    """
    if not _done:
        fitting = platform.libc_ver()[0] == "glibc" and "jax" not in sys.modules and not _has_accelerator()
        _done.append(fitting and _arrange())
    return _done[0]


def _has_accelerator() -> bool:
    """Whether JAX may find one; asked before JAX can be."""
    if os.environ.get("JAX_PLATFORMS"):
        return os.environ["JAX_PLATFORMS"] != "cpu"
    return any(Path(device).exists() for device in ("/dev/nvidia0", "/dev/accel0", "/dev/vfio/0", "/dev/kfd"))


def _arrange() -> bool:
    library = ctypes.CDLL(None)
    # One heap that all threads share, from which nothing goes back, and nothing beside it.
    for option, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, 2**28)):
        if not library.mallopt(option, ctypes.c_int(value)):
            return False
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // _SHARE
    start = library.malloc(size)
    if start:  # else there is a limit on addresses: small pages, then
        first = -(-start // _HUGE) * _HUGE
        length = (start + size - first) // _HUGE * _HUGE
        library.madvise(ctypes.c_void_p(first), ctypes.c_size_t(length), _MADV_HUGEPAGE)
        library.free(start)
    return True
