"""Which parameters are trained: the others are frozen, and not a bit of them changes."""

import fnmatch
import hashlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vit_jax.errors import UserError


def name_of(path: tuple[Any, ...]) -> str:
    """'encoder/block_0/mlp/up/kernel' for the path of a leaf."""
    return "/".join(str(key.key) for key in path)


def patterns(text: str | None) -> list[str]:
    """The patterns in 'head/*,encoder/norm/*'; none where nothing is given."""
    return [pattern.strip() for pattern in text.split(",")] if text else []


def trained(section: ConfigDict, parameters: Any) -> Any | None:
    """A tree of True where a parameter is trained, or None where all are.

    `config.optimizer.trained` has the patterns of names that are trained, all where it is None, and
    `config.optimizer.frozen` those that are not; `*` stands for anything, slashes included.

    Raises:
        UserError: a pattern that no parameter's name matches, or nothing is left to train.
    """
    only, never = patterns(section.trained), patterns(section.frozen)
    if not only and not never:
        return None
    names = [name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(parameters)]
    for option, given in (("trained", only), ("frozen", never)):
        for pattern in given:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                tops = sorted({f"{name.split('/')[0]}/*" if "/" in name else name for name in names})
                raise UserError(
                    f"config.optimizer.{option}: no parameter is named {pattern!r}\n  there are: {', '.join(tops)}"
                )

    def one(path: tuple[Any, ...], _: Any) -> bool:
        name = name_of(path)
        chosen = not only or any(fnmatch.fnmatchcase(name, pattern) for pattern in only)
        return chosen and not any(fnmatch.fnmatchcase(name, pattern) for pattern in never)

    mask = jax.tree_util.tree_map_with_path(one, parameters)
    if not any(jax.tree.leaves(mask)):
        raise UserError(
            f"config.optimizer.frozen is {section.frozen!r}, which leaves nothing to train\n"
            "  freeze less, or see config.optimizer.trained"
        )
    return mask


def only_head(mask: Any | None) -> bool:
    """Whether nothing but heads is trained: the backbone then runs as it does in evaluation."""
    if mask is None:
        return False
    return not any(jax.tree.leaves({name: part for name, part in mask.items() if name != "head"}))


def backbone_digest(parameters: Any) -> str:
    """SHA-256 of all parameters below the heads, names included: whose features they make."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        name = name_of(path)
        if not name.startswith("head/"):
            digest.update(f"{name} {leaf.shape} {leaf.dtype}\n".encode())
            digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def select(parameters: Any, mask: Any | None) -> Any:
    """The trained parameters: the same tree with None for the frozen ones."""
    if mask is None:
        return parameters
    return jax.tree.map(lambda leaf, keep: leaf if keep else None, parameters, mask)


def merge(chosen: Any, parameters: Any) -> Any:
    """`parameters` with those of `chosen` that are not None in their places."""
    return jax.tree.map(lambda new, old: old if new is None else new, chosen, parameters, is_leaf=lambda x: x is None)
