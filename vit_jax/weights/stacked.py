"""Blocks one by one, as files have them, put into the one tree that a scanned model has."""

import dataclasses

import numpy as np

from vit_jax.weights.report import PLAIN, Row


def stack(flat: dict[str, np.ndarray], depth: int) -> dict[str, np.ndarray]:
    """The blocks' parameters along a first axis, one kind after the other, so that little is there twice."""
    first = "encoder/block_0/"
    for rest in [path[len(first) :] for path in flat if path.startswith(first)]:
        flat[f"encoder/blocks/{rest}"] = np.stack([flat.pop(f"encoder/block_{i}/{rest}") for i in range(depth)])
    return flat


def stack_rows(rows: list[Row]) -> list[Row]:
    """The same, one row for each stacked parameter."""
    merged: dict[tuple[str, ...], Row] = {}
    for row in rows:
        paths = tuple(dict.fromkeys(_stacked_path(path) for path in row.paths))
        before = merged.get(paths)
        if not paths or before is None:
            merged[paths or row.names] = dataclasses.replace(row, paths=paths)
            continue
        action = row.action if before.action in PLAIN else before.action
        details = "; ".join(dict.fromkeys(filter(None, [before.detail, row.detail])))
        merged[paths] = Row(action, before.names + row.names, paths, details)
    return list(merged.values())


def _stacked_path(path: str) -> str:
    parts = path.split("/")
    if parts[0] == "encoder" and parts[1].startswith("block_"):
        parts[1] = "blocks"
    return "/".join(parts)
