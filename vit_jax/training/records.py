"""A file that grows by whole records, also while its disk is full or away for some time."""

import contextlib
import errno
import os
from pathlib import Path

from vit_jax import atomic
from vit_jax.errors import UserError


class RecordFile:
    """Appends records to a file; those that cannot be written are kept and written later.

    A file that another process replaces in the meantime, because it has taken the run directory over, is not touched.
    """

    def __init__(self, path: Path):
        """Opens an existing file.

        Raises:
            OSError: it cannot be opened.
        """
        self._path, self._backlog = path, b""
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115
        self._complete_size, self._inode = self._file.seek(0, os.SEEK_END), os.fstat(self._file.fileno()).st_ino
        self._needs_sync = False

    def append(self, record: bytes) -> None:
        """Appends a record.

        Raises:
            OSError: it cannot be written yet; the next call tries again.
        """
        self._backlog += record
        self.write()

    def write(self) -> None:
        """Writes what could not be written before.

        Raises:
            OSError: it still cannot be written.
        """
        if not self._backlog:
            return
        try:
            atomic.check(self._path)
        except UserError:  # the file belongs to another process now
            self._backlog = b""
            raise
        self._needs_sync = True
        try:
            self._reopen()
            self._file.truncate(self._complete_size)  # drops a partial record of an earlier attempt
            written = 0
            while written < len(self._backlog):
                written += self._file.write(self._backlog[written:])
        except OSError:
            self.close()  # a file on a remote disk may have to be opened again
            raise
        self._complete_size, self._backlog = self._complete_size + len(self._backlog), b""

    def _reopen(self) -> None:
        if not self._file.closed:
            return
        self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115
        if os.fstat(self._file.fileno()).st_ino != self._inode:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def sync(self) -> None:
        """Writes everything to the disk: it survives a power failure.

        Raises:
            OSError: it cannot be written.
        """
        self.write()
        if self._needs_sync:
            self._reopen()
            os.fsync(self._file.fileno())
            self._needs_sync = False

    def close(self) -> None:
        """Closes the file."""
        with contextlib.suppress(OSError):
            self._file.close()
