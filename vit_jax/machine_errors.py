"""Errors of the machine that no code expects: too few descriptors, threads or memory, a full disk, wrong settings."""

import errno
import re
import traceback

from vit_jax.errors import one_line

_LIMITS = "raise the limit of this shell (ulimit -a shows it), or end other processes"
# What to do about an OSError, by its number. Other numbers, such as that of a missing file, may be mistakes of ours.
WAYS_OUT = {
    errno.EMFILE: "raise the limit of this shell, for example: ulimit -n 4096",
    errno.ENFILE: "the whole machine has too many open files; end other processes",
    errno.EFBIG: "raise the limit of this shell: ulimit -f unlimited; or use a file system with larger files",
    errno.EAGAIN: _LIMITS,
    errno.ENOMEM: _LIMITS,
    errno.ENOSPC: "free disk space; TMPDIR, XDG_CACHE_HOME and --workdir choose other disks",
    errno.EDQUOT: "free disk space; TMPDIR, XDG_CACHE_HOME and --workdir choose other disks",
    errno.EROFS: "use a directory that can be written to",
    errno.EACCES: "change its permissions, or use another path",
    errno.EPERM: "change its permissions, or use another path",
    errno.EIO: "the disk or the network failed; check it (dmesg), then run the same command again",
    errno.ESTALE: "the network file system failed; run the same command again",
}


def explain(error: Exception) -> str | None:
    """Returns what is wrong with the machine or its settings and what to do, in two lines; None for other errors."""
    if isinstance(error, OSError) and error.errno in WAYS_OUT:
        where = "" if error.filename is None else f": {error.filename}"
        return f"{(error.strerror or 'operating system error').lower()}{where}\n  {WAYS_OUT[error.errno]}"
    if isinstance(error, MemoryError):
        return f"this machine has too little memory: {one_line(error)}\n  {_LIMITS}"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return f"no further thread can be started\n  {_LIMITS}"
    if isinstance(error, ImportError) and re.search("failed to map segment|annot allocate memory", str(error)):
        return f"this process has too little address space: {one_line(error)}\n  {_LIMITS}"
    if isinstance(error, ImportError) and not (error.name or "").startswith("vit_jax"):
        return f"{one_line(error)}\n  install the packages again: pip install -r requirements.txt"
    if isinstance(error, FileNotFoundError) and str(error.filename).startswith("/proc/"):
        return f"this system does not tell about its processes: {one_line(error)}\n  mount /proc"
    if isinstance(error, FloatingPointError):
        return (
            f"JAX_DEBUG_NANS or JAX_DEBUG_INFS stopped the command: {one_line(error)}\n"
            "  unset it: training skips steps that are not finite, and names the first module concerned"
        )
    if isinstance(error, ValueError) and _raised_in(error).endswith("jax/_src/config.py"):
        return f"JAX refuses an environment variable: {one_line(error)}\n  unset it, or correct its value"
    return None


def _raised_in(error: Exception) -> str:
    """Returns the file of the frame that raised an error."""
    frames = traceback.extract_tb(error.__traceback__)
    return frames[-1].filename.replace("\\", "/") if frames else ""
