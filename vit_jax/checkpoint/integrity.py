"""Digests that detect corrupt checkpoints, and the check of a checkpoint's arrays against the expected shapes."""

import concurrent.futures
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_jax.errors import UserError, few, one_line

SEAL = "seal"


class CorruptCheckpoint(Exception):
    """A checkpoint's files differ from what was written; the message says which and how."""


def names_and_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths: 'parameters/head/logits/kernel', 'optimizer/0/count'."""

    def part(key: Any) -> str:
        return str(next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name)))

    return {"/".join(map(part, path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def dtype_and_shape(leaf: Any) -> str:
    """Returns dtype and shape of an array or a jax.ShapeDtypeStruct: 'float32[64,10]'."""
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def shape_of(digest: str) -> tuple[int, ...]:
    """Returns the shape in a digest: (64, 10) for 'float32[64,10] <sha-256>'."""
    return tuple(int(size) for size in digest.partition("[")[2].partition("]")[0].split(",") if size)


def digest(array: Any) -> str:
    """Returns 'float32[64,10] <sha-256>': dtype, shape and a hash of all bits of an array."""
    return f"{dtype_and_shape(array)} {hashlib.sha256(np.ascontiguousarray(array).view(np.uint8)).hexdigest()}"


def digests(tree: Any) -> dict[str, str]:
    """Returns the digest of every leaf, by its path."""
    leaves = names_and_leaves(tree)
    # Hashing releases the interpreter's lock.
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return dict(zip(leaves, threads.map(digest, leaves.values()), strict=True))


def not_finite(tree: Any) -> list[str]:
    """Returns the paths of the floating-point arrays that contain a NaN or an infinity."""

    def has_non_finite(leaf: Any) -> bool:
        is_float = jax.numpy.issubdtype(leaf.dtype, np.floating)  # unlike NumPy's, knows bfloat16
        return bool(is_float and not np.isfinite(leaf).all())

    return [name for name, leaf in names_and_leaves(tree).items() if has_non_finite(leaf)]


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """Returns the content (JSON values) together with a digest of it."""
    return {**content, SEAL: _json_digest(content)}


def is_sealed(content: Any) -> bool:
    """Returns whether the content is unchanged since `seal` returned it."""
    if not isinstance(content, dict) or SEAL not in content:
        return False
    return content[SEAL] == _json_digest({name: value for name, value in content.items() if name != SEAL})


def _json_digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def compare_digests(path: Path, written: dict[str, str], found: dict[str, str]) -> None:
    """Raises CorruptCheckpoint if an array is missing or changed. Arrays in `found` alone are ignored."""
    changed = [name for name, text in written.items() if found.get(name) != text]
    if changed:
        raise CorruptCheckpoint(f"{path} is corrupt: {few(changed)} changed since it was written")


def check_shapes(path: Path, stored: dict[str, str], expected: dict[str, Any]) -> None:
    """Raises UserError if an intact checkpoint is of another model, optimizer or version.

    Args:
        path: of the checkpoint.
        stored: its digests.
        expected: tree of arrays or jax.ShapeDtypeStructs.
    """
    saved = {name: text.split(" ")[0] for name, text in stored.items()}
    wanted = {name: dtype_and_shape(leaf) for name, leaf in names_and_leaves(expected).items()}
    rows = [
        f"{name}: {saved.get(name, 'missing')} -> {wanted.get(name, 'missing')}"
        for name in sorted({*saved, *wanted})
        if saved.get(name) != wanted.get(name)
    ]
    if rows:
        raise UserError(
            f"{path} does not match the model and optimizer of this config\n"
            f"  saved -> expected: {few(rows)}\n"
            "  use the config that it was saved with, or another --workdir"
        )


def root_cause(error: BaseException) -> str:
    """Returns the message of the innermost exception of a chain that has one, in one line."""
    cause = error
    while (cause := cause.__cause__) is not None:
        error = cause if str(cause).strip() else error
    # TensorStore puts the system's error number after several lines of paths.
    number = re.search(r"\[os_error_code='(\d+)'\]", " ".join(str(error).split()))
    if number:
        error = OSError(int(number[1]), os.strerror(int(number[1])))
    return one_line(error)
