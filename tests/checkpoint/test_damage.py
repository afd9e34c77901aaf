"""Checkpoints that were damaged on disk: none is loaded without a report."""

import collections
import gc
import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from vit_jax import checkpoints as command
from vit_jax.checkpoint import integrity, orbax_logging
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.checkpoint.run_files import DAMAGED
from vit_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
STEPS = (1, 2, 3)
# VIT_JAX_TEST_THOROUGH=1 runs all repetitions.
THOROUGH = bool(os.environ.get("VIT_JAX_TEST_THOROUGH"))


@pytest.fixture(scope="module")
def saved(toy, make_config, tmp_path_factory):
    """A run directory with three checkpoints, their states, and the shapes that a restore expects."""
    workdir = tmp_path_factory.mktemp("saved")
    run = toy(make_config(optimizer={"average_decay": 0.9}))
    state, states = run.start(), {}
    with CheckpointManager(workdir, keep=3) as manager:
        for step in STEPS:
            state, _ = run.run(state, 1)
            states[step] = integrity.digests(jax.device_get(state.to_arrays()))
            manager.save(state.to_arrays(), {"config": {"train": {"seed": step}}, "seconds": 1.0 * step})

    def abstract(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)

    return workdir, states, jax.tree.map(abstract, state.to_arrays())


def flip(path, generator):
    content = bytearray(path.read_bytes())
    index = generator.randrange(len(content))
    content[index] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def zero(path, generator):
    content = bytearray(path.read_bytes())
    start = generator.randrange(len(content))
    content[start : start + 4096] = bytes(len(content[start : start + 4096]))
    path.write_bytes(content)


def truncate(path, generator):
    os.truncate(path, generator.randrange(path.stat().st_size))


def delete(path, generator):
    path.unlink()


def swap(path, generator):
    """Swaps the file with the same file of the previous checkpoint, or with another of its own if names differ."""
    root = next(parent for parent in path.parents if parent.name == "3")
    other = root.parent / "2" / path.relative_to(root)
    if not other.is_file():
        other = generator.choice([file for file in root.rglob("*") if file.is_file() and file.stat().st_size])
    mine, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(mine)


DAMAGE = {"flip": flip, "zero": zero, "truncate": truncate, "delete": delete, "swap": swap}


def damage_and_restore(saved, copy, kind, seed):
    """Damages a random file of the newest checkpoint and restores: 'older', 'refused', or 'same' if it had no effect.

    Fails unless the restored arrays are exactly those of some saved step.
    """
    source, states, like = saved
    shutil.copytree(source, copy)
    generator = random.Random(seed)
    files = sorted(path for path in (copy / "checkpoints" / "3").rglob("*") if path.is_file() and path.stat().st_size)
    DAMAGE[kind](generator.choice(files), generator)
    printed = []
    try:
        with CheckpointManager(copy, keep=3, say=printed.append) as manager:
            arrays = jax.device_get(manager.restore_newest(like))
    except UserError as error:
        assert "are corrupt" in str(error)
        return "refused"
    finally:
        shutil.rmtree(copy, ignore_errors=True)
    step = int(arrays["step"])
    assert integrity.digests(arrays) == states[step]
    assert bool(printed) == (step < 3)
    return "older" if printed else "same"


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_never_loaded_silently(saved, tmp_path, kind):
    """Up to two of three damages hit bytes that no restore reads (padding of the storage), but not forty in a row."""
    outcomes = (damage_and_restore(saved, tmp_path / "copy", kind, seed) for seed in range(40))
    assert any(outcome != "same" for outcome in outcomes)


@pytest.mark.slow
def test_random_damage_is_never_loaded_silently(saved, tmp_path):
    outcomes = collections.Counter()
    count = 2000 if THOROUGH else 100
    for seed in range(count):
        kind = list(DAMAGE)[seed % len(DAMAGE)]
        outcomes[kind, damage_and_restore(saved, tmp_path / "copy", kind, 1000 + seed)] += 1
    print(dict(outcomes))
    assert sum(outcomes.values()) == count


def test_a_corrupt_checkpoint_is_moved_and_reported(saved, tmp_path):
    source, _, like = saved
    shutil.copytree(source, tmp_path / "run")
    zero(tmp_path / "run" / "checkpoints" / "3" / "state" / "manifest.ocdbt", random.Random(0))
    printed = []
    with CheckpointManager(tmp_path / "run", say=printed.append) as manager:
        arrays = manager.restore_newest(like)
        assert manager.steps() == [1, 2]
        assert manager.corrupt() == [tmp_path / "run" / DAMAGED / "3"]
    assert int(arrays["step"]) == 2
    assert (tmp_path / "run" / DAMAGED / "3").is_dir()
    assert len(printed) == 1 and "checkpoints/3 is corrupt: " in printed[0] and "; moved to " in printed[0]


def test_commands_print_nothing_else_about_a_corrupt_checkpoint(saved, tmp_path, capfd, caplog):
    orbax_logging.hide_background_errors()  # as `vit_jax.commands.finish` does
    source, _, like = saved
    shutil.copytree(source, tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints" / "3" / "state").rglob("d/*"):
        file.write_bytes(b"x" * file.stat().st_size)
    with CheckpointManager(tmp_path / "run", say=lambda line: None) as manager:
        assert int(manager.restore_newest(like)["step"]) == 2
    gc.collect()  # tasks whose exceptions were never retrieved report them when they are collected
    assert "".join(capfd.readouterr()) + caplog.text == ""


def run_python(*arguments):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, cwd=ROOT)


@pytest.mark.slow
def test_a_command_in_its_own_process_prints_one_line_about_a_corrupt_checkpoint(saved, tmp_path):
    shutil.copytree(saved[0], tmp_path / "run")
    for file in (tmp_path / "run" / "checkpoints" / "3" / "state").rglob("d/*"):
        file.write_bytes(b"x" * file.stat().st_size)
    finished = run_python("-m", "vit_jax.checkpoints", "verify", str(tmp_path / "run"))
    assert finished.returncode == 1 and finished.stderr == ""
    assert len(finished.stdout.splitlines()) == 4 and "2 of 3 are intact" in finished.stdout


def test_the_library_changes_no_global_hooks():
    script = """
import logging, sys
before = sys.unraisablehook, list(logging.getLogger("asyncio").filters)
from vit_jax import weights
weights.load("tests/fixtures/version_0.1/masked")
assert (sys.unraisablehook, logging.getLogger("asyncio").filters) == before
assert not logging.getLogger("absl").filters
"""
    finished = run_python("-c", script)
    assert finished.returncode == 0, finished.stderr


def test_if_all_checkpoints_are_corrupt_restoring_fails(saved, tmp_path):
    source, _, like = saved
    shutil.copytree(source, tmp_path / "run")
    for step in STEPS:
        shutil.rmtree(tmp_path / "run" / "checkpoints" / str(step) / "state")
    for _ in range(2):  # a second attempt, as a scheduler makes, fails as well
        with (
            CheckpointManager(tmp_path / "run", say=lambda _: None) as manager,
            pytest.raises(UserError, match=r"all checkpoints in .* are corrupt; they were moved to"),
        ):
            manager.restore_newest(like)
        assert sorted(path.name for path in (tmp_path / "run" / DAMAGED).iterdir()) == ["1", "2", "3"]


def test_changed_metadata_is_detected():
    content = integrity.seal({"metadata": {"seconds": 0.1 + 0.2}, "metrics": {}})
    assert integrity.is_sealed(json.loads(json.dumps(content)))
    content["metadata"]["seconds"] = 0.3
    assert not integrity.is_sealed(content)


def test_another_shape_is_refused_and_not_called_corrupt(saved):
    source, _, like = saved
    wider = jax.ShapeDtypeStruct((1, 1, 17), "float32", sharding=None)
    with (
        CheckpointManager(source, keep=3) as manager,
        pytest.raises(UserError, match=r"parameters/class_token: float32\[1,1,16\] -> float32\[1,1,17\]"),
    ):
        manager.restore_newest({**like, "parameters": {**like["parameters"], "class_token": wider}})
    assert not (source / DAMAGED).exists()


def test_optional_arrays_may_be_missing_but_others_not(saved):
    source, states, like = saved
    extra = {**like, "teacher": {"kernel": like["parameters"]["class_token"]}}
    with CheckpointManager(source, keep=3) as manager:
        arrays = jax.device_get(manager.restore(extra, optional=("teacher", "averaged")))
        assert integrity.digests(arrays) == states[3]  # 'averaged' is there and is returned, 'teacher' is not
        with pytest.raises(UserError, match=r"teacher/kernel: missing -> float32\[1,1,16\]"):
            manager.restore(extra)


def test_one_part_is_read_and_verified_alone(saved, tmp_path):
    source, states, _ = saved
    copy = shutil.copytree(source, tmp_path / "run")
    with CheckpointManager(copy, keep=3) as manager:
        averaged = manager.read_part(2, "averaged")
        assert averaged and {name: integrity.digest(leaf) for name, leaf in averaged.items()} == {
            name: text for name, text in states[2].items() if name.startswith("averaged/")
        }
        for file in (copy / "checkpoints" / "2" / "state").rglob("d/*"):
            file.write_bytes(b"x" * file.stat().st_size)
        with pytest.raises(UserError, match="checkpoints/2 is corrupt"):
            manager.read_part(2, "averaged")


def test_the_command_lists_verifies_and_compares(saved, tmp_path, capsys):
    source, _, _ = saved
    workdir = tmp_path / "run"
    shutil.copytree(source, workdir)
    assert command.main(["list", str(workdir)]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["step", "1", "2", "3"]
    assert command.main(["verify", str(workdir)]) == 0
    assert "3 of 3 are intact" in capsys.readouterr().out
    assert command.main(["diff", str(workdir), str(workdir)]) == 0
    assert command.main(["diff", str(workdir), str(workdir), "--steps=2,3"]) == 1
    shown = capsys.readouterr().out
    assert "config.train.seed: 2 -> 3" in shown
    with CheckpointManager(workdir, read_only=True) as manager:
        one, two = (manager.read_part(step, "parameters") for step in (2, 3))
    found = dict(re.findall(r"^(\S+): .*relative difference (\S+)$", shown, re.MULTILINE))
    norms = {name: np.linalg.norm(two[name] - one[name]) / np.linalg.norm(one[name]) for name in one}
    largest = sorted(norms, key=norms.get)[-5:]
    assert {name: value for name, value in found.items() if name in norms} == {
        name: f"{norms[name]:.3g}" for name in largest
    }
    head = [name for name in one if name.startswith("parameters/head/")]
    before, after = (np.concatenate([side[name].ravel() for name in head]) for side in (one, two))
    expected = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert f"parameters/head: {len(head)} of {len(head)} arrays differ, relative difference {expected:.3g}" in shown
    assert len(shown.splitlines()) < 25
    assert command.main(["diff", str(workdir), str(workdir), "--steps=2,3", "--all"]) == 1
    every = capsys.readouterr().out
    assert "averaged/head/logits/kernel: float32[16,4], values differ\n" in every and "relative" not in every
    zero(workdir / "checkpoints" / "2" / "state" / "manifest.ocdbt", random.Random(1))
    assert command.main(["verify", str(workdir)]) == 1
    shown = capsys.readouterr().out
    assert "step 2: " in shown and "is corrupt" in shown and "2 of 3 are intact" in shown
    assert (workdir / "checkpoints" / "2").is_dir()  # verifying changes nothing
    assert command.main(["list", str(tmp_path)]) == 2
