"""The sides (implementations) of a comparison, each in a separate process, measured in turns.

Two frameworks in one process compete for its threads, so each side has a process, which sleeps while another is
measured. The processor time that a side uses while it waits is measured too.
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
    """A side failed; the message says why."""


class Side:
    """The process of one side.

    Attributes:
        name: of the side.
        report: its first answer: device, library, compile_s, step_s, peak_memory_mb, ...
        turns: the results of its turns.
        waited: seconds for which it waited for other sides.
        used: processor seconds that it used while it waited.
    """

    def __init__(self, work: Work, torch_python: str):
        """Starts the process and waits until it is compiled and warmed up.

        Raises:
            Failed: the side cannot do this work here.
        """
        self.name, self.turns, self.waited, self.used = work.side, [], 0.0, 0.0
        ours = work.side in OURS
        command = [sys.executable if ours else torch_python, str(HERE / ("jax_sides.py" if ours else "peers.py"))]
        # Several processes share the memory of a GPU: none may preallocate it.
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
        # A file, not a pipe: nothing reads it during a turn, and a full pipe would block the process.
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (open as long as the process runs)
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
            last = (self.log.read().strip().splitlines() or ["no output"])[-1]
            raise Failed(f"the process ended: {last[:300]}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer

    def turn(self, steps: int) -> Any:
        """Runs a number of steps; their seconds: in total for training, one value per step for inference."""
        self.process.stdin.write(json.dumps({"steps": steps}) + "\n")
        self.process.stdin.flush()
        return self._answer()["seconds"]

    def processor_seconds(self) -> float:
        times = psutil.Process(self.process.pid).cpu_times()
        return times.user + times.system

    def waiting(self) -> float:
        """Cores used while other sides were measured. If this is not close to 0, their results are not reliable."""
        return round(self.used / self.waited, 3) if self.waited else 0.0

    def close(self) -> None:
        """Ends the process."""
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
    """Adds the flags that all comparisons have."""
    add = parser.add_argument
    add("--variant", default=variant, help="size and patch size (default: %(default)s)")
    add("--depth", type=int, help="encoder blocks (default: the variant's)")
    add("--image_size", type=int, default=image_size, help="height and width in pixels (default: %(default)s)")
    add("--classes", type=int, default=10, help="(default: %(default)s)")
    add(
        "--dtypes",
        default="float32,bfloat16",
        help="compute dtypes, compared one after the other (default: %(default)s)",
    )
    add("--sides", help=f"implementations, of {', '.join(known)} (default: all that are installed)")
    add("--device", default="auto", choices=["auto", "cpu"], help="(default: an accelerator if there is one)")
    add("--turns", type=int, default=5, help="turns of each side (default: %(default)s)")
    default = os.environ.get("VIT_JAX_TORCH_PYTHON", sys.executable)
    add(
        "--torch_python",
        default=default,
        help="Python interpreter with PyTorch (default: VIT_JAX_TORCH_PYTHON, else this one)",
    )


def chosen(flags: argparse.Namespace, known: Sequence[str] = ALL) -> list[str]:
    """The sides of --sides, or all that are installed.

    Raises:
        SystemExit: --sides has an unknown name.
    """
    if flags.sides:
        names = flags.sides.split(",")
        if unknown := set(names) - set(known):
            raise SystemExit(f"error: --sides: unknown: {', '.join(sorted(unknown))}\n  allowed: {', '.join(known)}")
        return names
    code = "import importlib.util as u; print([n for n in ('torch', 'timm', 'transformers') if u.find_spec(n)])"
    done = subprocess.run([flags.torch_python, "-c", code], capture_output=True, text=True)
    return [name for name in known if name in OURS or repr(name.split("_")[0]) in done.stdout]


def work_of(flags: argparse.Namespace, side: str, mode: str, dtype: str, batch_size: int, **more: Any) -> Work:
    """The work of a side, from the flags."""
    fields = variants.fields(flags.variant) | ({"depth": flags.depth} if flags.depth else {})
    if "stem" in fields:
        raise SystemExit(
            f"error: --variant={flags.variant}: the baselines have no hybrids\n  allowed: such as Ti/4, B/16"
        )
    sizes = {"image_size": flags.image_size, "classes": flags.classes, "batch_size": batch_size}
    return Work(side, mode, dtype=dtype, device=flags.device, **fields, **sizes, **more)


def open_all(works: Sequence[Work], torch_python: str) -> tuple[list[Side], dict[str, str]]:
    """Starts the sides one after the other, so that they do not compile at the same time; also the errors, by name."""
    sides, errors = [], {}
    for work in works:
        try:
            sides.append(Side(work, torch_python))
        except Failed as failed:
            errors[work.side] = str(failed)
    return sides, errors


def take_turns(sides: list[Side], turns: int, steps: Callable[[Side], int]) -> dict[str, str]:
    """Runs turns in the order A B C A B C ... and updates `turns`, `waited` and `used` of the sides.

    A side that fails is closed and removed from the list. Returns the errors by name.
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
    """Speedup of the first side over the second: median, minimum and maximum over the turns."""

    median: float
    minimum: float
    maximum: float


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """The speedup, from seconds per step in each turn."""
    each = [b / a for a, b in zip(ours, theirs, strict=True)]
    return Ratio(round(statistics.median(each), 3), round(min(each), 3), round(max(each), 3))
