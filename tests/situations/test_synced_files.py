"""Files are on the disk before they get their name: after a power failure they are whole, or not there."""

import os
from pathlib import Path

import numpy as np
import pytest

from vit_jax import atomic
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.data import cache, feature_store, sources
from vit_jax.runtime import compilation_cache
from vit_jax.training import lock
from vit_jax.training.metrics import MetricsWriter


def save_checkpoint(directory):
    with CheckpointManager(directory) as manager:
        manager.save({"step": np.int32(7), "parameters": np.zeros(3, np.float32)}, {})
        manager.wait()


def write_features(directory):
    source = sources.load("digits", "test[:4]", cache_dir=directory / "cache")
    about = {"step": 1, "image_shape": source.image_shape, "backbone": "x", "normalization": "half"}
    feature_store.write(directory / "features", (4, 2), [np.ones((4, 2), np.float32)], source, about)


def write_records(directory):
    with MetricsWriter(directory, 0, tensorboard=False) as writer:
        writer.write(1, {"a": 1.0})


def fill(images, labels):
    images[:], labels[:] = 1, 2


WRITES = {
    "config.json": lambda directory: atomic.write_json(directory / "config.json", {"a": 1}),
    "lock.json": lambda directory: lock.Lock(directory).release(),
    "metrics.jsonl": write_records,
    "7": save_checkpoint,
    "features": write_features,
    "decoded": lambda directory: cache.open_or_create(directory / "decoded", (2, 3, 3, 1), fill, title="a set"),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_gets_its_name_is_on_the_disk(tmp_path, monkeypatch, name):
    """Otherwise it may be empty, or filled with zeros, after a power failure."""
    synced, unsynced, fsync = set(), {}, os.fsync

    def sync(descriptor):
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def look_before(rename):
        def look_and_rename(source, target, **options):
            files = [path for path in (Path(source), *Path(source).rglob("*")) if path.is_file()]
            left = [path.name for path in files if path.stat().st_ino not in synced]
            unsynced.setdefault(Path(target).name, left)
            return rename(source, target, **options)

        return look_and_rename

    monkeypatch.setattr(os, "fsync", sync)
    for function in ("rename", "replace", "link"):
        monkeypatch.setattr(os, function, look_before(getattr(os, function)))
    WRITES[name](tmp_path)
    assert unsynced[name] == []
    assert tmp_path.stat().st_ino in synced or name in ("7", "lock.json")


def test_empty_programs_in_the_compilation_cache_are_removed(tmp_path):
    """JAX would not replace them: it would warn and compile again at every start."""
    for name, content in (("a-cache", b""), ("b-cache", b"x"), ("a-atime", b"")):
        (tmp_path / name).write_bytes(content)
    compilation_cache._remove_empty(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-atime", "b-cache"]
