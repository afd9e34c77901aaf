import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import sides  # noqa: E402
from work import Work  # noqa: E402

TORCH = os.environ.get("VIT_JAX_TORCH_PYTHON", sys.executable)
TINY = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 24, "patch_size": 4, "image_size": 8, "classes": 5}


def task(side, mode="train", dtype="float32"):
    return Work(side, mode, batch_size=4, dtype=dtype, device="cpu", **TINY)


@functools.cache
def has(package):
    """Whether the interpreter for PyTorch can import it: seconds, so it is asked once."""
    return subprocess.run([TORCH, "-c", f"import {package}"], capture_output=True).returncode == 0


@pytest.fixture(scope="module")
def ours():
    """The losses of our first steps."""
    from jax_sides import Bare

    return Bare(task("ours")).report["losses"]


def test_plain_flax_does_the_same_work(ours):
    from jax_sides import Bare

    assert np.ptp(ours) > 0.1  # it learns
    np.testing.assert_allclose(Bare(task("plain_flax")).report["losses"], ours, atol=1e-4)


@pytest.mark.slow
def test_the_trainers_step_starts_with_the_same_work(ours):
    from jax_sides import Trainer

    # Its decay leaves biases, class token and positions alone, which the first loss does not know yet.
    found = Trainer(task("ours_trainer")).report["losses"]
    np.testing.assert_allclose(found[0], ours[0], atol=1e-4)
    np.testing.assert_allclose(found, ours, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "timm", "transformers"])
def test_peers_do_the_same_work(ours, name):
    if not has(name):
        pytest.skip(f"{TORCH} has no {name}: name an interpreter that has in VIT_JAX_TORCH_PYTHON")
    side = sides.Side(task(name), TORCH)
    assert side.turn(2) > 0
    side.close()
    np.testing.assert_allclose(side.report["losses"], ours, atol=1e-4)


def test_a_side_that_cannot_work_says_why():
    with pytest.raises(sides.Failed, match="the process ended: it said nothing"):
        sides.Side(task("torch"), "/bin/false")
    with pytest.raises(sides.Failed, match="heads"):
        sides.Side(dataclasses.replace(task("ours"), heads=3), TORCH)


@pytest.mark.parametrize("given", ["torch,jaxx", "nothing"])
def test_an_unknown_side_is_named(given):
    flags = type("Flags", (), {"sides": given})
    with pytest.raises(SystemExit, match=given.split(",")[-1]):
        sides.chosen(flags)


class Fake:
    """A side whose turns take what is said; one that fails has a turn of None."""

    def __init__(self, name, *seconds):
        self.name, self.seconds, self.turns, self.waited, self.used, self.clock = name, [*seconds], [], 0.0, 0.0, 0.0

    def turn(self, steps):
        seconds = self.seconds.pop(0)
        if seconds is None:
            raise sides.Failed("no more")
        return steps * seconds

    def processor_seconds(self):
        self.clock += 0.5
        return self.clock

    def close(self):
        self.closed = True


def test_sides_take_turns_and_one_that_fails_leaves():
    a, b, c = Fake("a", 1, 2, 3), Fake("b", 4, 5, 6), Fake("c", 1, None)
    opened = [a, b, c]
    assert sides.take_turns(opened, 3, lambda side: 2) == {"c": "no more"}
    assert opened == [a, b] and c.closed
    assert (a.turns, b.turns) == ([2, 4, 6], [8, 10, 12])
    assert a.waited == 8 + 10 + 12 + 2  # the turns of b, and the one of c
    assert b.used == 0.5 * 4  # what its clock went on by, in three turns of a and one of c


def test_ratios_are_those_of_the_turns():
    assert sides.ratio([1, 2, 4], [3, 4, 4]) == sides.Ratio(2.0, 1.0, 3.0)


@pytest.mark.slow
def test_the_train_step_benchmark_measures_both_sides():
    small = ["--variant=Ti/8", "--depth=1", "--image_size=16", "--batch_size=2", "--turns=2", "--steps=1"]
    ours, plain = lines("train_step.py", *small, "--sides=ours,plain_flax", "--dtypes=float32", "--device=cpu")
    assert (ours["name"], plain["name"]) == ("ours", "plain_flax")
    for line in (ours, plain):
        assert line["images_per_second"] * line["step_ms"] == pytest.approx(2 * 1000, rel=0.05)
        assert min(line["compile_s"], line["peak_memory_mb"], line["images_per_second"]) > 0
    assert plain["losses"] == pytest.approx(ours["losses"], abs=1e-4)
    assert 0 < plain["ratio_least"] <= plain["ratio"] <= plain["ratio_most"]
    assert "ratio" not in ours


@pytest.mark.slow
def test_the_whole_set_of_measurements_runs_in_small(tmp_path):
    """Every script of gpu.sh but the peers', on a CPU; and the table that it makes of them."""
    environment = {**os.environ, "PYTHON": sys.executable, "RESULTS": str(tmp_path), "PAGE": str(tmp_path / "page.md")}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "LIMIT": "3000"}
    script = ROOT / "benchmarks" / "gpu.sh"
    done = subprocess.run([script, "--small"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "cpu.json").read_text())["lines"]
    kinds = {line["benchmark"] for line in found}
    wanted = {"train_step", "breakdown", "memory", "inference", "end_to_end", "matmul", "attention", "layer_norm"}
    assert kinds == wanted | {"gelu", "attention_check"}, done.stderr
    assert not [line for line in found if "error" in line]
    assert all(line["right"] for line in found if line["benchmark"] == "attention_check")
    end = next(line for line in found if line.get("name") == "speed")
    for name in ("ratio", "training_ratio"):
        assert 0 < end[f"{name}_least"] <= end[name] <= end[f"{name}_most"]
    none, full = (next(line for line in found if line.get("remat") == kind) for kind in ("none", "full"))
    assert min(none["planned_mb"], full["planned_mb"]) > 0
    table = (tmp_path / "page.md").read_text()
    assert all(f"**{kind}**" in table for kind in kinds)


@pytest.mark.parametrize("wrong", ["value", "gradient", "refused"])
def test_a_wrong_attention_backend_is_found(monkeypatch, capsys, wrong):
    import jax
    import kernels as measured

    from vit_jax.models.attention_backends import BACKENDS, Backend, plain_fused

    def other(fused, heads):
        if wrong == "refused":
            raise NotImplementedError("Unsupported sequence length")
        result = plain_fused(fused, heads)
        return 1.02 * result if wrong == "value" else jax.lax.stop_gradient(0.02 * result) + 0.98 * result

    backends = {"plain": BACKENDS["plain"], "heads_first": Backend(BACKENDS["heads_first"].attend, other)}
    monkeypatch.setattr(measured, "BACKENDS", backends)
    with pytest.raises(SystemExit) as raised:
        measured.main(["--check", "--widths=64", "--tokens=5", "--rows=20", "--dtypes=float32"])
    assert raised.value.code == 1
    plain, broken = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert plain["right"] and not broken["right"]
    assert ("error" in broken) == (wrong == "refused")


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
