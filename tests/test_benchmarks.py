"""The benchmarks run, and the sides of a comparison compute the same."""

import dataclasses
import functools
import json
import os
import sys

import numpy as np
import pytest
from helpers import ROOT, mostly_slow, read_json_lines, run_command, start_command
from PIL import Image

sys.path.append(str(ROOT / "benchmarks"))

import sides
from work import Work

TORCH = os.environ.get("VIT_JAX_TORCH_PYTHON", sys.executable)
TINY = {"width": 16, "depth": 2, "heads": 2, "mlp_width": 24, "patch_size": 4, "image_size": 8, "classes": 5}


def work(side, mode="train", dtype="float32"):
    return Work(side, mode, batch_size=4, dtype=dtype, device="cpu", **TINY)


@functools.cache
def has(package):
    """Whether the interpreter for PyTorch can import a package; checking takes seconds."""
    return start_command(f"import {package}\n", python=TORCH).wait() == 0


@pytest.fixture(scope="module")
def ours():
    """The losses of the first steps of our implementation."""
    from jax_sides import Bare

    return Bare(work("ours")).report["losses"]


@pytest.mark.slow
def test_plain_flax_has_the_same_losses(ours):
    from jax_sides import Bare

    assert np.ptp(ours) > 0.1  # the loss changes
    np.testing.assert_allclose(Bare(work("plain_flax")).report["losses"], ours, atol=1e-4)


@pytest.mark.slow
def test_the_trainer_starts_with_the_same_losses(ours):
    from jax_sides import Trainer

    # It applies no weight decay to biases, class token and positions, which does not affect the first loss.
    found = Trainer(work("ours_trainer")).report["losses"]
    np.testing.assert_allclose(found[0], ours[0], atol=1e-4)
    np.testing.assert_allclose(found, ours, atol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", "timm", "transformers"])
def test_pytorch_implementations_have_the_same_losses(ours, name):
    if not has(name):
        pytest.skip(f"{TORCH} has no {name}: set VIT_JAX_TORCH_PYTHON to an interpreter that has it")
    side = sides.Side(work(name), TORCH)
    assert side.turn(2) > 0
    side.close()
    np.testing.assert_allclose(side.report["losses"], ours, atol=1e-4)


def test_the_error_of_a_side_that_fails_is_reported():
    with pytest.raises(sides.Failed, match="the process ended: no output"):
        sides.Side(work("torch"), "/bin/false")
    with pytest.raises(sides.Failed, match="heads"):
        sides.Side(dataclasses.replace(work("ours"), heads=3), TORCH)


@pytest.mark.parametrize("names", ["torch,jaxx", "nothing"])
def test_unknown_sides_are_named(names):
    flags = type("Flags", (), {"sides": names})
    with pytest.raises(SystemExit, match=names.split(",")[-1]):
        sides.chosen(flags)


class Fake:
    """A side whose turns take the given seconds; at None it fails."""

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


def test_sides_take_turns_and_one_that_fails_is_removed():
    a, b, c = Fake("a", 1, 2, 3), Fake("b", 4, 5, 6), Fake("c", 1, None)
    opened = [a, b, c]
    assert sides.take_turns(opened, 3, lambda side: 2) == {"c": "no more"}
    assert opened == [a, b] and c.closed
    assert (a.turns, b.turns) == ([2, 4, 6], [8, 10, 12])
    assert a.waited == 8 + 10 + 12 + 2  # the turns of b, and the one of c
    assert b.used == 0.5 * 4  # its processor time during three turns of a and one of c


def test_ratios_are_computed_per_turn():
    assert sides.ratio([1, 2, 4], [3, 4, 4]) == sides.Ratio(2.0, 1.0, 3.0)


@pytest.mark.slow
def test_the_train_step_benchmark_compares_two_sides():
    small = ["--variant=Ti/8", "--depth=1", "--image_size=16", "--batch_size=2", "--turns=2", "--steps=1"]
    ours, plain = lines("train_step.py", *small, "--sides=ours,plain_flax", "--dtypes=float32", "--device=cpu")
    assert (ours["name"], plain["name"]) == ("ours", "plain_flax")
    for line in (ours, plain):
        assert line["images_per_second"] * line["step_ms"] == pytest.approx(2 * 1000, rel=0.05)
        assert min(line["compile_s"], line["peak_memory_mb"], line["images_per_second"]) > 0
    assert plain["losses"] == pytest.approx(ours["losses"], abs=1e-4)
    assert 0 < plain["ratio_min"] <= plain["ratio"] <= plain["ratio_max"]
    assert "ratio" not in ours


@pytest.mark.slow
def test_all_measurements_run_with_small_models(tmp_path):
    """The scripts of gpu.sh on a CPU, without PyTorch, and the tables of their results."""
    variables = {"PYTHON": sys.executable, "RESULTS": str(tmp_path), "PAGE": str(tmp_path / "page.md")}
    variables |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "LIMIT": "3000"}
    output = run_command(ROOT / "benchmarks" / "gpu.sh", "--small", python="bash", timeout=3000, **variables)
    found = json.loads((tmp_path / "cpu.json").read_text())["lines"]
    kinds = {line["benchmark"] for line in found}
    wanted = {"train_step", "breakdown", "memory", "inference", "end_to_end", "matmul", "attention", "layer_norm"}
    assert kinds == wanted | {"gelu", "attention_check"}, output
    assert not [line for line in found if "error" in line]
    assert all(line["correct"] for line in found if line["benchmark"] == "attention_check")
    end = next(line for line in found if line.get("name") == "speed")
    for name in ("ratio", "training_ratio"):
        assert 0 < end[f"{name}_min"] <= end[name] <= end[f"{name}_max"]
    none, full = (next(line for line in found if line.get("remat") == kind) for kind in ("none", "full"))
    assert min(none["planned_mb"], full["planned_mb"]) > 0
    table = (tmp_path / "page.md").read_text()
    assert all(f"**{kind}**" in table for kind in kinds)


@pytest.mark.parametrize("wrong", mostly_slow(["gradient", "value", "refused"], 3))
@pytest.mark.slow
def test_a_wrong_attention_backend_is_detected(monkeypatch, capsys, wrong):
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
    assert plain["correct"] and not broken["correct"]
    assert ("error" in broken) == (wrong == "refused")


def lines(script, *arguments):
    return read_json_lines(run_command(ROOT / "benchmarks" / script, *arguments, timeout=600))


@pytest.mark.slow
def test_the_augmentation_benchmark_compares_two_sides():
    ours, pillow = lines(
        "augment.py", "--turns=2", "--batches=2", "--batch_size=8", "--workers=1", "--only=ours,pillow"
    )
    assert (ours["name"], pillow["name"]) == ("ours", "pillow")
    assert min(ours["images_per_second"], pillow["images_per_second"], ours["ratio_to_pillow"]) > 0
    assert pillow["slowest"] <= pillow["images_per_second"] <= pillow["fastest"]


@pytest.fixture
def small(tmp_path):
    """Arguments for a directory of twenty tiny images."""
    for k in range(20):
        path = tmp_path / "train" / "ab"[k % 2] / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (k, 0, 0)).save(path)
    return [f"--dir={tmp_path}", "--image_size=8", "--variant=Ti/8", "--batch_size=4", "--turns=2", "--steps=2"]


@pytest.mark.slow
def test_the_streaming_benchmark_compares_training(small):
    resident, streamed = lines("streaming.py", "train", *small)
    assert (resident["name"], streamed["name"]) == ("resident", "streamed")
    assert streamed["ratio_min"] <= streamed["ratio"] <= streamed["ratio_max"]


@pytest.mark.slow
def test_the_streaming_benchmark_measures_decoding_and_memory(small):
    ours, pillow = lines("streaming.py", "decode", *small)
    assert min(ours["images_per_second"], pillow["images_per_second"], ours["ratio_to_pillow"]) > 0
    few, many = lines("streaming.py", "memory", "--image_size=8", "--batches=40")
    assert (few["records"], many["records"]) == (1_000, 100_000)
    assert min(few["early_mb"], many["late_mb"]) > 50
