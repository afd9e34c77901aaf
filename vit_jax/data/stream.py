"""Reading ahead: threads fetch and decode the examples of coming dispatches while the device works on this one.

Threads, not processes: Pillow and array_record decode without holding the interpreter's lock, nothing is copied between
processes, and a thread cannot be killed by itself. What is read is named in advance by its places in the set, so that
the number of threads, and who of them is faster, changes no bit of a batch.
"""

import dataclasses
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

_CHUNK = 16  # examples that a thread takes at a time
_POLL = 0.05  # seconds between two looks at the threads' clocks
_GRACE = 5.0  # seconds that a thread found late has to show that it was its process that slept


@dataclasses.dataclass(frozen=True)
class Reading:
    """How sets that are not resident are read.

    Attributes:
        workers: threads; 0 for one that reads nothing ahead of use.
        ahead: dispatches that are read ahead of the one in use.
        timeout: seconds that one example may take.
    """

    workers: int = 4
    ahead: int = 2
    timeout: float = 120.0


@dataclasses.dataclass(frozen=True)
class Table:
    """The examples of a dispatch that this process reads.

    Attributes:
        places: [batches, columns] of the source.
        rows: batches that the dispatch has room for; those beyond `places` are never read.
        tag: whatever the caller wants back with it.
    """

    places: Integer[np.ndarray, "batches columns"]
    rows: int
    tag: Any = None


class Request:
    """A table in the making.

    Attributes:
        table: what is wanted.
        images: [rows, columns, height, width, channels], or of stored features [rows, columns, ...]; zeros beyond the
            table's batches.
        done: set once all are there.
    """

    def __init__(self, table: Table, shape: tuple[int, ...], dtype: np.dtype):
        """The images of a table, each of this shape and type."""
        self.table = table
        # Never used again for another request: JAX may go on reading from this very memory.
        self.images = np.zeros((table.rows, table.places.shape[1], *shape), dtype)
        self.done = threading.Event()
        self._flat = self.images.reshape(-1, *shape)
        self._missing = table.places.size
        self._lock = threading.Lock()

    def chunks(self) -> Iterator[slice]:
        """The parts that threads take, in order."""
        return (slice(start, start + _CHUNK) for start in range(0, self.table.places.size, _CHUNK))

    def put(self, index: int, image: Shaped[np.ndarray, "*example"]) -> None:
        """Stores an image; whoever waits for the request goes on after the last."""
        self._flat[index] = image
        with self._lock:
            self._missing -= 1
            if not self._missing:
                self.done.set()


@dataclasses.dataclass
class _Worker:
    number: int
    place: int | None = None  # of the example in hand
    since: float = 0.0
    late: tuple[float, float] | None = None  # which `since` was found to be long ago, and when


class Reader:
    """Threads that fill requests in the order in which they are made."""

    def __init__(self, source: Source, reading: Reading):
        """Starts the threads; `close` ends them."""
        self._source, self._reading = source, reading
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        self._error: UserError | None = None
        self._closed = False
        self._workers = [_Worker(number) for number in range(max(1, reading.workers))]
        for worker in self._workers:
            threading.Thread(target=self._work, args=(worker,), name=f"reader {worker.number}", daemon=True).start()

    def request(self, table: Table) -> Request:
        """Asks for the images of a table; returns at once."""
        request = Request(table, self._source.images.shape[1:], self._source.images.dtype)
        for chunk in request.chunks():
            self._tasks.put((request, chunk))
        return request

    def wait(self, request: Request) -> Images:
        """The images of a request, once all are there.

        Raises:
            UserError: an example cannot be read, or takes longer than the time-out; says which, and which thread.
        """
        while not request.done.wait(_POLL):
            if self._error is not None:
                raise self._error
            self._check_clocks()
        return request.images

    def close(self) -> None:
        """Ends the threads, each after the example in its hands."""
        self._closed = True
        for _ in self._workers:
            self._tasks.put(None)

    def _check_clocks(self) -> None:
        now = time.monotonic()
        for worker in self._workers:
            since, place = worker.since, worker.place
            if place is None or now - since <= self._reading.timeout:
                continue
            if worker.late is None or worker.late[0] != since:
                # Looked at twice: a process that was suspended finds all clocks late, and its threads well.
                worker.late = since, now
            elif now - worker.late[1] > min(self._reading.timeout, _GRACE):
                raise UserError(
                    f"reader {worker.number} of {len(self._workers)} has waited {now - since:.0f} s for "
                    f"{self._source.describe(place)}\n"
                    "Is its disk out of reach? config.data.worker_timeout allows more seconds."
                )

    def _work(self, worker: _Worker) -> None:
        while (task := self._tasks.get()) is not None and not self._closed and self._error is None:
            request, chunk = task
            try:
                for offset, place in enumerate(request.table.places.ravel()[chunk].tolist()):
                    worker.since, worker.place = time.monotonic(), place
                    request.put(chunk.start + offset, self._source.read([place])[0])
            except UserError as error:
                self._error = error
            except BaseException as error:  # whatever a decoder or a disk comes up with: it must not end in silence
                self._error = UserError(
                    f"reader {worker.number} cannot read {self._source.describe(worker.place)}: "
                    f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                )
            worker.place = None


def read_ahead(source: Source, reading: Reading, tables: Iterable[Table]) -> Iterator[tuple[Table, Images]]:
    """Each table with its images, in order, the next ones being read meanwhile.

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
