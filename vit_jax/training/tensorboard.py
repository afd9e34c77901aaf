"""TensorBoard event files, written without a thread and truncated as metrics.jsonl is.

TensorBoard itself would only hide, not drop, steps that are written twice.
"""

import itertools
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from vit_jax import atomic
from vit_jax.training.records import RecordFile

_HEADER, _FOOTER = 12, 4  # bytes before a record (its length and that number's checksum) and after it (its checksum)
_FILE_NUMBERS = itertools.count()


class EventFile(RecordFile):
    """One event file, written without a thread: the thread of tensorboardX's writer dies when the disk is full."""

    def __init__(self, workdir: Path):
        """Makes a file with a unique name; raises OSError if that is not possible."""
        from tensorboardX.proto.event_pb2 import Event

        owner = f"{socket.gethostname()}.{os.getpid()}.{next(_FILE_NUMBERS)}"
        path = workdir / f"events.out.tfevents.{time.time():.0f}.{owner}"
        atomic.write_bytes(path, _framed(Event(wall_time=time.time(), file_version="brain.Event:2")))
        super().__init__(path)

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Appends the metrics of a step.

        Raises:
            OSError: they cannot be written; the next call tries again.
        """
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self.append(_framed(Event(wall_time=time.time(), step=step, summary=Summary(value=values))))


def _framed(event: object) -> bytes:
    from tensorboardX.record_writer import masked_crc32c

    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    return length + checksums[0] + data + checksums[1]


def records(content: bytes) -> Iterator[bytes]:
    """Yields the complete records of a TFRecord file, with their framing."""
    start = 0
    while start + _HEADER <= len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        end = start + _HEADER + length + _FOOTER
        if end > len(content):
            return
        yield content[start:end]
        start = end


def truncate(path: Path, step: int) -> None:
    """Drops the events after `step`, and a partial last event whose writer was killed; always makes a new file."""
    from google.protobuf.message import DecodeError
    from tensorboardX.proto.event_pb2 import Event

    content, kept = path.read_bytes(), []
    for record in records(content):
        try:
            event = Event.FromString(record[_HEADER:-_FOOTER])
        except DecodeError:
            break
        if not (event.HasField("summary") and event.step > step):
            kept.append(record)
    atomic.write_bytes(path, b"".join(kept))
