"""Which parameters are trained; the others are frozen and do not change by a bit."""

import fnmatch
import hashlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vit_jax.errors import UserError


def name_of(path: tuple[Any, ...]) -> str:
    """Returns a leaf's name, such as 'encoder/block_0/mlp/up/kernel', from its path in a tree of dictionaries."""
    return "/".join(str(key.key) for key in path)


def trained(section: ConfigDict, parameters: Any) -> Any | None:
    """Returns a tree of True for trained and False for frozen parameters, or None if all are trained.

    `optimizer.trained` holds patterns of the names of trained parameters (None: all), and `optimizer.frozen` patterns
    of those that are frozen nevertheless. `*` matches any text, slashes included.

    Args:
        section: `config.optimizer`.
        parameters: arrays or shapes.

    Raises:
        UserError: a pattern matches no parameter, or no parameter is left to train.
    """
    included, excluded = section.trained or (), section.frozen or ()
    if not included and not excluded:
        return None
    names = [name_of(path) for path, _ in jax.tree_util.tree_leaves_with_path(parameters)]
    for option, listed in (("trained", included), ("frozen", excluded)):
        for pattern in listed:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                tops = sorted({f"{name.split('/')[0]}/*" if "/" in name else name for name in names})
                raise UserError(
                    f"config.optimizer.{option}: {pattern!r} matches no parameter\n  parameters: {', '.join(tops)}"
                )

    def is_trained(path: tuple[Any, ...], _: Any) -> bool:
        name = name_of(path)
        chosen = not included or any(fnmatch.fnmatchcase(name, pattern) for pattern in included)
        return chosen and not any(fnmatch.fnmatchcase(name, pattern) for pattern in excluded)

    mask = jax.tree_util.tree_map_with_path(is_trained, parameters)
    if not any(jax.tree.leaves(mask)):
        raise UserError(
            f"config.optimizer.frozen is {','.join(excluded)!r}: no parameter is left to train\n"
            "  freeze fewer parameters, or change config.optimizer.trained"
        )
    return mask


def only_head(mask: Any | None) -> bool:
    """Returns whether only heads are trained: the backbone then runs as in evaluation, without dropout."""
    if mask is None:
        return False
    return not any(jax.tree.leaves({name: part for name, part in mask.items() if name != "head"}))


def backbone_digest(parameters: Any) -> str:
    """Returns the SHA-256 of the names and values of all parameters but the heads': it identifies a backbone."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        name = name_of(path)
        if not name.startswith("head/"):
            digest.update(f"{name} {leaf.shape} {leaf.dtype}\n".encode())
            digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def select(parameters: Any, mask: Any | None) -> Any:
    """Returns the trained parameters: the same tree with None for the frozen ones."""
    if mask is None:
        return parameters
    return jax.tree.map(lambda leaf, keep: leaf if keep else None, parameters, mask)


def merge(trained: Any, parameters: Any) -> Any:
    """Returns `parameters` with the leaves of `trained` that are not None in place of theirs."""
    return jax.tree.map(lambda new, old: old if new is None else new, trained, parameters, is_leaf=lambda x: x is None)
