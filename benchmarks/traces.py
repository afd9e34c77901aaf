"""What a profile says about a step: the time of each kind of work. It reads the trace that jax.profiler writes.

A trace's events name instructions of the compiled program (`hlo_op`); the program's text says what each instruction
computes, and in which module of the model it stands (`op_name`). Both together give an event's kind. Where the name is
missing, as for kernels that a CUDA graph launches, the kernel's own name has to do.

The format, as XLA's CUPTI collector and its trace converter write it: process '/device:GPU:0' has a thread per stream,
'Stream #13(Compute)' or 'Stream #14(MemcpyD2H,Memset)', and further threads that are derived from these ('XLA Modules',
'XLA Ops', 'Framework Ops', 'Source code', ...). Times are microseconds, as decimal fractions.
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
# On a stream, but no work of the device.
_NO_WORK = re.compile(r"^(MemoryAlloc|MemoryFree|MemoryResidency|Overhead|Synchronization)\b")


def kind(path: str, product: bool, collective: bool = False) -> str:
    """The kind of work at a path: one of `KINDS`.

    Attention is all between the queries, keys and values and the output projection: scores, softmax, weighted sum.
    What is neither a matmul nor belongs to the optimizer or the input is elementwise: norms, GELU, residuals, loss.
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


def describe(program: hlo.Program, instruction: hlo.Instruction) -> tuple[str, str]:
    """The kind of an instruction, and the path that decides it: of a fusion around a matmul, the matmul's."""
    whole = program.inside(instruction)
    products = [one for one in whole if one.opcode in ("dot", "convolution") or _MATMUL.search(one.target)]
    # Any other fusion is what its own name, its last step's, says.
    path = next((one.path for one in [*products, *whole] if one.path), "")
    if any(_ATTENTION.search(f"{one.target} {one.name} {one.path}") for one in whole):
        return "attention", path
    return kind(path, bool(products), bool(_COLLECTIVE.search(instruction.opcode))), path


def kinds(text: str) -> dict[str, str]:
    """The kind of every instruction of a compiled program."""
    program = hlo.parse(text)
    return {name: describe(program, one)[0] for name, one in program.named().items()}


def kind_by_name(name: str) -> str:
    """The kind of a kernel or copy of which nothing but its name is known."""
    if "memcpy" in name.lower():
        return "input" if "H2D" in name else "elementwise"
    patterns = {"communication": _COLLECTIVE, "attention": _ATTENTION, "matmul": _MATMUL, "elementwise": _ELEMENTWISE}
    return next((kind for kind, pattern in patterns.items() if pattern.search(name)), "unattributed")


class Attribution:
    """Says of events what kind of work they are, and how that is known.

    Names of instructions in a trace differ from the program's text by suffixes ('.clone', '.remat2'), a prefix
    ('wrapped_'), and punctuation, since kernels are named after their fusion as C identifiers.
    """

    def __init__(self, of: Mapping[str, str]):
        self.of, self.plain = of, {}
        for name, kind in of.items():
            key = self._plain(name)
            self.plain[key] = kind if self.plain.get(key, kind) == kind else ""

    @staticmethod
    def _plain(name: str) -> str:
        name = re.sub(r"[^a-z0-9]+", "_", name.split("::")[-1].lower()).removeprefix("wrapped_")
        return re.sub(r"(_(clone|remat\d*)(_\d+)?)+$", "", name)

    def __call__(self, event: Event) -> tuple[str, str]:
        """The kind; and 'program', 'name' (of the kernel alone) or 'none'."""
        arguments, shown = event.get("args", {}), event.get("name", "")
        # Kernels of a CUDA graph share the annotation of its launch: it says nothing of each.
        instruction = "" if any("graph" in key.lower() for key in arguments) else arguments.get("hlo_op", "")
        if "memcpy" not in shown.lower():
            if found := self.of.get(instruction) or self.plain.get(self._plain(instruction)):
                return found, "program"
            if found := self.plain.get(self._plain(shown)):
                return found, "name"
        found = "unattributed" if _is_graph(event) else kind_by_name(f"{shown} {instruction}")
        return found, "none" if found == "unattributed" else "name"


def find(folder: Path) -> Path:
    """The newest trace below a folder."""
    traces = sorted(folder.rglob("*.trace.json.gz"), key=lambda path: path.stat().st_mtime)
    if not traces:
        raise SystemExit(f"there is no *.trace.json.gz below {folder}")
    return traces[-1]


def read(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path) as file:
        return json.load(file)["traceEvents"]


def device_events(events: Iterable[Event]) -> tuple[list[Event], bool]:
    """The events that are the program's work, each once, and whether they nest (a loop's encloses its body's).

    Those of a GPU's streams, of which none encloses another; of other devices and CPUs, their instructions'.
    """
    processes, threads = {}, {}
    for event in events:
        if event.get("ph") == "M" and event.get("name") == "process_name":
            processes[event["pid"]] = event["args"]["name"]
        if event.get("ph") == "M" and event.get("name") == "thread_name":
            threads[event["pid"], event["tid"]] = event["args"]["name"]
    timed = [event for event in events if event.get("ph") == "X"]
    of_devices = [event for event in timed if processes.get(event["pid"], "").startswith("/device:")]
    if not of_devices:
        return [event for event in timed if "hlo_op" in event.get("args", {})], True

    def on(event: Event, *lines: str) -> bool:
        return threads.get((event["pid"], event["tid"]), "").startswith(lines)

    # A stream on which CUPTI itself took time goes by the name 'CUPTI overhead'.
    streams = [event for event in of_devices if on(event, "Stream") or (on(event, "CUPTI") and _is_kernel(event))]
    if streams:
        return [event for event in streams if not _NO_WORK.match(event["name"])], False
    return [event for event in of_devices if on(event, "XLA Ops")] or of_devices, True


def _is_kernel(event: Event) -> bool:
    return bool({"hlo_op", "correlation_id", "kernel_details"} & set(event.get("args", {})))


def _is_graph(event: Event) -> bool:
    """Whether an event is a whole launch of a CUDA graph, whose kernels may have events of their own."""
    return event["name"].startswith("CudaGraph") or "cuda_graph_exec_id" in event.get("args", {})


def own_times(events: Sequence[Event], nested: bool) -> list[float]:
    """Microseconds of each event, such that they add up to the time in which any runs.

    While k events run at once, each gets 1/k of the time. Of nested events, which one thread has open at once, only the
    innermost runs. A CUDA graph's launch runs only while none of its kernels does.
    """
    # Whole picoseconds, the unit of the profiler: in floating point an event may end after its successor starts.
    spans = [(round(1e6 * event["ts"]), round(1e6 * (event["ts"] + event.get("dur", 0)))) for event in events]
    moments = [(end, 0, index) for index, (start, end) in enumerate(spans) if end > start]
    moments += [(start, 1, index) for index, (start, end) in enumerate(spans) if end > start]
    # Ends before starts; of those that start together, the longest first, since it is outermost.
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


def breakdown(events: Iterable[Event], of: Mapping[str, str], steps: int) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds per step of each kind of work, and how much of it is attributed how.

    The kinds and 'idle' (nothing runs) add up to 'step', the time from the first start to the last end.

    Args:
        events: of a trace.
        of: the kind of every instruction (see `kinds`); what is not there goes by its own name.
        steps: in the trace.

    Returns:
        The times; and the share of the busy time that is attributed by the 'program', by the kernel's 'name', or not
        at all ('none').
    """
    chosen, nested = device_events(list(events))
    attribute = Attribution(of)
    table, how = dict.fromkeys(KINDS, 0.0), dict.fromkeys(("program", "name", "none"), 0.0)
    for event, microseconds in zip(chosen, own_times(chosen, nested), strict=True):
        found, by = attribute(event)
        table[found] += microseconds
        how[by] += microseconds
    working = sum(table.values())
    whole = 0.0
    if chosen:
        end = max(event["ts"] + event.get("dur", 0) for event in chosen)
        whole = end - min(event["ts"] for event in chosen)
    table |= {"idle": max(0.0, whole - working), "step": whole}
    shares = {name: round(value / working, 4) for name, value in how.items()} if working else how
    return {name: round(value / 1e3 / steps, 4) for name, value in table.items()}, shares
