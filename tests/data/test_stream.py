"""What is read ahead is what is resident, bit for bit, and what goes wrong is named in time."""

import dataclasses
import threading
import time

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from vit_jax import sharding
from vit_jax.data import lazy_images, order, pipeline, sources
from vit_jax.data.sources import Source
from vit_jax.data.stream import Reader, Reading, Table, read_ahead
from vit_jax.errors import UserError

SEED, BATCH, ROWS = 5, 8, 3


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory):
    """Forty small JPEGs in two classes: kept decoded, and decoded when they are read."""
    root, generator = tmp_path_factory.mktemp("jpegs"), np.random.default_rng(0)
    for k in range(40):
        path = root / "set" / "ab"[k % 2] / f"{k}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (10, 9, 3), np.uint8)).save(path)
    load = lambda decoded: sources.load(  # noqa: E731
        "folder", "train", data_dir=root / "set", cache_dir=root / "cache", image_size=8, decoded=decoded
    )
    return load(True), load(False)


def tables(first=0, count=12):
    """The batches of the steps first .. first + count, ROWS at a time; the last table is not full."""
    for step in range(first, first + count, ROWS):
        used = min(ROWS, first + count - step)
        yield pipeline.train_indices(SEED, BATCH, step, used, ROWS, 40), used


def batches(feeds, counts, mesh):
    take = jax.jit(lambda feed, i: pipeline.get_batch(feed, i, sharding.data_sharding(mesh)))
    return [jax.device_get(take(feed, i)) for feed, count in zip(feeds, counts, strict=True) for i in range(count)]


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_streamed_is_resident_for_any_number_of_workers(jpegs, devices):
    kept, anew = jpegs
    mesh, counts = sharding.make_mesh(devices), [count for _, count in tables(count=10)]
    resident = batches(pipeline.make(kept, mesh, "always").feeds(tables(count=10)), counts, mesh)
    assert len(resident) == 10
    order_ = order.indices(SEED, 0, 10 * BATCH, 40).reshape(10, BATCH)
    for (images, labels), row in zip(resident, order_, strict=True):
        np.testing.assert_array_equal(images, kept.images[row])
        np.testing.assert_array_equal(labels, kept.labels[row])
    for source, workers in ((anew, 0), (anew, 1), (anew, 2), (anew, 4), (kept, 2)):
        made = pipeline.make(source, mesh, "never", Reading(workers))
        chex.assert_trees_all_equal(batches(made.feeds(tables(count=10)), counts, mesh), resident)
    # What is decoded when read may be resident too.
    chex.assert_trees_all_equal(
        batches(pipeline.make(anew, mesh, "always").feeds(tables(count=10)), counts, mesh), resident
    )


def test_resumed_with_another_number_of_workers_it_goes_on_the_same(jpegs):
    _, anew = jpegs
    mesh = sharding.make_mesh(2)
    run = lambda workers, first, count: batches(  # noqa: E731
        pipeline.make(anew, mesh, "never", Reading(workers)).feeds(tables(first, count)),
        [used for _, used in tables(first, count)],
        mesh,
    )
    whole = run(1, 0, 12)
    chex.assert_trees_all_equal(run(4, 0, 6) + run(2, 6, 3) + run(0, 9, 3), whole)


def test_a_slow_worker_changes_no_order(jpegs):
    _, anew = jpegs
    slow = watched(anew, lambda place: time.sleep(0.02 if place % 7 == 0 else 0))
    for table, images in read_ahead(slow, Reading(4), (Table(t[:count], ROWS) for t, count in tables())):
        np.testing.assert_array_equal(
            images[: len(table.places)], anew.images[table.places.ravel()].reshape(*table.places.shape, 8, 8, 3)
        )
        assert (images[len(table.places) :] == 0).all()


def watched(source, hook):
    """The source, with a hook before each example that is read."""
    ((records, places),) = source.images.parts

    def read(place, size):
        hook(place)
        return records.read(place, size)

    encoded = dataclasses.replace(source.images, parts=((dataclasses.replace(records, read=read), places),))
    return dataclasses.replace(source, images=encoded)


def test_each_process_reads_its_own_columns_alone(jpegs, monkeypatch):
    """Of four devices two are taken to be another process's: their half of the batch is never read."""
    _, anew = jpegs
    seen = []
    mesh = sharding.make_mesh(4)
    made = pipeline.make(watched(anew, seen.append), mesh, "never", Reading(2))
    mine = set(mesh.devices.flat[:2])
    real = jax.sharding.NamedSharding.addressable_devices_indices_map
    monkeypatch.setattr(
        jax.sharding.NamedSharding,
        "addressable_devices_indices_map",
        lambda self, shape: {device: index for device, index in real(self, shape).items() if device in mine},
    )
    (table, used) = next(tables())
    part = made._part(table, used)
    np.testing.assert_array_equal(part.places, table[:, : BATCH // 2])
    list(read_ahead(made.source, Reading(2), [part]))
    assert sorted(seen) == sorted(table[:, : BATCH // 2].ravel().tolist())


def test_no_more_is_read_than_asked_ahead(jpegs):
    _, anew = jpegs
    seen = []
    feeds = read_ahead(watched(anew, seen.append), Reading(2, ahead=2), (Table(t, ROWS) for t, _ in tables(count=12)))
    next(feeds)
    deadline = time.monotonic() + 20
    while len(seen) < 3 * ROWS * BATCH and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(seen) == 3 * ROWS * BATCH  # the one in use and two ahead
    feeds.close()


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_a_corrupt_file_is_named(jpegs, tmp_path, workers):
    for k in range(20):
        path = tmp_path / "set" / "a" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (k, 0, 0)).save(path)
    source = sources.load(
        "folder", "train", data_dir=tmp_path / "set", cache_dir=tmp_path / "c", image_size=8, decoded=False
    )
    (tmp_path / "set" / "a" / "13.png").write_bytes(b"\x89PNG broken behind our back")
    with pytest.raises(UserError, match=r"13\.png"):
        list(read_ahead(source, Reading(workers), [Table(np.arange(20).reshape(2, 10), 2)] * 3))
    (tmp_path / "set" / "a" / "13.png").unlink()
    with pytest.raises(UserError, match=r"13\.png"):
        list(read_ahead(source, Reading(workers), [Table(np.arange(20).reshape(2, 10), 2)]))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_example_that_never_comes_is_named_with_its_reader_in_time(jpegs, workers):
    _, anew = jpegs
    release = threading.Event()
    stuck = watched(anew, lambda place: release.wait(60) if place == 17 else None)
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        list(read_ahead(stuck, Reading(workers, timeout=0.3), [Table(np.arange(40).reshape(5, 8), 5)]))
    release.set()
    message = str(caught.value)
    assert anew.describe(17) in message and message.startswith("reader ") and "worker_timeout" in message
    assert time.monotonic() - began < 30
    assert len(message.splitlines()) <= 3


def test_a_reader_that_dies_of_anything_is_named(jpegs):
    _, anew = jpegs

    def die(place):
        if place == 9:
            raise MemoryError("no more")

    with pytest.raises(UserError, match=r"reader \d cannot read .*MemoryError: no more"):
        list(read_ahead(watched(anew, die), Reading(2), [Table(np.arange(40).reshape(5, 8), 5)]))


def test_threads_end_with_their_reader(jpegs):
    _, anew = jpegs
    before = threading.active_count()
    for _ in range(3):
        feeds = read_ahead(anew, Reading(4), (Table(t, ROWS) for t, _ in tables()))
        next(feeds)
        feeds.close()
    reader = Reader(anew, Reading(4))
    reader.close()
    deadline = time.monotonic() + 20
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_how_much_is_sent_at_a_time_is_bounded():
    images = np.zeros((4, 256, 256, 3), np.uint8)
    source = Source("toy", "train", images, np.zeros(4, np.int32), ("a",), (0.5,) * 3, (0.5,) * 3)
    made = pipeline.make(source, sharding.make_mesh(1), "never")
    assert made.rows(64, 50) == 5  # 12.6 MB a batch
    assert made.rows(1024, 50) == 1
    assert made.rows(1, 50) == 50
    assert pipeline.make(source, sharding.make_mesh(1), "always").rows(1024, 50) == 50


def test_encoded_images_stand_in_for_an_array(jpegs):
    kept, anew = jpegs
    assert isinstance(anew.images, lazy_images.Encoded)
    assert (anew.images.shape, anew.images.nbytes, anew.images.dtype) == (
        kept.images.shape,
        kept.images.nbytes,
        kept.images.dtype,
    )
    np.testing.assert_array_equal(anew.images[3:9], kept.images[3:9])
    with pytest.raises(IndexError):
        anew.images.locate(40)
