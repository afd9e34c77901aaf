"""CIFAR-10 from the published files to a trained model, as a user without internet does it."""

import json

import pytest
from helpers import ROOT, THOROUGH, flags, read_json_lines, run_command

pytestmark = pytest.mark.slow


@pytest.fixture
def run(real_sets, tmp_path):
    """Runs a command that finds the prepared datasets; its output."""
    return lambda *command: run_command(*command, cwd=tmp_path, timeout=1800, TFDS_DATA_DIR=str(real_sets))


def test_a_run_on_the_prepared_files_learns_and_scores_every_test_image(run, tmp_path):
    workdir = f"--workdir={tmp_path / 'run'}"
    short = flags(train={"steps": 150, "evaluate_every": 0}, optimizer={"warmup_steps": 50})
    run("vit_jax.main", f"--config={ROOT / 'configs' / 'cifar10.py'}:cpu", workdir, *short)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test/examples"] == 10_000
    assert summary["test/accuracy"] > 0.3
    scored = read_json_lines(run("vit_jax.evaluate", workdir, "--batch_size=1000"))[-1]
    assert scored["test/accuracy"] == summary["test/accuracy"]
    assert scored["test/examples"] == 10_000


@pytest.mark.skipif(not THOROUGH, reason="six minutes: with VIT_JAX_TEST_THOROUGH=1")
def test_fine_tuning_gains_more_than_the_spread_between_seeds(run, tmp_path):
    """The paper's method at a tenth of its length: pre-train on CIFAR-100, fine-tune on CIFAR-10, score features."""
    script = ROOT / "benchmarks" / "chain.py"
    line = read_json_lines(run(script, "--scale=0.1", f"--workdir={tmp_path / 'chain'}"))[-1]
    assert len(line["finetune"]["each"]) == len(line["scratch"]["each"]) == 3
    assert line["margin"] > 2 * max(line["finetune"]["std"], line["scratch"]["std"])
    for features in (line["before"], line["after"]):
        assert 10 < features["fewshot/1/accuracy"] < features["fewshot/10/accuracy"]
        assert features["knn/20/accuracy"] > 20
