"""Digests that show whether a checkpoint is what was written, and whether it fits the model at hand."""

import concurrent.futures
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vit_jax.errors import UserError

SEAL = "seal"
SHOWN = 3  # names, of many


class Damaged(Exception):
    """A checkpoint is not what was written; says how."""


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


def digests_of(path: Path, read: Callable[[], Any]) -> dict[str, str]:
    """The digest of every array that `read` returns; Damaged where it cannot read them."""
    try:
        return digests(read())
    except Exception as error:  # Orbax and TensorStore raise many kinds for files that they cannot understand
        raise Damaged(f"{path} is damaged: it cannot be read ({one_line(error)})") from error


def compare(path: Path, written: dict[str, str], found: dict[str, str]) -> None:
    """Raises Damaged where an array is missing or other than it was; more than were written are none's concern."""
    changed = [name for name, text in written.items() if found.get(name) != text]
    if changed:
        raise Damaged(f"{path} is damaged: {few(changed)} {'is' if len(changed) == 1 else 'are'} not as written")


def check_kinds(path: Path, stored: dict[str, str], wanted: dict[str, Any]) -> None:
    """Raises UserError where a whole checkpoint is that of another model, optimiser or version."""
    wanted = {name: kind(leaf) for name, leaf in names_and_leaves(wanted).items()}
    rows = [
        f"{name}: {stored.get(name, 'not there')} -> {wanted.get(name, 'not there')}"
        for name in sorted({*stored, *wanted})
        if stored.get(name) != wanted.get(name)
    ]
    if rows:
        raise UserError(
            f"{path} is the state of another model or optimiser\n  saved -> wanted: {few(rows)}\n"
            "  give the config that it was saved with, or another --workdir"
        )


def few(names: list[str]) -> str:
    """The first of many names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def one_line(error: BaseException) -> str:
    """What an error says, in one line of bearable length."""
    while error.__cause__ is not None:  # what the outer ones only wrap
        error = error.__cause__
    text = " ".join(str(error).split())
    number = re.search(r"\[os_error_code='(\d+)'\]", text)  # TensorStore's, behind lines of paths
    if number:
        text = str(OSError(int(number[1]), os.strerror(int(number[1]))))
    return text[:200] or type(error).__name__
