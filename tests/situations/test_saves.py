"""A save is true once it was read back, and a run directory is proved before the first step."""

import errno
import os
import random
import shutil

import jax
import numpy as np
import pytest
from helpers import THOROUGH, flags, mostly_slow, read_json_lines, run_command

from vit_jax import atomic, machine_errors
from vit_jax.checkpoint import inventory, orbax_io, proof
from vit_jax.checkpoint.manager import CheckpointManager, SaveFailed
from vit_jax.config import default
from vit_jax.errors import UserError
from vit_jax.training import run_directory


def arrays(step):
    return {"step": np.asarray(step, np.int32), "parameters": {"kernel": np.arange(200, dtype=np.float32) + step}}


def like():
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), arrays(0))


def use(workdir):
    """What a run does with its directory: it is claimed and proved, and two checkpoints are saved and one restored."""
    run_directory.claim(workdir, default())
    proof.prove(workdir)
    assert not list(workdir.iterdir())  # the proof leaves nothing
    with CheckpointManager(workdir, keep=1) as manager:
        manager.save(arrays(1), {"a": 1})
        manager.save(arrays(2), {"a": 2})
    with CheckpointManager(workdir, keep=1) as manager:
        assert manager.steps() == [2] and manager.metadata() == {"a": 2} and manager.verify(2) is None
        found = jax.device_get(manager.restore_newest(like()))
    jax.tree.map(np.testing.assert_array_equal, found, arrays(2))


NAMES = {
    "brackets": b"runs/lr[0.1]",
    "a pattern of one character": b"[a]",
    "star": b"a*",
    "question mark": b"a?b",
    "braces": b"{a,b}",
    "backslash": b"a\\b",
    "space": b" a b ",
    "newline": b"a\nb",
    "percent": b"100%20",
    "hash": b"#1",
    "quotes": b'it\'s "it"',
    "no UTF-8": b"\xff\xfe\x80",
    "a scheme": b"gs:/bucket/run",
    "another scheme": b"s3:/bucket/run",
    "file scheme": b"file:/run",
    "pipe": b"a|zip:b",
    "tilde": b"~",
    "dots": b"...",
    "accents": "é/e\u0301".encode(),
    "longest name": b"n" * 255,
    "long path": b"/".join([b"d" * 200] * 10),
}


@pytest.mark.parametrize("name", mostly_slow(NAMES, 4))
def test_a_run_directory_of_any_name_can_be_used(tmp_path, name):
    use(tmp_path / os.fsdecode(NAMES[name]))


def test_no_other_directory_is_touched(tmp_path):
    """A name that is a pattern, beside a directory that the pattern matches."""
    use(tmp_path / "run1")
    before = {path: path.read_bytes() for path in (tmp_path / "run1").rglob("*") if path.is_file()}
    use(tmp_path / "run[12]")
    use(tmp_path / "run?")
    assert {path: path.read_bytes() for path in (tmp_path / "run1").rglob("*") if path.is_file()} == before


def test_links_are_followed(tmp_path):
    (tmp_path / "real[1]").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real[1]")
    use(tmp_path / "link")
    assert (tmp_path / "real[1]" / "checkpoints" / "2").is_dir()


def long_name(directory):
    return directory / ("n" * 256)


def long_path(directory):
    return directory.joinpath(*["d" * 200] * 21)


def almost_too_long(directory):
    """The directory can be made; the files of a checkpoint in it cannot."""
    path = directory
    while len(os.fsencode(path)) < 4000:
        path /= "d" * min(200, 4049 - len(os.fsencode(path)))
    return path


def below_a_file(directory):
    (directory / "file").touch()
    return directory / "file" / "run"


def a_file(directory):
    (directory / "file").touch()
    return directory / "file"


def a_loop(directory):
    (directory / "loop").symlink_to("loop")
    return directory / "loop"


def dangling(directory):
    (directory / "link").symlink_to("nothing")
    return directory / "link"


REFUSED = (long_name, long_path, almost_too_long, below_a_file, a_file, a_loop, dangling)


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_a_run_directory_that_cannot_be_used_is_refused_before_a_run(tmp_path, make):
    workdir = make(tmp_path)
    with pytest.raises(UserError, match="use another --workdir") as caught:
        use(workdir)
    assert str(workdir) in str(caught.value) and len(str(caught.value).splitlines()) <= 3


@pytest.mark.parametrize("reason", ["libfoo.so.1: cannot open shared object file", "failed to map segment"])
def test_a_package_that_cannot_be_imported_is_not_the_fault_of_the_directory(tmp_path, monkeypatch, reason):
    def fail(*_, **__):
        raise ImportError(reason, name="tensorstore")

    monkeypatch.setattr(orbax_io, "write_small", fail)
    with pytest.raises(ImportError) as caught:
        proof.prove(tmp_path)
    assert "--workdir" not in machine_errors.explain(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", ["write_small", "read"])
def test_storage_that_fails_in_the_proof_is_refused(tmp_path, monkeypatch, call):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(orbax_io, call, fail)
    with pytest.raises(UserError, match=r"cannot hold checkpoints: .*No space left on device\n  free disk space"):
        proof.prove(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_for_a_checkpoint_is_refused(tmp_path):
    proof.check_room(tmp_path, 1000)
    with pytest.raises(UserError, match="free disk space"):
        proof.check_room(tmp_path, 2**60)


def lose(name):
    def spoil(path):
        (path / name).unlink()

    return spoil


def shorten(name):
    def spoil(path):
        os.truncate(path / name, 3)

    return spoil


def other_content(path):
    shutil.copy(path.with_name("1") / inventory.METADATA, path / inventory.METADATA)


SPOILED = {
    "metadata is missing": lose(inventory.METADATA),
    "metadata is short": shorten(inventory.METADATA),
    "tree is missing": lose(inventory.TREE),
    "tree is short": shorten(inventory.TREE),
    "manifest is missing": lose(inventory.MANIFEST),
    "manifest is short": shorten(inventory.MANIFEST),
    "metadata of another step": other_content,
}


@pytest.mark.parametrize("spoil", SPOILED)
def test_a_save_that_cannot_be_read_back_has_failed_and_the_older_one_is_kept(tmp_path, monkeypatch, spoil):
    with CheckpointManager(tmp_path, keep=1) as manager:
        manager.save(arrays(1), {"a": 1})
        manager.wait()
        write = orbax_io.write

        def write_and_spoil(path, *rest):
            write(path, *rest)
            SPOILED[spoil](path)

        with monkeypatch.context() as patch:
            patch.setattr(orbax_io, "write", write_and_spoil)
            manager.save(arrays(2), {"a": 2})
            with pytest.raises(SaveFailed):
                manager.wait()
        assert manager.has(1) and not manager.has(2) and manager.steps() == [1]
        assert int(manager.restore_newest(like())["step"]) == 1
        manager.save(arrays(2), {"a": 2})  # a new attempt
        manager.wait()
        assert manager.has(2) and manager.steps() == [2]


def test_a_save_that_cannot_be_read_at_the_moment_is_proved_by_the_next_attempt(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with CheckpointManager(tmp_path, keep=1) as manager:
        manager.save(arrays(1), {})
        manager.wait()
        with monkeypatch.context() as patch:
            patch.setattr(orbax_io, "read_shapes", fail)
            manager.save(arrays(2), {})
            with pytest.raises(SaveFailed, match="Too many open files"):
                manager.wait()
        assert manager.steps() == [1, 2] and not manager.has(2)  # nothing is removed: neither is proved to be wrong
        manager.save(arrays(2), {})
        manager.wait()
        assert manager.has(2) and manager.steps() == [2]


def test_a_save_without_a_further_thread_is_made_in_the_foreground(tmp_path, monkeypatch):
    import threading

    start = threading.Thread.start

    def fail(thread):
        if thread.name == "save":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail)
    with CheckpointManager(tmp_path) as manager:
        manager.save(arrays(1), {})
        assert manager.has(1)


# What file managers, editors, copying programs and users leave among checkpoints.
LEFT = (".DS_Store", "Thumbs.db", "._2", ".nfs0001", ".2.aBcDeF/", "2 (copy)/", "2.bak/", "02/", "000002/", "٢/", "3")


def test_only_a_step_as_it_is_written_is_a_checkpoint(tmp_path):
    with CheckpointManager(tmp_path, keep=2) as manager:
        manager.save(arrays(1), {})
        manager.save(arrays(2), {})
        manager.wait()
        for name in LEFT:
            for parent in (manager.directory, tmp_path / "checkpoints-damaged"):
                parent.mkdir(exist_ok=True)
                path = parent / name.removesuffix("/")
                shutil.copytree(manager.directory / "2", path) if name.endswith("/") else path.write_text(name)
        assert manager.steps() == [1, 2] and [path.name for path in manager.corrupt()] == ["3"]
        manager.save(arrays(3), {})  # in the place of a file
        manager.wait()
        assert manager.steps() == [2, 3]
        assert int(manager.restore_newest(like())["step"]) == 3
        assert (tmp_path / "checkpoints-damaged" / "3-1").read_text() == "3"
        kept = {path.name for path in manager.directory.iterdir()}
        assert kept == {"2", *(name.removesuffix("/") for name in LEFT)}


def test_of_a_checkpoint_that_is_a_link_only_the_link_is_removed(tmp_path):
    with CheckpointManager(tmp_path, keep=1) as manager:
        manager.save(arrays(1), {})
        manager.wait()
        shutil.move(manager.directory / "1", tmp_path / "elsewhere")
        (manager.directory / "1").symlink_to(tmp_path / "elsewhere")
        assert int(manager.restore_newest(like())["step"]) == 1
        manager.save(arrays(2), {})
        manager.wait()
        assert [path.name for path in manager.directory.iterdir()] == ["2"]
    assert (tmp_path / "elsewhere" / inventory.FILES).exists()


def test_new_directories_are_synced_with_their_parents(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(atomic, "sync", synced.append)
    atomic.make_directory(tmp_path / "a" / "b" / "c")
    assert sorted(synced) == [tmp_path, tmp_path / "a", tmp_path / "a" / "b"]
    synced.clear()
    atomic.make_directory(tmp_path / "a" / "b")
    assert not synced


ALPHABET = [bytes([code]) for code in range(1, 256) if code != ord("/")]
PIECES = rb"gs: s3: file: .. [ ] * ? \ % $HOME {} ~ /".split() + [b" ", b"\n"]


def random_name(generator):
    """A relative path of random bytes, of pieces that mean something elsewhere, and of many lengths."""
    parts = []
    for _ in range(generator.choice((1, 1, 1, 2, 5, 20))):
        source = generator.choice((ALPHABET, PIECES, [b"a", b"b", b"[", b"]"]))
        parts.append(b"".join(generator.choices(source, k=generator.choice((1, 2, 5, 30, 254, 256)))))
    return b"x" + b"/".join(parts).replace(b"..", b"._")  # stays below the directory of the test


@pytest.mark.slow
def test_random_names_work_or_are_refused(tmp_path):
    outcomes = {"works": 0, "refused": 0}
    for seed in range(1000 if THOROUGH else 12):
        workdir = tmp_path / str(seed) / os.fsdecode(random_name(random.Random(seed)))
        try:
            use(workdir)
            outcomes["works"] += 1
        except UserError as error:
            outcomes["refused"] += 1
            assert "use another --workdir" in str(error)
        shutil.rmtree(tmp_path / str(seed), ignore_errors=True)
    print(outcomes)
    assert outcomes["works"] > outcomes["refused"] and (outcomes["refused"] or not THOROUGH)


TINY = flags(
    train={"steps": 4, "epochs": None, "evaluate_every": 0},
    data={"train": "train[:64]", "validation": None, "test": "test[:32]"},
    model={"width": 16, "depth": 1, "heads": 2, "mlp_width": 16},
    log={"tensorboard": True},
    mesh={"devices": 1},
)


@pytest.mark.slow
def test_a_run_in_an_odd_directory_trains_and_evaluates(tmp_path):
    workdir = tmp_path / "lr[0.1]" / "gs:" / "é\n%\\*?"
    run_command("vit_jax.main", "--config=configs/digits.py", f"--workdir={workdir}", *TINY)
    assert "1 of 1 are intact" in run_command("vit_jax.checkpoints", "verify", workdir)
    (found,) = read_json_lines(run_command("vit_jax.evaluate", f"--workdir={workdir}"))
    assert found["step"] == 4 and found["test/examples"] == 32
