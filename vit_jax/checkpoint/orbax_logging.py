"""Hides what Orbax's background threads print after a failed read or write; imports neither JAX nor Orbax."""

import functools
import logging
import re
import sys
import warnings
from typing import Any

from absl import logging as absl_logging

# Messages of Orbax and asyncio about arrays that could not be read or written. Threads of a failed save may create the
# temporary directory again after it was removed; the next save of that step then finds it.
_HIDDEN = re.compile(
    r"Failed to get metadata for checkpointable|_SignalingThread\.run\(\) raised|never retrieved.*(orbax|zarr|OCDBT)"
    r"|Attempted to create temporary directory",
    re.DOTALL,
)


@functools.cache
def hide_background_errors() -> None:
    """Hides tracebacks of Orbax's background threads and coroutines, in the whole process; for commands.

    When a read or write fails, Orbax raises, and the caller reports it. Its other pending operations then fail too:
    without this, Python and the absl and asyncio loggers print hundreds of lines of tracebacks, some much later.
    """
    previous = sys.unraisablehook

    def hook(report: Any) -> None:
        code = getattr(report.object, "cr_code", None)  # of a coroutine that was never awaited
        half_made = "'_UnixSelectorEventLoop' object has no attribute"  # without files for it
        if str(report.exc_value).startswith(("Event loop is closed", half_made)):
            return
        if code is None or "orbax" not in code.co_filename:
            previous(report)

    def is_shown(record: logging.LogRecord) -> bool:
        return not _HIDDEN.search(record.getMessage())

    sys.unraisablehook = hook
    warnings.filterwarnings("ignore", "coroutine '.*' was never awaited", RuntimeWarning)
    for logger in (absl_logging.get_absl_logger(), logging.getLogger("asyncio")):
        logger.addFilter(is_shown)
