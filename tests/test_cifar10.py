"""CIFAR-10 from the published files to a trained model, as a user without internet does it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def python(real_sets, tmp_path_factory):
    """Runs Python with the sets at hand and a cache of its own; returns what it printed."""
    home = tmp_path_factory.mktemp("home")
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(home / "cache"), "TFDS_DATA_DIR": str(real_sets)}

    def run(*words):
        done = subprocess.run([sys.executable, *words], cwd=home, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_prepared_from_the_published_files_it_trains_and_every_test_image_is_scored(python, tmp_path):
    command = lambda module, *arguments: python("-m", f"vit_jax.{module}", *arguments)  # noqa: E731
    short = ["--config.train.steps=150", "--config.optimizer.warmup_steps=50", "--config.train.evaluate_every=0"]
    command("main", "--config=configs/cifar10.py:cpu", f"--workdir={tmp_path}", *short)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["test/examples"] == 10_000
    assert summary["test/accuracy"] > 0.3
    scored = json.loads(command("evaluate", f"--workdir={tmp_path}", "--batch_size=1000").splitlines()[-1])
    assert scored["test/accuracy"] == summary["test/accuracy"]
    assert scored["test/examples"] == 10_000


def test_pre_training_is_worth_more_than_the_seeds_differ(python, tmp_path):
    """The whole chain at a tenth of its length: pre-trained on CIFAR-100, fine-tuned on CIFAR-10, features judged."""
    line = json.loads(python(str(ROOT / "benchmarks" / "chain.py"), "--scale=0.1", f"--workdir={tmp_path}"))
    assert len(line["finetune"]["each"]) == len(line["scratch"]["each"]) == 3
    assert line["margin"] > 2 * max(line["finetune"]["std"], line["scratch"]["std"])
    for features in (line["before"], line["after"]):
        assert 10 < features["fewshot/1/accuracy"] < features["fewshot/10/accuracy"]
        assert features["knn/20/accuracy"] > 20
