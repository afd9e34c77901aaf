"""`config.log.profile`: what the devices did during some steps, for TensorBoard and Perfetto."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from vit_jax.errors import UserError

FOLDER = "profile"
Update = Callable[..., tuple[Any, Any]]  # a compiled update: (state, feed, count) -> (state, metrics)


def span(text: str | None) -> tuple[int, int] | None:
    """The first step of 'START:STOP', and the one behind the last; None for None.

    Raises:
        UserError: it is not of that form, or has no step.
    """
    if text is None:
        return None
    start, _, stop = text.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and int(start) < int(stop)):
        raise UserError(
            f"config.log.profile is {text!r}\n  allowed: START:STOP, two steps, as '100:110' for ten steps; or None"
        )
    return int(start), int(stop)


def cuts(text: str | None, step: int) -> list[int]:
    """Where a dispatch that begins at `step` has to end, so that the profile is of its steps alone."""
    return [end for end in span(text) or () if end > step]


def profiled(update: Update, text: str | None, folder: Path, step: Callable[[], int]) -> Update:
    """The update, of whose calls the steps START to STOP are recorded in `folder`/profile.

    The last of them is waited for. A run that stops in between leaves no profile; one that goes on from there records
    the steps that are left.

    Args:
        update: what is called.
        text: `config.log.profile`; None for no recording.
        folder: the workdir.
        step: says which step the next call begins with.
    """
    wanted = span(text)
    if wanted is None:
        return update
    start, stop = wanted
    recording = False

    def recorded(state: Any, feed: Any, count: Any, *more: Any) -> tuple[Any, Any]:
        nonlocal recording
        end = step() + int(count)
        if not recording and start <= step() < stop:
            jax.block_until_ready(state)
            jax.profiler.start_trace(folder / FOLDER)
            recording = True
        result = update(state, feed, count, *more)
        if recording and end >= stop:
            jax.block_until_ready(result)
            jax.profiler.stop_trace()
            recording = False
        return result

    return recorded
