"""Reconstructions of a masked autoencoder."""

import numpy as np
import pytest

from vit_jax import commands, reconstruct
from vit_jax import config as options
from vit_jax.objectives import masked
from vit_jax.training import train


@pytest.mark.slow
@pytest.mark.parametrize("normalization", ["half", pytest.param("set", marks=pytest.mark.slow)])
def test_reconstructions_undo_the_normalization_of_the_run(normalization, tmp_path, monkeypatch):
    """If the predictions are the true patches, the reconstructions are the images."""
    config = options.default()
    config.model.update(variant="Ti/4", width=16, depth=1, heads=2, mlp_width=16)
    config.decoder.update(width=8, depth=1, heads=2, mlp_width=8)
    config.train.update(objective="masked_autoencoder", batch_size=32, steps=1)
    config.data.update(normalization=normalization, train="train[:64]", test="test[:32]")
    config.mesh.devices, config.log.tensorboard = 1, False
    train.train(config, tmp_path)
    monkeypatch.setattr(masked.Autoencoding, "pixels", lambda self, outputs, patches: patches)
    trained = commands.open_run(reconstruct.parse([f"--workdir={tmp_path}"]))
    (images, visible, reconstructions), _ = reconstruct.reconstruct(trained, "test", 4)
    np.testing.assert_array_equal(reconstructions, images)
    assert (visible != images).any()
