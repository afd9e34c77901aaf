"""Read-ahead batches equal resident ones bit for bit, and errors name the example in time."""

import dataclasses
import errno
import threading
import time

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax import sharding
from vit_jax.data import lazy_images, order, pipeline, sources, stream
from vit_jax.data.sources import Source
from vit_jax.data.stream import Reader, Reading, Table, read_ahead
from vit_jax.errors import UserError

SEED, BATCH, ROWS = 5, 8, 3


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """Returns two sources of forty small JPEGs in two classes: with cached images, and with lazily decoded ones."""
    root, generator = tmp_path_factory.mktemp("jpegs"), np.random.default_rng(0)
    for k in range(40):
        path = root / "set" / "ab"[k % 2] / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (10, 9, 3), np.uint8)).save(path)
    options = {"data_dir": root / "set", "cache_dir": root / "cache", "image_size": 8}
    return tuple(sources.load("folder", "train", decoded=decoded, **options) for decoded in (True, False))


def tables(first=0, count=12):
    """Yields the indices of the steps first to first + count, ROWS at a time; the last table may not be full."""
    for step in range(first, first + count, ROWS):
        used = min(ROWS, first + count - step)
        yield pipeline.train_indices(SEED, BATCH, step, used, ROWS, 40), used


def batches(feeds, counts, mesh):
    get_batch = jax.jit(lambda feed, i: pipeline.get_batch(feed, i, sharding.data_sharding(mesh)))
    return [jax.device_get(get_batch(feed, i)) for feed, count in zip(feeds, counts, strict=True) for i in range(count)]


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_streamed_batches_equal_resident_ones_for_any_number_of_workers(jpegs, devices):
    cached, lazy = jpegs
    mesh, counts = sharding.make_mesh(devices), [count for _, count in tables(count=10)]
    resident = batches(pipeline.make(cached, mesh, "always").feeds(tables(count=10)), counts, mesh)
    assert len(resident) == 10
    rows = order.indices(SEED, 0, 10 * BATCH, 40).reshape(10, BATCH)
    for (images, labels), row in zip(resident, rows, strict=True):
        np.testing.assert_array_equal(images, cached.images[row])
        np.testing.assert_array_equal(labels, cached.labels[row])
    for source, workers in ((lazy, 0), (lazy, 1), (lazy, 2), (lazy, 4), (cached, 2)):
        made = pipeline.make(source, mesh, "never", Reading(workers))
        chex.assert_trees_all_equal(batches(made.feeds(tables(count=10)), counts, mesh), resident)
    # Lazily decoded images can be resident too.
    chex.assert_trees_all_equal(
        batches(pipeline.make(lazy, mesh, "always").feeds(tables(count=10)), counts, mesh), resident
    )


def test_resuming_with_another_number_of_workers_gives_the_same_batches(jpegs):
    _, lazy = jpegs
    mesh = sharding.make_mesh(2)

    def run(workers, first, count):
        feeds = pipeline.make(lazy, mesh, "never", Reading(workers)).feeds(tables(first, count))
        return batches(feeds, [used for _, used in tables(first, count)], mesh)

    whole = run(1, 0, 12)
    chex.assert_trees_all_equal(run(4, 0, 6) + run(2, 6, 3) + run(0, 9, 3), whole)


def test_slow_worker_does_not_change_the_order(jpegs):
    _, lazy = jpegs
    slow = watched(lazy, lambda index: time.sleep(0.02 if index % 7 == 0 else 0))
    for table, images in read_ahead(slow, Reading(4), (Table(t[:count], ROWS) for t, count in tables())):
        np.testing.assert_array_equal(
            images[: len(table.indices)], lazy.images[table.indices.ravel()].reshape(*table.indices.shape, 8, 8, 3)
        )
        assert (images[len(table.indices) :] == 0).all()


def watched(source, hook):
    """Returns the source with a hook that is called before each example is read."""
    ((records, indices),) = source.images.parts

    def read(index, size, how):
        hook(index)
        return records.read(index, size, how)

    images = dataclasses.replace(source.images, parts=((dataclasses.replace(records, read=read), indices),))
    return dataclasses.replace(source, images=images)


def test_each_process_reads_only_its_own_columns(jpegs, monkeypatch):
    """Two of four devices are treated as another process's: their half of the batch is never read."""
    _, lazy = jpegs
    seen = []
    mesh = sharding.make_mesh(4)
    made = pipeline.make(watched(lazy, seen.append), mesh, "never", Reading(2))
    mine = set(mesh.devices.flat[:2])
    real = jax.sharding.NamedSharding.addressable_devices_indices_map
    monkeypatch.setattr(
        jax.sharding.NamedSharding,
        "addressable_devices_indices_map",
        lambda self, shape: {device: index for device, index in real(self, shape).items() if device in mine},
    )
    (table, used) = next(tables())
    part = made._part(table, used)
    np.testing.assert_array_equal(part.indices, table[:, : BATCH // 2])
    list(read_ahead(made.source, Reading(2), [part]))
    assert sorted(seen) == sorted(table[:, : BATCH // 2].ravel().tolist())


def test_read_ahead_is_limited(jpegs):
    _, lazy = jpegs
    seen = []
    feeds = read_ahead(watched(lazy, seen.append), Reading(2, ahead=2), (Table(t, ROWS) for t, _ in tables(count=12)))
    next(feeds)
    deadline = time.monotonic() + 20
    while len(seen) < 3 * ROWS * BATCH and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(seen) == 3 * ROWS * BATCH  # the current one and two ahead
    feeds.close()


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_corrupt_file_is_named(jpegs, tmp_path, workers):
    for k in range(20):
        path = tmp_path / "set" / "a" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (k, 0, 0)).save(path)
    source = sources.load(
        "folder", "train", data_dir=tmp_path / "set", cache_dir=tmp_path / "c", image_size=8, decoded=False
    )
    (tmp_path / "set" / "a" / "13.png").write_bytes(b"\x89PNG corrupted")
    with pytest.raises(UserError, match=r"13\.png"):
        list(read_ahead(source, Reading(workers), [Table(np.arange(20).reshape(2, 10), 2)] * 3))
    (tmp_path / "set" / "a" / "13.png").unlink()
    with pytest.raises(UserError, match=r"13\.png"):
        list(read_ahead(source, Reading(workers), [Table(np.arange(20).reshape(2, 10), 2)]))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_example_that_cannot_be_read_in_time_is_named_with_its_reader(jpegs, workers):
    _, lazy = jpegs
    release = threading.Event()
    stuck = watched(lazy, lambda index: release.wait(60) if index == 17 else None)
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        list(read_ahead(stuck, Reading(workers, timeout=0.3), [Table(np.arange(40).reshape(5, 8), 5)]))
    release.set()
    message = str(caught.value)
    assert lazy.describe(17) in message and message.startswith("reader ") and "worker_timeout" in message
    assert time.monotonic() - start < 30
    assert len(message.splitlines()) <= 3


def test_any_exception_of_a_reader_is_reported(jpegs):
    _, lazy = jpegs

    def die(index):
        if index == 9:
            raise MemoryError("no more")

    with pytest.raises(UserError, match=r"reader \d cannot read .*MemoryError: no more"):
        list(read_ahead(watched(lazy, die), Reading(2), [Table(np.arange(40).reshape(5, 8), 5)]))


def test_threads_stop_with_their_reader(jpegs):
    _, lazy = jpegs
    before = threading.active_count()
    for _ in range(3):
        feeds = read_ahead(lazy, Reading(4), (Table(t, ROWS) for t, _ in tables()))
        next(feeds)
        feeds.close()
    reader = Reader(lazy, Reading(4))
    reader.close()
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_size_of_a_streamed_dispatch_is_limited():
    images = np.zeros((4, 256, 256, 3), np.uint8)
    source = Source("toy", "train", images, np.zeros(4, np.int32), ("a",), (0.5,) * 3, (0.5,) * 3)
    made = pipeline.make(source, sharding.make_mesh(1), "never")
    assert made.rows(64, 50) == 5  # 12.6 MB per batch
    assert made.rows(1024, 50) == 1
    assert made.rows(1, 50) == 50
    assert pipeline.make(source, sharding.make_mesh(1), "always").rows(1024, 50) == 50


def test_lazy_images_behave_like_an_array(jpegs):
    cached, lazy = jpegs
    assert isinstance(lazy.images, lazy_images.LazyImages)
    assert (lazy.images.shape, lazy.images.nbytes, lazy.images.dtype) == (
        cached.images.shape,
        cached.images.nbytes,
        cached.images.dtype,
    )
    np.testing.assert_array_equal(lazy.images[3:9], cached.images[3:9])
    with pytest.raises(IndexError):
        lazy.images.locate(40)


@pytest.mark.parametrize("started", [0, 1])
def test_with_fewer_threads_than_requested_the_images_are_the_same(jpegs, monkeypatch, started):
    cached, lazy = jpegs
    start, left = threading.Thread.start, [started]

    def start_some(thread):
        if thread.name.startswith("reader") and not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= thread.name.startswith("reader")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_some)
    read = read_ahead(lazy, Reading(3), [Table(np.arange(40).reshape(2, 20), 2)] * 3)
    for _, images in read:
        np.testing.assert_array_equal(images.reshape(40, *cached.images.shape[1:]), cached.images[:])


def test_while_too_many_files_are_open_a_reader_waits(jpegs, monkeypatch):
    _, lazy = jpegs
    read, failures = Source.read, [UserError("cannot be read"), OSError(errno.ENFILE, "too many"), None]

    def failing(source, indices):
        error = failures.pop(0) if failures else None
        if isinstance(error, UserError):
            raise error from OSError(errno.EMFILE, "too many")
        if error is not None:
            raise error
        return read(source, indices)

    monkeypatch.setattr(Source, "read", failing)
    monkeypatch.setattr(stream, "_RETRY", 0.01)
    ((_, images),) = read_ahead(lazy, Reading(1), [Table(np.arange(4)[None], 1)])
    np.testing.assert_array_equal(images[0], lazy.images[np.arange(4)])
    assert not failures
