"""The process of one side of a comparison: it answers in JSON lines and waits on standard input between turns."""

import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

from work import Work


def serve(make: Callable[[Work], Any]) -> None:
    """Makes a side from the command's argument and reports it; then runs a turn for each input line {"steps": n}.

    A side has `report`, a dictionary, and `turn(steps)`, which returns seconds: a list with one value per step, or
    their sum. An exception is answered as {"error": ...}.
    """
    # Libraries may print to standard output: answers use a copy of it, and standard output itself becomes stderr.
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
    """Peak resident memory of this process, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
