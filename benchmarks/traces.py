"""Time of each kind of work in a training step, from a trace of jax.profiler.

Events of a trace name instructions of the compiled program (`hlo_op`); the text of the program shows what an
instruction computes and in which module of the model (`op_name`). Both together determine the kind of an event. Without
`hlo_op`, as for kernels that a CUDA graph launches, the kind is guessed from the name of the kernel.

The format of XLA's CUPTI collector and its trace converter: process '/device:GPU:0' has a thread for each stream,
'Stream #13(Compute)' or 'Stream #14(MemcpyD2H,Memset)', and more threads derived from these ('XLA Modules', 'XLA Ops',
'Framework Ops', 'Source code', ...). Times are in microseconds, with decimals.
"""

import collections
import gzip
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hlo

Event = Mapping[str, Any]
KINDS = ("matmul", "attention", "elementwise", "optimizer", "input", "communication", "unattributed")
_MATMUL = re.compile(r"gemm|matmul|conv(?!ert)|cublas|cutlass|nvjet|xmma|splitk|dot", re.IGNORECASE)
_ATTENTION = re.compile(r"fmha|sdpa|flash|attention_forward|attention_backward", re.IGNORECASE)
_COLLECTIVE = re.compile(r"all-?reduce|all-?gather|reduce-?scatter|all-?to-?all|collective|nccl", re.IGNORECASE)
_ELEMENTWISE = re.compile(
    r"fusion|wrapped|memcpy|memset|reduce|transpose|copy|convert|broadcast|add|mul|select|slice|gather|scatter|concat",
    re.IGNORECASE,
)
# Events of a stream during which the device does not work.
_NO_WORK = re.compile(r"^(MemoryAlloc|MemoryFree|MemoryResidency|Overhead|Synchronization)\b")


def kind(path: str, is_matmul: bool, collective: bool = False) -> str:
    """The kind of work at a path: one of `KINDS`.

    Attention is everything between the qkv and the output projection: scores, softmax, weighted sum. The optimizer is
    everything outside of the loss and its derivative, except the input. Elementwise is all else that is not a matmul:
    norms, GELU, residuals, loss.
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
    return "matmul" if is_matmul else "elementwise"


def describe(program: hlo.Program, instruction: hlo.Instruction) -> tuple[str, str]:
    """The kind of an instruction, and the path that determines it: for a fusion with a matmul, that of the matmul."""
    inside = program.inside(instruction)
    matmuls = [one for one in inside if one.opcode in ("dot", "convolution") or _MATMUL.search(one.target)]
    # The path of any other fusion is its own, that of its last operation.
    path = next((one.path for one in [*matmuls, *inside] if one.path), "")
    if any(_ATTENTION.search(f"{one.target} {one.name} {one.path}") for one in inside):
        return "attention", path
    return kind(path, bool(matmuls), bool(_COLLECTIVE.search(instruction.opcode))), path


def kinds(text: str) -> dict[str, str]:
    """The kind of every instruction of a compiled program."""
    program = hlo.parse(text)
    return {name: describe(program, one)[0] for name, one in program.named().items()}


def kind_by_name(name: str) -> str:
    """The kind of a kernel or copy, guessed from its name."""
    if "memcpy" in name.lower():
        return "input" if "H2D" in name else "elementwise"
    patterns = {"communication": _COLLECTIVE, "attention": _ATTENTION, "matmul": _MATMUL, "elementwise": _ELEMENTWISE}
    return next((kind for kind, pattern in patterns.items() if pattern.search(name)), "unattributed")


class Attribution:
    """Determines the kind of work of events, and how it is known.

    Names of instructions in a trace differ from those in the program by suffixes ('.clone', '.remat2'), a prefix
    ('wrapped_'), and punctuation, since kernels are named after their fusion as C identifiers.
    """

    def __init__(self, kinds: Mapping[str, str]):
        self.kinds, self.plain = kinds, {}
        for name, kind in kinds.items():
            key = self._plain(name)
            self.plain[key] = kind if self.plain.get(key, kind) == kind else ""

    @staticmethod
    def _plain(name: str) -> str:
        name = re.sub(r"[^a-z0-9]+", "_", name.split("::")[-1].lower()).removeprefix("wrapped_")
        return re.sub(r"(_(clone|remat\d*)(_\d+)?)+$", "", name)

    def __call__(self, event: Event) -> tuple[str, str]:
        """The kind; and 'program', 'name' (of the kernel alone) or 'none'."""
        arguments, shown = event.get("args", {}), event.get("name", "")
        # Kernels of a CUDA graph all have the annotation of its launch, which does not identify them.
        instruction = "" if any("graph" in key.lower() for key in arguments) else arguments.get("hlo_op", "")
        if "memcpy" not in shown.lower():
            if found := self.kinds.get(instruction) or self.plain.get(self._plain(instruction)):
                return found, "program"
            if found := self.plain.get(self._plain(shown)):
                return found, "name"
        found = "unattributed" if _is_graph(event) else kind_by_name(f"{shown} {instruction}")
        return found, "none" if found == "unattributed" else "name"


def find(directory: Path) -> Path:
    """The path of the newest trace in a directory tree."""
    traces = sorted(directory.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not traces:
        raise SystemExit(f"error: no *.trace.json.gz in {directory}")
    return traces[-1]


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path) as file:
        return json.load(file)["traceEvents"]


def device_events(events: Iterable[Event]) -> tuple[list[Event], bool]:
    """The events of the program's work, each once, and whether they are nested (a loop contains those of its body).

    For a GPU these are the events of its streams, which are not nested; for other devices, those of instructions.
    """
    processes, threads = {}, {}
    for event in events:
        if event.get("ph") == "M" and event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        if event.get("ph") == "M" and event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    timed = [event for event in events if event.get("ph") == "X"]
    on_devices = [event for event in timed if processes.get(event["pid"], "").startswith("/device:")]
    if not on_devices:
        return [event for event in timed if "hlo_op" in event.get("args", {})], True

    def on(event: Event, *names: str) -> bool:
        return threads.get((event["pid"], event["tid"]), "").startswith(names)

    # A stream with overhead of CUPTI itself is named 'CUPTI overhead'.
    streams = [event for event in on_devices if on(event, "Stream") or (on(event, "CUPTI") and _is_kernel(event))]
    if streams:
        return [event for event in streams if not _NO_WORK.match(event["name"])], False
    return [event for event in on_devices if on(event, "XLA Ops")] or on_devices, True


def _is_kernel(event: Event) -> bool:
    return bool({"hlo_op", "correlation_id", "kernel_details"} & set(event.get("args", {})))


def _is_graph(event: Event) -> bool:
    """Whether an event is the launch of a CUDA graph, whose kernels may have separate events."""
    return event["name"].startswith("CudaGraph") or "cuda_graph_exec_id" in event.get("args", {})


def own_times(events: Sequence[Event], nested: bool) -> list[float]:
    """Microseconds of each event; they add up to the time in which any event runs.

    While k events run, each gets 1/k of the time. Of the nested events of a thread only the innermost counts. The
    launch of a CUDA graph counts only while none of its kernels runs.
    """
    # Integer picoseconds, the unit of the profiler: in floating point an event may end after its successor starts.
    spans = [(round(1e6 * event["ts"]), round(1e6 * (event["ts"] + event.get("dur", 0)))) for event in events]
    moments = [(end, 0, index) for index, (start, end) in enumerate(spans) if end > start]
    moments += [(start, 1, index) for index, (start, end) in enumerate(spans) if end > start]
    # Ends before starts; of events that start together, the longest first, because it is outermost.
    moments.sort(key=lambda moment: (moment[0], moment[1], -spans[moment[2]][1]))
    graphs = {index for index, event in enumerate(events) if _is_graph(event)}
    own, before = [0.0] * len(spans), 0
    opened: dict[Any, list[int]] = collections.defaultdict(list)
    for now, starts, index in moments:
        threads = [thread for thread in opened.values() if thread]
        running = [thread[-1] for thread in threads] if nested else [one for thread in threads for one in thread]
        running = [one for one in running if one not in graphs] or running
        for one in running:
            own[one] += (now - before) / len(running) / 1e6
        thread = opened[events[index]["pid"], events[index]["tid"]]
        thread.append(index) if starts else thread.remove(index)
        before = now
    return own


def breakdown(
    events: Iterable[Event], kinds: Mapping[str, str], steps: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds per step of each kind of work, and how the kinds are known.

    The kinds and 'idle' (nothing runs) add up to 'step', the time from the first start to the last end.

    Args:
        events: of a trace.
        kinds: the kind of every instruction (see the function `kinds`); other events are classified by their names.
        steps: number of steps in the trace.

    Returns:
        The times, and the share of busy time that is attributed by the 'program', by the 'name' of the kernel, or not
        at all ('none').
    """
    chosen, nested = device_events(list(events))
    attribute = Attribution(kinds)
    table, attributed = dict.fromkeys(KINDS, 0.0), dict.fromkeys(("program", "name", "none"), 0.0)
    for event, microseconds in zip(chosen, own_times(chosen, nested), strict=True):
        found, by = attribute(event)
        table[found] += microseconds
        attributed[by] += microseconds
    working = sum(table.values())
    duration = 0.0
    if chosen:
        end = max(event["ts"] + event.get("dur", 0) for event in chosen)
        duration = end - min(event["ts"] for event in chosen)
    table |= {"idle": max(0.0, duration - working), "step": duration}
    shares = {name: round(value / working, 4) for name, value in attributed.items()} if working else attributed
    return {name: round(value / 1e3 / steps, 4) for name, value in table.items()}, shares
