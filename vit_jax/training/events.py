"""TensorBoard event files, cut back as metrics.jsonl is: TensorBoard alone would hide, not drop, what stands twice."""

import os
import struct
from collections.abc import Iterator
from pathlib import Path

_HEADER, _FOOTER = 12, 4  # a length and its checksum before each record, the record's checksum behind it


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
