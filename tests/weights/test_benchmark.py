import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "weights_load.py"


@pytest.mark.slow
def test_the_benchmark_measures_every_way():
    command = [sys.executable, BENCHMARK, "--variant=Ti/32", "--turns=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["name"] for line in lines] == ["numpy", "load_npz", "load_safetensors", "load_npz_scan"]
    for line in lines:
        assert line["seconds"] > 0 and line["peak_mb"] > 0
        assert 20 < line["file_mb"] < 30  # Ti/32: 6.1 million parameters
    assert lines[0]["ratio"] == 1
