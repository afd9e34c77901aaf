"""The sides of a comparison, each in a process of its own, taking turns.

Two frameworks in one process compete for its threads; so each has its own process, and sleeps while another is
measured. What they still use while they wait is measured too.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import psutil
from work import Work

from vit_jax.models import variants

OURS = ("ours", "ours_trainer", "plain_flax")
PEERS = ("torch", "torch_autocast", "torch_compile", "timm", "timm_compile", "transformers")
ALL = OURS + PEERS


class Failed(Exception):
    """A side could not do its work; the message says why."""


class Side:
    """A process that does one kind of work.

    Attributes:
        name: of the side.
        report: what it said once it was ready: device, library, compile_s, step_s, peak_memory_mb, ...
        turns: what each turn gave.
        waited: seconds of the others' turns.
        used: processor seconds that it took meanwhile.
    """

    def __init__(self, work: Work, torch_python: str):
        """Starts it, and waits until it is compiled and warm.

        Raises:
            Failed: it cannot do that work here.
        """
        self.name, self.turns, self.waited, self.used = work.side, [], 0.0, 0.0
        ours = work.side in OURS
        command = [sys.executable if ours else torch_python, str(HERE / ("jax_sides.py" if ours else "peers.py"))]
        # On a GPU, several processes share the memory: each takes what it needs.
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
        # A file, not a pipe: nobody reads it while the side works, and a full pipe would stop it.
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (it lives as long as the process)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.log}
        self.process = subprocess.Popen([*command, work.json()], text=True, env=environment, **pipes)
        try:
            self.report = self._answer()
        except Failed:
            self.close()
            raise

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            last = (self.log.read().strip().splitlines() or ["it said nothing"])[-1]
            raise Failed(f"the process ended: {last[:300]}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def turn(self, steps: int) -> Any:
        """Seconds of so many steps: of all together in training, of each in inference."""
        self.process.stdin.write(json.dumps({"steps": steps}) + "\n")
        self.process.stdin.flush()
        return self._answer()["seconds"]

    def processor_seconds(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def waiting(self) -> float:
        """Cores that it uses while another measures: next to none, or the other's figures are worth nothing."""
        return round(self.used / self.waited, 3) if self.waited else 0.0

    def close(self) -> None:
        """Ends it; its lines on standard error are dropped."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()
        self.log.close()


def add_flags(parser: argparse.ArgumentParser, variant: str, image_size: int, known: Sequence[str] = ALL) -> None:
    """The flags that all comparisons share."""
    add = parser.add_argument
    add("--variant", default=variant, help="size and patch size (default: %(default)s)")
    add("--depth", type=int, help="encoder blocks (default: the variant's)")
    add("--image_size", type=int, default=image_size, help="height and width in pixels (default: %(default)s)")
    add("--classes", type=int, default=10, help="(default: %(default)s)")
    add("--dtypes", default="float32,bfloat16", help="compute dtypes, one group of lines each (default: %(default)s)")
    add("--sides", help=f"of {', '.join(known)} (default: all that are installed)")
    add("--device", default="auto", choices=["auto", "cpu"], help="(default: an accelerator where there is one)")
    add("--turns", type=int, default=5, help="turns of each side (default: %(default)s)")
    default = os.environ.get("VIT_JAX_TORCH_PYTHON", sys.executable)
    add("--torch_python", default=default, help="interpreter that has PyTorch (default: VIT_JAX_TORCH_PYTHON, or this)")


def chosen(flags: argparse.Namespace, known: Sequence[str] = ALL) -> list[str]:
    """The sides that are asked for, or all that are installed."""
    if flags.sides:
        names = flags.sides.split(",")
        if unknown := set(names) - set(known):
            raise SystemExit(f"--sides: {', '.join(sorted(unknown))} is none of {', '.join(known)}")
        return names
    code = "import importlib.util as u; print([n for n in ('torch', 'timm', 'transformers') if u.find_spec(n)])"
    done = subprocess.run([flags.torch_python, "-c", code], capture_output=True, text=True)
    return [name for name in known if name in OURS or repr(name.split("_")[0]) in done.stdout]


def work_of(flags: argparse.Namespace, side: str, mode: str, dtype: str, batch_size: int, **more: Any) -> Work:
    """The work of a side as the flags have it."""
    fields = variants.fields(flags.variant) | ({"depth": flags.depth} if flags.depth else {})
    if "stem" in fields:
        raise SystemExit(f"--variant={flags.variant}: the peers here have no hybrids; take one as Ti/4 or B/16")
    sizes = {"image_size": flags.image_size, "classes": flags.classes, "batch_size": batch_size}
    return Work(side, mode, dtype=dtype, device=flags.device, **fields, **sizes, **more)


def open_all(works: Sequence[Work], torch_python: str) -> tuple[list[Side], dict[str, str]]:
    """Starts the sides one after the other, so that none disturbs another's compiling; and why some could not."""
    sides, errors = [], {}
    for work in works:
        try:
            sides.append(Side(work, torch_python))
        except Failed as failed:
            errors[work.side] = str(failed)
    return sides, errors


def take_turns(sides: list[Side], turns: int, steps: Callable[[Side], int]) -> dict[str, str]:
    """A B C A B C ...: appends to each side's `turns`, and adds up what the others use meanwhile.

    A side that fails is closed and taken from the list; returned is by name why.
    """
    errors = {}
    for _ in range(turns):
        for side in list(sides):
            others = [other for other in sides if other is not side]
            before = [other.processor_seconds() for other in others]
            try:
                seconds = side.turn(steps(side))
            except (Failed, OSError) as failed:
                errors[side.name] = str(failed)
                side.close()
                sides.remove(side)
                continue
            side.turns.append(seconds)
            for other, used in zip(others, before, strict=True):
                other.waited += sum(seconds) if isinstance(seconds, list) else seconds
                other.used += other.processor_seconds() - used
    return errors


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times as fast the first is as the second, turn by turn."""

    median: float
    least: float
    most: float


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """From seconds per step."""
    each = [b / a for a, b in zip(ours, theirs, strict=True)]
    return Ratio(round(statistics.median(each), 3), round(min(each), 3), round(max(each), 3))
