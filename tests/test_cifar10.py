"""CIFAR-10 from the published files to a trained model, as a user without internet does it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IMAGES = os.environ.get("VIT_JAX_TEST_DATA")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IMAGES, reason="needs real CIFAR-10 files; name their folder in VIT_JAX_TEST_DATA"),
]


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Runs a command of the package with a data folder and a cache of its own; returns what it printed."""
    home = tmp_path_factory.mktemp("home")
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(home / "cache"), "TFDS_DATA_DIR": str(home / "sets")}

    def run(module, *arguments):
        words = [sys.executable, "-m", f"vit_jax.{module}", *arguments]
        done = subprocess.run(words, cwd=home, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_prepared_from_the_published_files_it_trains_and_every_test_image_is_scored(command, tmp_path):
    command("data.prepare", "cifar10", f"--from={IMAGES}")
    short = ["--config.train.steps=300", "--config.optimizer.warmup_steps=50", "--config.train.evaluate_every=0"]
    command("main", "--config=configs/cifar10.py:cpu", f"--workdir={tmp_path}", *short)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["test/examples"] == 10_000
    assert summary["test/accuracy"] > 0.42
    scored = json.loads(command("evaluate", f"--workdir={tmp_path}", "--batch_size=1000").splitlines()[-1])
    assert scored["test/accuracy"] == summary["test/accuracy"]
    assert scored["test/examples"] == 10_000
