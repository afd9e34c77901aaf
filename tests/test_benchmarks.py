import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
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


def lines(script, *arguments):
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
def test_the_augmentation_benchmark_sets_its_sides_beside_each_other():
    ours, pillow = lines(
        "augment.py", "--turns=2", "--batches=2", "--batch_size=8", "--workers=1", "--only=ours,pillow"
    )
    assert (ours["name"], pillow["name"]) == ("ours", "pillow")
    assert min(ours["images_per_second"], pillow["images_per_second"], ours["ratio_to_pillow"]) > 0
    assert pillow["slowest"] <= pillow["images_per_second"] <= pillow["fastest"]


@pytest.fixture
def small(tmp_path):
    """Arguments that name a folder of twenty tiny images."""
    for k in range(20):
        path = tmp_path / "train" / "ab"[k % 2] / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (k, 0, 0)).save(path)
    return [f"--dir={tmp_path}", "--image_size=8", "--variant=Ti/8", "--batch_size=4", "--turns=2", "--steps=2"]


@pytest.mark.slow
def test_the_streaming_benchmark_trains_both_ways(small):
    resident, streamed = lines("streaming.py", "train", *small)
    assert (resident["name"], streamed["name"]) == ("resident", "streamed")
    assert streamed["least"] <= streamed["ratio"] <= streamed["most"]


@pytest.mark.slow
def test_the_streaming_benchmark_decodes_and_weighs(small):
    ours, pillow = lines("streaming.py", "decode", *small)
    assert min(ours["images_per_second"], pillow["images_per_second"], ours["ratio_to_pillow"]) > 0
    few, many = lines("streaming.py", "memory", "--image_size=8", "--batches=40")
    assert (few["records"], many["records"]) == (1_000, 100_000)
    assert min(few["early_mb"], many["late_mb"]) > 50


@pytest.mark.slow
def test_the_seeds_benchmark_trains_both_ways():
    tiny = ["--set=model.width=16", "--set=model.depth=1", "--set=model.heads=2", "--set=model.mlp_width=16"]
    apart, at_once = lines("seeds.py", "--seeds=2", "--turns=2", "--steps=2", *tiny)
    assert (apart["name"], at_once["name"], at_once["seeds"]) == ("one_after_another", "at_once", 2)
    assert at_once["least"] <= at_once["ratio"] <= at_once["most"]
    assert at_once["memory_mb"] > apart["memory_mb"] > 0
