"""Hardware facts, compute dtypes, compiler options, and the CPU allocator."""

import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import read_metrics, run_command

from vit_jax import sharding
from vit_jax.errors import UserError
from vit_jax.runtime import hardware, memory
from vit_jax.training import train

HAS_BFLOAT16 = bool(hardware.cpu_flags() & {"avx512_bf16", "amx_bf16"})
needs_bfloat16 = pytest.mark.skipif(not HAS_BFLOAT16, reason="this CPU has no instructions for bfloat16")


def test_peaks_are_found_by_the_longest_prefix_of_the_device_kind():
    assert hardware.peak("NVIDIA H200") == hardware.peak("NVIDIA H100 80GB HBM3") == 989e12
    assert hardware.peak("NVIDIA H100 PCIe") == 756e12
    assert hardware.peak("NVIDIA A100-SXM4-40GB") == 312e12
    assert hardware.peak("TPU v5 lite") == 197e12
    assert hardware.peak("cpu") is None
    assert all(math.isfinite(value) for value in hardware.PEAKS.values())


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
def test_compute_dtypes(monkeypatch, name, platform, flags, expected):
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset(flags))
    dtype, matmul_dtype = hardware.compute_dtypes(name, platform)
    assert (jnp.dtype(dtype).name, matmul_dtype and jnp.dtype(matmul_dtype).name) == expected


def test_bfloat16_is_refused_on_a_cpu_without_instructions_for_it(monkeypatch):
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset({"avx2"}))
    with pytest.raises(UserError, match="float32"):
        hardware.compute_dtypes("bfloat16", "cpu")


def test_compiler_options_that_xla_does_not_know_are_left_out(monkeypatch):
    monkeypatch.setattr(hardware, "cpu_flags", lambda: frozenset({"avx512f"}))
    options = hardware.compiler_options("cpu")
    assert options == {"xla_cpu_prefer_vector_width": 512}
    np.testing.assert_array_equal(jax.jit(lambda x: x + 1, compiler_options=options)(jnp.arange(3)), [1, 2, 3])
    assert hardware.compiler_options("gpu") == {}
    assert not hardware._are_known((("xla_no_such_option", 1),))


class Device:
    """A device with these memory statistics."""

    def __init__(self, stats):
        self.memory_stats = lambda: stats


def test_device_memory():
    device = Device({"bytes_limit": 100, "bytes_in_use": 30})
    assert (memory.device_memory_limit(device), memory.free_device_memory(device)) == (100, 70)
    for silent in (Device(None), Device({})):
        assert memory.device_memory_limit(silent) is None and memory.free_device_memory(silent) == 0


def test_jit_on_replicates_results_by_default():
    mesh = sharding.make_mesh(8)
    inputs = jax.device_put(jnp.arange(8.0), sharding.data_sharding(mesh))
    assert hardware.jit_on(mesh, jnp.negative)(inputs).sharding.is_fully_replicated
    kept = hardware.jit_on(mesh, jnp.negative, out_shardings=sharding.data_sharding(mesh), donate_argnums=0)(inputs)
    assert kept.sharding == sharding.data_sharding(mesh) and inputs.is_deleted()


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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
def test_freed_memory_is_kept_by_the_process():
    """64 MiB are allocated and freed four times: only the first time causes page faults."""

    def run(how):
        return json.loads(run_command(FAULTS, how))

    kept, faults = run("keep")
    if not kept:
        pytest.skip("not the GNU C library")
    _, others = run("leave")
    assert max(faults[1:]) < 50 < min(others[1:])


def test_commands_configure_the_allocator_before_jax_is_imported():
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

    kept = [str(sys.platform.startswith("linux")), "False"]
    assert run_command(script, JAX_PLATFORMS="cpu").split() == kept
    assert run_command(script, JAX_PLATFORMS="cuda").split() == ["False", "False"]


@needs_bfloat16
@pytest.mark.slow
def test_training_with_bfloat16_matmuls_learns_as_with_float32(make_config, tmp_path):
    """300 steps on the digits: the area between the two loss curves is under 1 % of the area under that of float32."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        config = make_config(
            model={"dtype": dtype, "width": 48, "depth": 3, "heads": 3, "mlp_width": 96, "dropout": 0.0},
            train={"steps": 300, "batch_size": 256, "label_smoothing": 0.1},
            log={"every": 20, "tensorboard": False},
            optimizer={"learning_rate": 3e-4, "warmup_steps": 30},
        )
        train.train(config, tmp_path / dtype)
        losses[dtype] = np.array([line["train/loss"] for line in read_metrics(tmp_path / dtype)])
    assert len(losses["float32"]) == 15 and losses["float32"][-1] < 0.6 * losses["float32"][0]
    between = np.abs(losses["bfloat16"] - losses["float32"])
    assert 0 < between.sum() < 0.01 * losses["float32"].sum(), (between, losses)


@needs_bfloat16
@pytest.mark.slow
def test_bfloat16_matmuls_give_the_same_loss_on_several_devices(toy, make_config):
    config = make_config(model={"dtype": "bfloat16"}, train={"steps_per_dispatch": 5})
    sums = []
    for devices in (1, 4):
        run = toy(config, devices)
        sums.append(float(run.run(run.start(), 5)[1]["loss"]))
    assert sums[0] == pytest.approx(sums[1], rel=1e-3)
