"""Checks of floating-point inputs: examples with a NaN or an infinity are found and named."""

import numpy as np
from jaxtyping import Int, Shaped

_BLOCK = 4096  # examples that are checked at a time


def not_finite_rows(values: Shaped[np.ndarray, "examples ..."]) -> Int[np.ndarray, " rows"]:
    """Returns the indices of the examples with a NaN or an infinity; none for integers."""
    if not np.issubdtype(values.dtype, np.floating):
        return np.zeros(0, np.int64)
    rows = []
    for start in range(0, len(values), _BLOCK):
        block = np.asarray(values[start : start + _BLOCK])
        is_finite = np.isfinite(block).reshape(len(block), -1).all(axis=1)
        rows.append(start + np.flatnonzero(~is_finite))
    return np.concatenate(rows) if rows else np.zeros(0, np.int64)
