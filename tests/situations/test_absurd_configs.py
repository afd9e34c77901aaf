"""Sealed files whose config cannot be that of their arrays are refused before memory is allocated."""

import dataclasses
import json
import resource
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, tiny_config

from vit_jax import commands, weights
from vit_jax.checkpoint import input_spec, integrity, run_files
from vit_jax.checkpoint.input_spec import InputSpec
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.errors import UserError
from vit_jax.evaluate import parse
from vit_jax.training import build_model, setup
from vit_jax.weights import files, native
from vit_jax.weights.save import flattened

SPEC = InputSpec("digits", (8, 8, 1), (0.5,), (0.5,), {"label": tuple("0123456789")})
ABSURD = {
    "width": {"model": {"width": 4 * 10**9}},
    "depth": {"model": {"depth": 10**9}},
    "scanned depth": {"model": {"depth": 10**9, "scan": True}},
    "heads": {"model": {"heads": 10**9}},
    "mlp_width": {"model": {"mlp_width": 10**10}},
    "registers": {"model": {"registers": 10**9}},
    "pre_logits": {"model": {"pre_logits": 10**9}},
    "patch size": {"model": {"variant": "Ti/1000000000"}},
    "position_grid": {"model": {"position_grid": 10**9}},
    "grid of a table": {"model": {"position_grid": 10**7, "position": "sincos_2d"}},
    "another stem": {"model": {"variant": "R50+L/32"}},
}


@pytest.fixture(scope="module")
def parameters():
    model = build_model.build(tiny_config().model, classes=10, dtype=None).clone(attention_kernel="plain")
    return setup.init_parameters(model, (8, 8, 1), 0)


def absurd(name):
    config = json.loads(json.dumps(tiny_config().to_dict()))
    for section, values in ABSURD[name].items():
        config[section].update(values)
    return config


@pytest.mark.parametrize("name", ABSURD)
def test_weights_with_an_absurd_config_are_refused(tmp_path, parameters, name):
    arrays = {f"parameters/{path}": np.asarray(leaf) for path, leaf in flattened(parameters).items()}
    content = {"config": absurd(name), "steps": [1], "digests": integrity.digests(arrays)}
    path = tmp_path / "weights.safetensors"
    files.write_safetensors(path, arrays, {native.SEALED: json.dumps(integrity.seal(content))})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match=str(path)) as caught:
        weights.load(path)
    assert len(str(caught.value).splitlines()) <= 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 * 2**10  # KiB


@pytest.mark.slow
@pytest.mark.parametrize("name", ABSURD)
def test_a_run_with_an_absurd_config_is_refused(tmp_path, parameters, name):
    """By `evaluate`, which builds the model of config.json."""
    config = absurd(name)
    with CheckpointManager(tmp_path) as manager:
        manager.save({"step": np.asarray(1, np.int32), "parameters": parameters}, {"config": config})
    (tmp_path / run_files.CONFIG).write_text(json.dumps(config))
    input_spec.write(tmp_path, SPEC)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError):
        commands.open_run(parse([f"--workdir={tmp_path}"]))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


@pytest.mark.parametrize(
    "shape",
    [(10**9, 10**9, 3), (10**9, 8, 1), (8, 10**9, 1), (8, 8, 10**9), (0, 8, 1), (2**15 + 1, 2**15, 1)],
)
def test_absurd_image_shapes_are_refused(tmp_path, shape):
    input_spec.write(tmp_path, dataclasses.replace(SPEC, image_shape=shape))
    with pytest.raises(UserError, match=r"data.json cannot be read: image_shape is .*\n  remove it"):
        input_spec.read(tmp_path)


@pytest.mark.slow
def test_the_process_ends_with_status_2(tmp_path, parameters):
    config = absurd("depth")
    with CheckpointManager(tmp_path) as manager:
        manager.save({"step": np.asarray(1, np.int32), "parameters": parameters}, {"config": config})
    (tmp_path / run_files.CONFIG).write_text(json.dumps(config))
    command = [sys.executable, "-m", "vit_jax.evaluate", f"--workdir={tmp_path}"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert ended.returncode == 2 and len(ended.stderr.splitlines()) <= 3 and "model.depth" in ended.stderr
