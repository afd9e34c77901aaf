"""The benchmark of loading weights."""

import json
import subprocess

import pytest
from helpers import ROOT, run_command


@pytest.mark.slow
def test_the_benchmark_measures_every_way():
    benchmark = ROOT / "benchmarks" / "weights_load.py"
    output = run_command(benchmark, "--variant=Ti/32", "--turns=1", stderr=subprocess.PIPE)
    lines = [json.loads(line) for line in output.splitlines()]
    assert [line["name"] for line in lines] == ["numpy", "load_npz", "load_safetensors", "load_npz_scan"]
    for line in lines:
        assert line["seconds"] > 0 and line["peak_mb"] > 0
        assert 20 < line["file_mb"] < 30  # Ti/32: 6.1 million parameters
    assert lines[0]["ratio"] == 1
