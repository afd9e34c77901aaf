"""How a checkpoint knows that it is whole: a digest of every array, and a seal over what is written beside them."""

import concurrent.futures
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

SEAL = "seal"


def names_and_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths: 'parameters/head/logits/kernel', 'optimizer/0/count'."""

    def word(key: Any) -> str:
        return str(next(getattr(key, name) for name in ("key", "name", "idx") if hasattr(key, name)))

    return {"/".join(map(word, path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def kind(leaf: Any) -> str:
    """Type and shape of an array, or of what stands for one: 'float32[64,10]'."""
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def digest(array: Any) -> str:
    """'float32[64,10] <sha-256>': type, shape and every bit of an array."""
    return f"{kind(array)} {hashlib.sha256(np.ascontiguousarray(array).view(np.uint8)).hexdigest()}"


def digests(tree: Any) -> dict[str, str]:
    """The digest of every leaf, by its path."""
    leaves = names_and_leaves(tree)
    # Hashing releases the interpreter's lock.
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return dict(zip(leaves, threads.map(digest, leaves.values()), strict=True))


def not_finite(tree: Any) -> list[str]:
    """The paths of the floating-point arrays that hold a NaN or an infinity."""
    leaves = names_and_leaves(tree)
    is_float = lambda leaf: jax.numpy.issubdtype(leaf.dtype, np.floating)  # noqa: E731 (bfloat16 among them)
    return [name for name, leaf in leaves.items() if is_float(leaf) and not np.isfinite(leaf).all()]


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """The content with a digest of itself."""
    return {**content, SEAL: _digest_of_json(content)}


def is_sealed(content: Any) -> bool:
    """Whether it is as `seal` left it."""
    if not isinstance(content, dict) or SEAL not in content:
        return False
    return content[SEAL] == _digest_of_json({name: value for name, value in content.items() if name != SEAL})


def _digest_of_json(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def to_disk(folder: Path) -> None:
    """Makes every file below a folder, and every directory entry up to it, last through a power failure."""
    for path in (*folder.rglob("*"), folder, folder.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
