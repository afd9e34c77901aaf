"""Damage is what the bytes of a checkpoint prove; anything else ends with its own reason and moves nothing."""

import errno
import json
import os
import random
import shutil
import sys

import jax
import numpy as np
import pytest
from helpers import ROOT, THOROUGH, run_command

from vit_jax.checkpoint import input_spec, inventory, orbax_io, run_files
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.errors import UserError
from vit_jax.training import run_directory

STEPS = (1, 2, 3)


def arrays(step):
    generator = np.random.default_rng(step)
    kernels = {f"kernel_{i}": generator.normal(size=(40, 30)).astype(np.float32) for i in range(3)}
    return {"step": np.asarray(step, np.int32), "parameters": kernels}


def like():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), arrays(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved")
    with CheckpointManager(workdir, keep=3) as manager:
        for step in STEPS:
            manager.save(arrays(step), {"config": {"train": {"seed": step}}})
    return workdir


@pytest.fixture(params=["with a list of files", "of version 0.1"])
def run(saved, tmp_path, request):
    """A copy of the run directory; checkpoints of version 0.1 have no files.json."""
    workdir = shutil.copytree(saved, tmp_path / "run")
    if request.param == "of version 0.1":
        for step in STEPS:
            (workdir / "checkpoints" / str(step) / inventory.FILES).unlink()
    return workdir


def content(directory):
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


def no_import(patch):
    for name in [name for name in sys.modules if name.startswith("orbax.checkpoint.v1")]:
        patch.delitem(sys.modules, name)
    patch.setitem(sys.modules, "orbax.checkpoint", None)


def no_memory(patch):
    patch.setattr("orbax.checkpoint.v1.load_checkpointables", failing(MemoryError()))


def no_memory_in_tensorstore(patch):
    text = "RESOURCE_EXHAUSTED: Error reading local file: out of memory while OCDBT was read"
    patch.setattr("orbax.checkpoint.v1.load_checkpointables", failing(ValueError(text)))


def no_thread(patch):
    patch.setattr("threading.Thread.start", failing(RuntimeError("can't start new thread")))


class NoBackend:
    """JAX on a machine without the device of JAX_PLATFORMS."""

    process_count = staticmethod(failing(AssertionError()))

    def __getattr__(self, name):
        return getattr(jax, name)


def no_backend(patch):
    patch.setattr(orbax_io, "jax", NoBackend())


def no_descriptor(patch):
    too_many = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    patch.setattr("orbax.checkpoint.v1.load_checkpointables", failing(too_many))
    patch.setattr(inventory, "open", failing(too_many), raising=False)


def device_error(patch):
    patch.setattr("pathlib.Path.read_bytes", failing(OSError(errno.EIO, os.strerror(errno.EIO))))


def no_permission(patch):
    patch.setattr("pathlib.Path.read_bytes", failing(PermissionError(errno.EACCES, os.strerror(errno.EACCES))))


CAUSES = {
    "import": (no_import, "orbax.checkpoint"),
    "memory": (no_memory, "MemoryError"),
    "memory in TensorStore": (no_memory_in_tensorstore, "RESOURCE_EXHAUSTED"),
    "thread": (no_thread, "can't start new thread"),
    "backend": (no_backend, "JAX finds no device"),
    "file descriptors": (no_descriptor, "Too many open files"),
    "device": (device_error, "Input/output error"),
    "permission": (no_permission, "Permission denied"),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_what_is_not_damage_moves_nothing_and_ends_with_its_own_reason(run, cause, monkeypatch):
    wanted, before, printed = like(), content(run), []
    break_it, reason = CAUSES[cause]
    with CheckpointManager(run, keep=3, say=printed.append) as manager:
        break_it(monkeypatch)
        with pytest.raises(UserError) as caught:
            manager.restore_newest(wanted)
        monkeypatch.undo()
        assert reason in str(caught.value) and "corrupt" not in str(caught.value) and not printed
        assert len(str(caught.value).splitlines()) <= 3
        assert content(run) == before
        assert int(manager.restore_newest(wanted)["step"]) == 3  # once the cause is gone


def test_a_keyboard_interrupt_is_no_damage(run, monkeypatch):
    wanted, before = like(), content(run)
    monkeypatch.setattr("orbax.checkpoint.v1.load_checkpointables", failing(KeyboardInterrupt()))
    with CheckpointManager(run, keep=3) as manager, pytest.raises(KeyboardInterrupt):
        manager.restore_newest(wanted)
    assert content(run) == before


def flip(path, generator):
    changed = bytearray(path.read_bytes())
    changed[generator.randrange(len(changed))] ^= 1 << generator.randrange(8)
    path.write_bytes(changed)


def zero(path, generator):
    changed = bytearray(path.read_bytes())
    start = generator.randrange(len(changed))
    changed[start : start + 512] = bytes(len(changed[start : start + 512]))
    path.write_bytes(changed)


def truncate(path, generator):
    os.truncate(path, generator.randrange(path.stat().st_size))


def delete(path, generator):
    path.unlink()


def as_directory(path, generator):
    path.unlink()
    path.mkdir()


DAMAGE = (flip, zero, truncate, delete, as_directory)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damaged_bytes_are_damage_and_the_older_checkpoint_is_used(run, damage):
    """Every outcome is: the same arrays, or a report of damage and those of the older step; never another reason."""
    count = 200 if THOROUGH else 12
    for seed in range(count):
        generator = random.Random(f"{damage.__name__} {seed}")
        copy = shutil.copytree(run, run.with_name("copy"))
        root = copy / "checkpoints" / "3"
        files = sorted(path for path in root.rglob("*") if path.is_file() and path.stat().st_size)
        damage(generator.choice(files), generator)
        printed = []
        with CheckpointManager(copy, keep=3, say=printed.append) as manager:
            found = jax.device_get(manager.restore_newest(like()))
        assert int(found["step"]) == (2 if printed else 3)
        jax.tree.map(np.testing.assert_array_equal, found, arrays(int(found["step"])))
        shutil.rmtree(copy)


def test_a_damaged_file_is_named(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "run")
    file = max((workdir / "checkpoints" / "3" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    size = file.stat().st_size
    os.truncate(file, 10)
    with CheckpointManager(workdir, read_only=True) as manager:
        text = manager.verify(3)
    assert f"{file.relative_to(workdir / 'checkpoints' / '3')} has 10 bytes, not {size:,}" in text


READERS = {
    run_files.SUMMARY: run_files.read_summary,
    run_files.CONFIG: run_files.read_config,
    run_files.DATA: input_spec.read,
    run_files.ENVIRONMENT: run_directory.attention_choice,
}


@pytest.mark.parametrize("name", READERS)
def test_a_file_that_cannot_be_read_is_not_taken_for_a_missing_one(name, tmp_path):
    assert READERS[name](tmp_path) is None
    os.symlink(name, tmp_path / name)  # a loop: ELOOP for every user, also root
    with pytest.raises(UserError, match=rf"{name} cannot be read: Too many levels of symbolic links"):
        READERS[name](tmp_path)


AS_NOBODY = """
import os, sys
from orbax.checkpoint import v1
import jax, numpy
from vit_jax import checkpoints
jax.devices()
os.setuid(65534)
sys.exit(checkpoints.main(["verify", sys.argv[1]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")
def test_another_user_is_told_about_the_permission(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    for path in tmp_path, *tmp_path.parents:
        if path.stat().st_uid == os.getuid() and path != path.parent:
            os.chmod(path, 0o755)
    file = next((tmp_path / "run" / "checkpoints" / "1" / "state").rglob("d/*"))
    file.chmod(0o600)
    shown = run_command(AS_NOBODY, tmp_path / "run", status=2)
    assert "Permission denied" in shown and "Traceback" not in shown and "corrupt" not in shown


@pytest.mark.slow
def test_little_address_space_is_no_damage(saved, tmp_path):
    """Whatever fits into the limit, the checkpoints are intact, or the command ends with status 2."""
    workdir = shutil.copytree(saved, tmp_path / "run")
    before = content(workdir)
    for gigabytes in (2, 3):
        script = f"""
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, ({gigabytes} << 30, {gigabytes} << 30))
from vit_jax import checkpoints
sys.exit(checkpoints.main(["verify", sys.argv[1]]))
"""
        shown = run_command(script, workdir, status=(0, 2), cwd=ROOT)
        assert "corrupt" not in shown and content(workdir) == before


def test_a_damaged_summary_is_made_again_and_an_unreadable_config_is_not(tmp_path):
    (tmp_path / run_files.SUMMARY).write_text('{"steps": 1')
    assert run_files.read_summary(tmp_path) is None
    (tmp_path / run_files.CONFIG).write_text(json.dumps([1]))
    with pytest.raises(UserError, match="restore-config"):
        run_files.read_config(tmp_path)
