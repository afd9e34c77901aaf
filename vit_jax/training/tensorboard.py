"""TensorBoard event files, written without a thread, and cut back as metrics.jsonl is.

TensorBoard by itself would hide, not drop, what stands twice.
"""

import itertools
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

_HEADER, _FOOTER = 12, 4  # a length and its checksum before each record, the record's checksum behind it
_NUMBERS = itertools.count()


class EventFile:
    """One file of events, written as they come: tensorboardX's own writer has a thread that a full disk ends."""

    def __init__(self, workdir: Path):
        """Opens a file of a name that no other has."""
        from tensorboardX.proto.event_pb2 import Event

        owner = f"{socket.gethostname()}.{os.getpid()}.{next(_NUMBERS)}"
        self._file = open(workdir / f"events.out.tfevents.{time.time():.0f}.{owner}", "wb", buffering=0)  # noqa: SIM115
        self._backlog, self._whole = _framed(Event(wall_time=time.time(), file_version="brain.Event:2")), 0

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Appends the metrics of a step.

        Raises:
            OSError: they cannot be written; they will be with the next ones.
        """
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._backlog += _framed(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self.flush()

    def flush(self) -> None:
        """Writes what could not be written before; raises OSError where it still cannot."""
        if self._backlog:
            self._file.truncate(self._whole)  # what an earlier attempt left of it
            self._file.seek(self._whole)
            written = 0
            while written < len(self._backlog):
                written += self._file.write(self._backlog[written:])
            self._whole, self._backlog = self._whole + len(self._backlog), b""

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _framed(event: object) -> bytes:
    from tensorboardX.record_writer import masked_crc32c

    data = event.SerializeToString()
    length = struct.pack("<Q", len(data))
    checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, data)]
    return length + checksums[0] + data + checksums[1]


def records(content: bytes) -> Iterator[bytes]:
    """The whole records of a file in the TFRecord format, framing included; ends where one is cut short."""
    start = 0
    while start + _HEADER <= len(content):
        (length,) = struct.unpack_from("<Q", content, start)
        end = start + _HEADER + length + _FOOTER
        if end > len(content):
            return
        yield content[start:end]
        start = end


def cut_back(path: Path, step: int) -> None:
    """Drops the events beyond `step`, and a last one that was cut short when its writer was killed."""
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
    whole = b"".join(kept)
    if whole == content:
        return
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_bytes(whole)
    os.replace(scratch, path)
