"""What a profile says about a step: the time of each kind of work. It reads the trace that jax.profiler writes.

A trace's events name instructions of the compiled program (`hlo_op`); the program's text says what each instruction
computes, and in which module of the model it stands (`op_name`). Both together give an event's kind.
"""

import collections
import dataclasses
import gzip
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

KINDS = ("matmul", "attention", "elementwise", "optimizer", "input", "communication")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_PRODUCTS = re.compile(r"gemm|matmul|conv(?!ert)|cublas|cutlass|nvjet|dot", re.IGNORECASE)
_COLLECTIVE = re.compile(r"all-reduce|all-gather|reduce-scatter|all-to-all|collective|nccl", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a compiled program.

    Attributes:
        opcode: 'fusion', 'dot', 'custom-call', ...
        path: where it comes from, as 'jit(update)/jvp(VisionTransformer)/encoder/block_0/attention/qkv/dot_general'.
        target: of a custom call.
        calls: the computation that a fusion or call runs.
    """

    opcode: str
    path: str
    target: str
    calls: str


def instructions(text: str) -> tuple[dict[str, Instruction], dict[str, list[Instruction]]]:
    """The instructions of a compiled program's text, by name; and those of each computation."""
    named: dict[str, Instruction] = {}
    computations: dict[str, list[Instruction]] = collections.defaultdict(list)
    here = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            here = match[1]
        elif match := _INSTRUCTION.match(line):
            path, target = _field(line, r'op_name="([^"]*)"'), _field(line, r'custom_call_target="([^"]*)"')
            found = Instruction(match[2], path, target, _field(line, r"(?:calls|to_apply)=%?([\w.\-]+)"))
            named[match[1]] = found
            computations[here].append(found)
    return named, computations


def _field(line: str, pattern: str) -> str:
    match = re.search(pattern, line)
    return match[1] if match else ""


def kind(path: str, product: bool, collective: bool = False) -> str:
    """The kind of work at a path: one of `KINDS`.

    Attention is all between the queries, keys and values and the output's product: scores, softmax, mixture. What
    neither multiplies matrices nor belongs to the optimizer or the input is elementwise: norms, GELU, residuals, loss.
    What stands outside of the loss and its derivative, and is not the input, is the optimizer.
    """
    parts = path.split("/")
    if collective:
        return "communication"
    if "input" in parts:
        return "input"
    if path and "jvp(" not in path:
        return "optimizer"
    dense = {"qkv", "out"} & set(parts[parts.index("attention") :]) if "attention" in parts else True
    if not dense:
        return "attention"
    return "matmul" if product else "elementwise"


def kinds(text: str) -> dict[str, str]:
    """The kind of every instruction of a compiled program."""
    named, computations = instructions(text)

    def inside(instruction: Instruction) -> list[Instruction]:
        called = computations.get(instruction.calls, []) if instruction.opcode in ("fusion", "call") else []
        return [instruction, *(below for one in called for below in inside(one))]

    def of(instruction: Instruction) -> str:
        whole = inside(instruction)
        products = [one for one in whole if one.opcode in ("dot", "convolution") or _PRODUCTS.search(one.target)]
        # A fusion around a product is that product's; any other is what its own name, its last step's, says.
        path = next((one.path for one in [*products, *whole] if one.path), "")
        if any("fmha" in one.target.lower() for one in whole):
            return "attention"
        return kind(path, bool(products), bool(_COLLECTIVE.search(instruction.opcode)))

    return {name: of(instruction) for name, instruction in named.items()}


def find(folder: Path) -> Path:
    """The newest trace below a folder."""
    traces = sorted(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not traces:
        raise SystemExit(f"there is no *.trace.json.gz below {folder}")
    return traces[-1]


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path) as file:
        return json.load(file)["traceEvents"]


def device_events(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The events that are the program's work, each once: of accelerators their streams', of a CPU its instructions'."""
    processes, threads = {}, {}
    for event in events:
        if event.get("ph") == "M" and event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        if event.get("ph") == "M" and event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    timed = [event for event in events if event.get("ph") == "X"]
    of_devices = [event for event in timed if processes.get(event["pid"], "").startswith("/device:")]
    if not of_devices:
        return [event for event in timed if "hlo_op" in event.get("args", {})]
    for wanted in ("Stream", "XLA Ops"):  # further lines show the same again, summed up by module or by source
        chosen = [event for event in of_devices if threads.get((event["pid"], event["tid"]), "").startswith(wanted)]
        if chosen:
            return chosen
    return of_devices


def own_times(events: Iterable[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], float]]:
    """Each event with its microseconds, those of events inside it on the same thread left out (loops, calls)."""
    result = []
    by_thread = collections.defaultdict(list)
    for event in events:
        by_thread[event["pid"], event["tid"]].append(event)
    for thread in by_thread.values():
        thread.sort(key=lambda event: (event["ts"], -event.get("dur", 0)))
        own, open_ = [event.get("dur", 0.0) for event in thread], []
        for place, event in enumerate(thread):
            while open_ and thread[open_[-1]]["ts"] + thread[open_[-1]].get("dur", 0) <= event["ts"]:
                open_.pop()
            if open_:
                own[open_[-1]] -= event.get("dur", 0)
            open_.append(place)
        result += zip(thread, own, strict=True)
    return result


def busy(events: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """Microseconds in which anything runs, and from the first start to the last end."""
    spans = sorted((event["ts"], event["ts"] + event.get("dur", 0)) for event in events)
    if not spans:
        return 0.0, 0.0
    total, reached = 0.0, spans[0][0]
    for start, end in spans:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total, reached - spans[0][0]


def breakdown(events: Iterable[Mapping[str, Any]], of: Mapping[str, str], steps: int) -> dict[str, float]:
    """Milliseconds a step of each kind of work, of 'idle' (nothing runs), and 'step', from the first start to the end.

    Args:
        events: of a trace.
        of: the kind of every instruction (see `kinds`); what is not there goes by its own name.
        steps: in the trace.
    """
    chosen, table = device_events(events), dict.fromkeys(KINDS, 0.0)
    for event, microseconds in own_times(chosen):
        name, shown = event.get("args", {}).get("hlo_op", ""), event.get("name", "")
        if "Memcpy" in shown or "MemcpyH2D" in shown:
            found = "input" if "H2D" in shown else "elementwise"
        else:
            found = of.get(name) or kind("", bool(_PRODUCTS.search(name or shown)), bool(_COLLECTIVE.search(shown)))
        table[found] += microseconds
    working, whole = busy(chosen)
    table |= {"idle": whole - working, "step": whole}
    return {name: round(value / 1e3 / steps, 4) for name, value in table.items()}
