"""`config.checkpoint.init_from`: training starts from the parameters of a file."""

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from vit_jax import config as options
from vit_jax import weights
from vit_jax.errors import UserError
from vit_jax.training import train


def small_config(**sections):
    config = options.default()
    config.model.update(variant="Ti/2", width=16, depth=1, heads=2, mlp_width=16)
    config.optimizer.learning_rate = 0.0
    config.train.update(batch_size=64, steps=1, evaluation_batch_size=120)
    config.mesh.devices, config.log.tensorboard = 1, False
    for section, values in sections.items():
        config[section].update(values)
    return config


@pytest.mark.slow
def test_a_run_starts_from_a_file_of_others(tmp_path, capsys):
    """Positions are resampled, the head is replaced, and all else is, at a rate of zero, what the file holds."""
    train.train(small_config(train={"seed": 5}), tmp_path / "first")
    weights.save(tmp_path / "file.npz", *weights.load(tmp_path / "first")[:2], (8, 8), 1)
    capsys.readouterr()
    sections = {"data": {"image_size": 12, "labels": "parity"}, "checkpoint": {"init_from": str(tmp_path / "file.npz")}}
    train.train(small_config(**sections), tmp_path / "second")
    shown = capsys.readouterr().out
    assert "positions/table" in shown and "grid 4x4 -> 6x6" in shown and "the file has 10 classes" in shown
    _, wanted, _ = weights.load(tmp_path / "file.npz", image_size=12, classes=2)
    found = ocp.load_checkpointables(tmp_path / "second" / "checkpoints" / "1")["state"]["parameters"]
    assert jax.tree.structure(wanted) == jax.tree.structure(found)
    for leaf, other in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        np.testing.assert_array_equal(leaf, other)


def test_a_file_that_is_not_there_ends_the_run_before_it_begins(tmp_path):
    config = small_config(checkpoint={"init_from": str(tmp_path / "none.npz")})
    with pytest.raises(UserError, match=r"none\.npz: there is no such file"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()
