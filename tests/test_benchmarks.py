import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_train_step_benchmark_measures_both_sides():
    small = ["--variant=Ti/8", "--image_size=16", "--batch_size=2", "--turns=2", "--steps=1"]
    command = [sys.executable, ROOT / "benchmarks" / "train_step.py", *small]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ours, plain = (json.loads(line) for line in done.stdout.splitlines())
    assert (ours["name"], plain["name"]) == ("ours", "plain_flax")
    for line in (ours, plain):
        assert line["images_per_second"] * line["step_ms"] == pytest.approx(2 * 1000, rel=0.05)
        assert min(line["compile_s"], line["peak_memory_mb"], line["images_per_second"]) > 0
    assert ours["ratio"] > 0
