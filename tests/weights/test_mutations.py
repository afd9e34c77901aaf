"""Files with one array wrong: loaded with the very same numbers, or refused in three lines, and nothing between."""

import shutil

import numpy as np
import pytest
from helpers import THOROUGH

from vit_jax import weights
from vit_jax.errors import UserError
from vit_jax.weights import files
from vit_jax.weights.save import flattened

CHANGES = {
    "an axis more": lambda array: array[..., None],
    "flat": lambda array: array.reshape(-1),
    "an axis less": lambda array: np.asarray(array[0]),
    "empty": lambda array: array[:0],
    "a number": lambda array: np.zeros((), "f"),
    "twice": lambda array: np.repeat(array, 2, axis=0),
    "gone": lambda array: None,
}
NAMES = ["timm_registers_with_rows", "timm_map", "hf_deit", "hf_dinov2_registers_swiglu"]


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES if THOROUGH else NAMES[::2])
def test_one_array_wrong(references, tmp_path, name, change):
    arrays = dict(files.open_file(references / name).arrays)
    shutil.copy(references / name / "config.json", tmp_path)
    files.write_safetensors(tmp_path / "model.safetensors", arrays)
    whole = flattened(weights.load(tmp_path, heads=3)[1])
    for key, array in arrays.items():
        changed = {**arrays, key: CHANGES[change](array)}
        if changed[key] is None:
            del changed[key]
        files.write_safetensors(tmp_path / "model.safetensors", changed)
        try:
            _, parameters, report = weights.load(tmp_path, heads=3)
        except UserError as error:
            assert str(error).count("\n") <= 2
            continue
        ignored = [name for row in report.rows if row.action == "ignored" for name in row.names]
        assert key in ignored or key.endswith("mask_token") or change == "flat", key
        for path, value in flattened(parameters).items():
            np.testing.assert_array_equal(value, whole[path], err_msg=f"{key}: {path}")
