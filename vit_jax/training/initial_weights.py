"""Whether two values of `checkpoint.init_from` mean the same weights: init_from.json in a run directory.

A run needs its initial weights only to start. They may be moved or removed afterwards, and their path may be written
in another way; other weights are another config.
"""

import contextlib
import hashlib
import os
from pathlib import Path
from typing import Any

from vit_jax import atomic
from vit_jax.checkpoint import integrity, run_files
from vit_jax.errors import UserError
from vit_jax.weights import files, hub, native


def is_same(workdir: Path, before: str | None, now: str | None) -> bool:
    """Returns whether `now` has the weights of `before`, with which the run began: the same path or the same arrays.

    Raises:
        UserError: init_from.json cannot be read.
    """
    if before == now or None in (before, now):
        return before == now
    known = _read(workdir)
    spellings = {before, *known["paths"]}
    if now in spellings or os.path.realpath(now) in map(os.path.realpath, spellings):
        return True
    try:
        return digest(now) == (known["digest"] or digest(before))
    except UserError:  # one of them is gone: nothing shows that they are the same
        return False


def record(workdir: Path, path: str | None) -> None:
    """Adds a path of the run's initial weights to init_from.json, as it was written and as an absolute path.

    Raises:
        OSError: it cannot be written.
    """
    if path is None:
        return
    known = _read(workdir)
    paths = list(dict.fromkeys([*known["paths"], path, *([os.path.realpath(path)] if os.path.exists(path) else [])]))
    found = {"paths": paths, "digest": known["digest"]}
    if found["digest"] is None:
        with contextlib.suppress(UserError):  # a run of an older version whose weights are gone
            found["digest"] = digest(path)
    if found != known:
        atomic.write_json(workdir / run_files.INIT_FROM, found)


def digest(path: str) -> str:
    """Returns a SHA-256 of the names and values of all arrays of a file, published model or run directory.

    Raises:
        UserError: it cannot be read.
    """
    local = Path(hub.fetch(path))
    arrays = native.describe(local, None)[1] if native.recognise(local) else files.open_file(local).arrays
    total = hashlib.sha256()
    for name in sorted(arrays):
        total.update(f"{name} {integrity.digest(arrays[name])}\n".encode())
    return total.hexdigest()


def _read(workdir: Path) -> dict[str, Any]:
    """The content of init_from.json; without paths and digest if there is none or it is damaged."""
    found = run_files.read_json(workdir / run_files.INIT_FROM)
    if isinstance(found, dict) and isinstance(found.get("paths"), list):
        return {"paths": [str(path) for path in found["paths"]], "digest": found.get("digest")}
    return {"paths": [], "digest": None}
