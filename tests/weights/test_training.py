"""`config.checkpoint.init_from`: training starts from the parameters of a file."""

import jax
import numpy as np
import pytest
from helpers import saved_state, tiny_config

from vit_jax import weights
from vit_jax.errors import UserError
from vit_jax.training import train

ONE_STEP = {
    "model": {"variant": "Ti/2"},
    "optimizer": {"learning_rate": 0.0},
    "train": {"steps": 1, "evaluation_batch_size": 120},
}


@pytest.mark.slow
def test_a_run_starts_from_the_parameters_of_a_file(tmp_path, capsys):
    """Positions are resampled and the head is replaced; at a learning rate of 0 all else equals the file."""
    train.train(tiny_config(ONE_STEP, train={"seed": 5}), tmp_path / "first")
    weights.save(tmp_path / "file.npz", *weights.load(tmp_path / "first")[:2], (8, 8), 1)
    capsys.readouterr()
    sections = {
        "data": {"image_size": 12, "labels": ("parity",)},
        "checkpoint": {"init_from": str(tmp_path / "file.npz")},
    }
    train.train(tiny_config(ONE_STEP, **sections), tmp_path / "second")
    shown = capsys.readouterr().out
    assert "positions/table" in shown and "grid 4x4 -> 6x6" in shown and "the file has 10 classes" in shown
    _, wanted, _ = weights.load(tmp_path / "file.npz", image_size=12, classes=2)
    found = saved_state(tmp_path / "second", 1)["parameters"]
    assert jax.tree.structure(wanted) == jax.tree.structure(found)
    for leaf, other in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(leaf, other)


def test_a_missing_file_is_reported_before_training(tmp_path):
    config = tiny_config(ONE_STEP, checkpoint={"init_from": str(tmp_path / "none.npz")})
    with pytest.raises(UserError, match=r"none\.npz: there is no such file"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()
