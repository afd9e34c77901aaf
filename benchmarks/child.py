"""The process of one side: it answers with JSON lines, and sleeps on standard input between its turns."""

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

from work import Work


def serve(make: Callable[[Work], Any]) -> None:
    """Makes a side of the first argument, reports, and takes a turn for every line {"steps": n}, until there are none.

    A side has `report`, a dictionary, and `turn(steps)`, the seconds of each step or of all of them. What fails is
    answered as {"error": ...}.
    """
    # Libraries print what they like; the answers have a way of their own.
    answers, work = os.fdopen(os.dup(1), "w"), Work(**json.loads(sys.argv[1]))
    os.dup2(2, 1)

    def answer(**values: Any) -> None:
        print(json.dumps(values), file=answers, flush=True)

    try:
        side = make(work)
        answer(**side.report)
        for line in sys.stdin:
            answer(seconds=side.turn(json.loads(line)["steps"]))
    except Exception as error:
        answer(error=" ".join(f"{type(error).__name__}: {error}".split())[:300])


def resident_mb() -> float:
    """The most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
