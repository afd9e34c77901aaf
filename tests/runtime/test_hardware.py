"""What is known of the chips, and what is done about it."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vit_jax.errors import UserError
from vit_jax.runtime import hardware
from vit_jax.training import train

ROUNDS = bool(hardware.cpu_flags() & {"avx512_bf16", "amx_bf16"})
needs_rounding = pytest.mark.skipif(not ROUNDS, reason="this CPU has no instructions for bfloat16")


def test_peaks_are_found_by_the_longest_name():
    assert hardware.peak("NVIDIA H100 PCIe") == 756e12 and hardware.peak("NVIDIA H100 80GB HBM3") == 989e12
    assert hardware.peak("cpu") is None


@pytest.mark.parametrize(
    "name, platform, flags, expected",
    [
        ("auto", "cpu", {"avx512_bf16"}, ("float32", None)),
        ("auto", "gpu", set(), ("bfloat16", None)),
        ("float32", "gpu", set(), ("float32", None)),
        ("bfloat16", "tpu", set(), ("bfloat16", None)),
        ("bfloat16", "cpu", {"avx512_bf16"}, ("float32", "bfloat16")),
        ("bfloat16", "cpu", {"amx_bf16"}, ("float32", "bfloat16")),
    ],
)
def test_arithmetic(monkeypatch, name, platform, flags, expected):
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset(flags))
    dtype, product = hardware.compute_dtypes(name, platform)
    assert (jnp.dtype(dtype).name, product and jnp.dtype(product).name) == expected


def test_bfloat16_is_refused_where_it_would_lose(monkeypatch):
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset({"avx2"}))
    with pytest.raises(UserError, match="float32"):
        hardware.compute_dtypes("bfloat16", "cpu")


def test_options_that_this_compiler_does_not_know_are_left_out(monkeypatch):
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset({"avx512f"}))
    options = hardware.compiler_options("cpu")
    assert options == {"xla_cpu_prefer_vector_width": 512}
    np.testing.assert_array_equal(jax.jit(lambda x: x + 1, compiler_options=options)(jnp.arange(3)), [1, 2, 3])
    assert hardware.compiler_options("gpu") == {}
    assert not hardware._are_known((("xla_of_another_day", 1),))


FAULTS = """
import json, resource, sys
import numpy as np
from vit_jax.runtime import cpu_allocator
kept = cpu_allocator.keep_memory() if sys.argv[1] == "keep" else False
counts = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    array = np.empty(2**26, np.uint8)
    array[::4096] = 1
    del array
    counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([kept, counts]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system's own affair elsewhere")
def test_what_is_kept_is_not_asked_for_again():
    """Page faults of 64 MiB that are taken and given back four times: at the first time alone."""
    run = lambda how: json.loads(subprocess.check_output([sys.executable, "-c", FAULTS, how], env={**os.environ}))  # noqa: E731
    kept, faults = run("keep")
    if not kept:
        pytest.skip("not the GNU C library")
    _, others = run("leave")
    assert max(faults[1:]) < 50 < min(others[1:])


def test_commands_keep_memory_before_jax_is_there():
    script = """
import sys
from vit_jax import commands
from vit_jax.runtime import cpu_allocator
assert "jax" not in sys.modules
commands.finish(lambda: print(cpu_allocator.keep_memory()))
import jax
cpu_allocator._done.clear()
print(cpu_allocator.keep_memory())
"""
    run = lambda platform: subprocess.check_output(  # noqa: E731
        [sys.executable, "-c", script], env={**os.environ, "JAX_PLATFORMS": platform}, text=True
    ).split()
    assert run("cpu") == [str(sys.platform.startswith("linux")), "False"]
    assert run("cuda") == ["False", "False"]


@needs_rounding
@pytest.mark.slow
def test_rounded_products_learn_as_exact_ones_do(make_config, tmp_path):
    """300 steps of the digits: the area between the loss curves is less than a hundredth of that below float32's.

    Single records differ by more: steps are not to be repeated from other roundings, only learning is.
    """
    losses = {}
    for dtype in ("float32", "bfloat16"):
        config = make_config(
            model={"dtype": dtype, "width": 48, "depth": 3, "heads": 3, "mlp_width": 96, "dropout": 0.0},
            train={"steps": 300, "batch_size": 256, "label_smoothing": 0.1},
            log={"every": 20, "tensorboard": False},
            optimizer={"learning_rate": 3e-4, "warmup_steps": 30},
        )
        train.train(config, tmp_path / dtype)
        lines = [json.loads(line) for line in (tmp_path / dtype / "metrics.jsonl").read_text().splitlines()]
        losses[dtype] = np.array([line["train/loss"] for line in lines])
    assert len(losses["float32"]) == 15 and losses["float32"][-1] < 0.6 * losses["float32"][0]
    between = np.abs(losses["bfloat16"] - losses["float32"])
    assert 0 < between.sum() < 0.01 * losses["float32"].sum(), (between, losses)


@needs_rounding
@pytest.mark.slow
def test_rounded_products_are_the_same_on_several_devices(toy, make_config):
    config = make_config(model={"dtype": "bfloat16"}, train={"steps_per_dispatch": 5})
    sums = []
    for devices in (1, 4):
        run = toy(config, devices)
        sums.append(float(run.run(run.start(), 5)[1]["loss"]))
    assert sums[0] == pytest.approx(sums[1], rel=1e-3)
