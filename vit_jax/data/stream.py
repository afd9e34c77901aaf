"""Read-ahead: threads read and decode the examples of the next dispatches while the device computes the current one.

Threads instead of processes: Pillow and array_record decode without the GIL, nothing is copied between processes, and
a thread cannot be killed separately. The indices of the examples are known in advance, so the number and the speed of
the threads do not change any batch.
"""

import dataclasses
import errno
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Integer, Shaped

from vit_jax.data.sources import Source
from vit_jax.errors import UserError

Images = Shaped[np.ndarray, "rows columns *example"]

_CHUNK = 16  # examples that a thread reads per task
_POLL = 0.05  # seconds between checks for late threads
_RETRY = 0.5  # seconds between attempts while too many files are open
_GRACE = 5.0  # seconds that a late thread still has, in case the whole process was suspended


@dataclasses.dataclass(frozen=True)
class Reading:
    """How sets that are not resident are read.

    Attributes:
        workers: number of threads; 0 reads with one thread and without read-ahead.
        ahead: number of dispatches that are read ahead of the current one.
        timeout: maximum seconds per example.
    """

    workers: int = 4
    ahead: int = 2
    timeout: float = 120.0


@dataclasses.dataclass(frozen=True)
class Table:
    """The examples of a dispatch that this process reads.

    Attributes:
        indices: [batches, columns] indices into the source.
        rows: number of batches of the dispatch; those beyond `indices` are not read.
        tag: returned to the caller with the images.
    """

    indices: Integer[np.ndarray, "batches columns"]
    rows: int
    tag: Any = None


class Request:
    """A table whose images are being read.

    Attributes:
        table: the requested examples.
        images: [rows, columns, height, width, channels], or for stored features [rows, columns, ...]; zeros beyond the
            batches of the table.
        done: set once all images have been read.
    """

    def __init__(self, table: Table, shape: tuple[int, ...], dtype: np.dtype):
        """Allocates the images of a table, each with this shape and dtype."""
        self.table = table
        # Never reused for another request: JAX may still read from this memory.
        self.images = np.zeros((table.rows, table.indices.shape[1], *shape), dtype)
        self.done = threading.Event()
        self._flat = self.images.reshape(-1, *shape)
        self._missing = table.indices.size
        self._lock = threading.Lock()

    def chunks(self) -> Iterator[slice]:
        """Yields the parts that threads read, in order."""
        return (slice(start, start + _CHUNK) for start in range(0, self.table.indices.size, _CHUNK))

    def put(self, index: int, image: Shaped[np.ndarray, "*example"]) -> None:
        """Stores an image; the last one sets `done`."""
        self._flat[index] = image
        with self._lock:
            self._missing -= 1
            if not self._missing:
                self.done.set()


@dataclasses.dataclass
class _Worker:
    number: int
    index: int | None = None  # of the current example
    since: float = 0.0
    late: tuple[float, float] | None = None  # the value of `since` that exceeded the timeout, and when that was seen


class Reader:
    """Threads that serve requests in order."""

    def __init__(self, source: Source, reading: Reading):
        """Starts the threads; `close` stops them."""
        self._source, self._reading = source, reading
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._error: UserError | None = None
        self._closed = False
        self._workers = [_Worker(number) for number in range(max(1, reading.workers))]
        self._num_threads = sum(map(self._start, self._workers))

    def _start(self, worker: _Worker) -> bool:
        try:
            threading.Thread(target=self._work, args=(worker,), name=f"reader {worker.number}", daemon=True).start()
        except RuntimeError:  # no further thread can be started; the others read, or else `wait`
            return False
        return True

    def request(self, table: Table) -> Request:
        """Requests the images of a table; returns immediately."""
        request = Request(table, self._source.images.shape[1:], self._source.images.dtype)
        for chunk in request.chunks():
            self._tasks.put((request, chunk))
        return request

    def wait(self, request: Request) -> Images:
        """Waits for a request and returns its images.

        Raises:
            UserError: an example cannot be read, or takes longer than the timeout; names the example and the thread.
        """
        if not self._num_threads:
            self._tasks.put(None)
            self._work(self._workers[0])
        while not request.done.wait(_POLL):
            if self._error is not None:
                raise self._error
            self._check_timeouts()
        return request.images

    def close(self) -> None:
        """Stops the threads, each after its current example."""
        self._closed = True
        for _ in self._workers:
            self._tasks.put(None)

    def _check_timeouts(self) -> None:
        now = time.monotonic()
        for worker in self._workers:
            since, index = worker.since, worker.index
            if index is None or now - since <= self._reading.timeout:
                continue
            if worker.late is None or worker.late[0] != since:
                # Checked twice: after the process was suspended, all threads seem late but are not.
                worker.late = since, now
            elif now - worker.late[1] > min(self._reading.timeout, _GRACE):
                raise UserError(
                    f"reader {worker.number} of {len(self._workers)} has waited {now - since:.0f} s for "
                    f"{self._source.describe(index)}\n"
                    "  check the disk, or increase config.data.worker_timeout"
                )

    def _read(self, index: int, since: float) -> Shaped[np.ndarray, "*example"]:
        """Returns an example; while too many files are open, it tries again until the timeout."""
        while True:
            try:
                return self._source.read([index])[0]
            except (UserError, OSError) as error:
                if not _is_out_of_files(error) or self._closed or time.monotonic() - since > self._reading.timeout:
                    raise
            time.sleep(_RETRY)

    def _work(self, worker: _Worker) -> None:
        while (task := self._tasks.get()) is not None and not self._closed and self._error is None:
            request, chunk = task
            try:
                for offset, index in enumerate(request.table.indices.ravel()[chunk].tolist()):
                    worker.since, worker.index = time.monotonic(), index
                    request.put(chunk.start + offset, self._read(index, worker.since))
            except UserError as error:
                self._error = error
            except BaseException as error:  # decoders and disks raise many types, and none must be lost
                self._error = UserError(
                    f"reader {worker.number} cannot read {self._source.describe(worker.index)}: "
                    f"{type(error).__name__}: {str(error).partition(chr(10))[0]}\n"
                    "  repair or remove it; the same command then resumes"
                )
            worker.index = None


def _is_out_of_files(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            return True
        error = error.__cause__ or error.__context__
    return False


def read_ahead(source: Source, reading: Reading, tables: Iterable[Table]) -> Iterator[tuple[Table, Images]]:
    """Yields each table with its images, in order, while the next ones are being read.

    Raises:
        UserError: as `Reader.wait`.
    """
    reader, pending, tables = Reader(source, reading), [], iter(tables)
    ahead = reading.ahead if reading.workers else 0
    try:
        while True:
            while len(pending) <= ahead and (table := next(tables, None)) is not None:
                pending.append(reader.request(table))
            if not pending:
                return
            request = pending.pop(0)
            yield request.table, reader.wait(request)
    finally:
        reader.close()
