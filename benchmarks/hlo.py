"""The text of a compiled XLA program as data: computations, instructions, and the bytes and FLOPs of a kernel."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_MATMUL = re.compile(r"gemm|matmul|cublas", re.IGNORECASE)
_BITS = {"pred": 8, "bf16": 16, "token": 0}
# Instructions that launch no kernel: they name, group or reinterpret buffers, or run other computations.
_NO_KERNEL = {
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "after-all", "partition-id", "replica-id",
    "while", "call", "conditional", "async-start", "opt-barrier",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a compiled program.

    Attributes:
        name: unique in the program.
        opcode: 'fusion', 'dot', 'custom-call', ...
        shape: its type, such as 'f32[8,4]{1,0}' or '(bf16[8], s8[4])'.
        arguments: the text in its parentheses.
        path: `op_name`, such as 'jit(update)/jvp(VisionTransformer)/encoder/block_0/attention/qkv/dot_general'.
        target: of a custom call.
        calls: the computation that a fusion or call runs.
        attributes: the rest of the line.
    """

    name: str
    opcode: str
    shape: str
    arguments: str
    path: str
    target: str
    calls: str
    attributes: str

    @property
    def operands(self) -> tuple[str, ...]:
        """The names of its operands, each once."""
        return tuple(dict.fromkeys(re.findall(r"%([\w.\-]+)", self.arguments)))

    def attribute(self, pattern: str) -> str:
        """The first group of a pattern in the attributes, or ''."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Program:
    """Lists of instructions by the name of their computation; `entry` is the one that runs first."""

    computations: dict[str, list[Instruction]]
    entry: str

    def named(self) -> dict[str, Instruction]:
        return {one.name: one for instructions in self.computations.values() for one in instructions}

    def inside(self, instruction: Instruction) -> list[Instruction]:
        """The instruction, and all instructions of the fusions and calls in it."""
        called = self.computations.get(instruction.calls, []) if instruction.opcode in ("fusion", "call") else []
        return [instruction, *(below for one in called for below in self.inside(one))]


def parse(text: str) -> Program:
    """Reads the text of a compiled program (`jax.stages.Compiled.as_text()`)."""
    computations: dict[str, list[Instruction]] = collections.defaultdict(list)
    here = entry = ""
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            here = match[1]
            entry = here if line.startswith("ENTRY") else entry
        elif match := _INSTRUCTION.match(line):
            name, shape, opcode, rest = match.groups()
            arguments, attributes = _split(rest)
            found = (_field(attributes, r'op_name="([^"]*)"'), _field(attributes, r'custom_call_target="([^"]*)"'))
            calls = _field(attributes, r"\b(?:calls|to_apply)=%?([\w.\-]+)")
            computations[here].append(Instruction(name, opcode, shape, arguments, *found, calls, attributes))
    return Program(dict(computations), entry)


def _field(text: str, pattern: str) -> str:
    match = re.search(pattern, text)
    return match[1] if match else ""


def _split(rest: str) -> tuple[str, str]:
    """The text before and after the parenthesis that closes the operands of an instruction."""
    depth = 1
    for match in re.finditer(r"[()]", rest):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return rest[: match.start()], rest[match.end() :]
    return rest, ""


def arrays(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """The element type and dimensions of each array in a type."""
    return [(kind, tuple(int(dim) for dim in dims.split(",") if dim)) for kind, dims in _ARRAY.findall(shape)]


def size(shape: str) -> int:
    """Bytes of an array, or of all arrays of a tuple."""
    return sum(_bits(kind) * math.prod(dims) // 8 for kind, dims in arrays(shape))


def _bits(kind: str) -> int:
    """Bits per element: 16 for 'bf16', 8 for 'f8e4m3fn', 4 for 's4'."""
    digits = re.match(r"[a-z]+(\d+)", kind)
    return _BITS[kind] if kind in _BITS else int(digits[1]) if digits else 0


def kernels(program: Program, computation: str, times: int = 1) -> Iterator[tuple[Instruction, int]]:
    """The instructions of a computation that launch a kernel, each with how often it runs.

    Includes those of loops, calls and conditionals (the branch with the most kernels). The iterations of a loop count
    if the compiler knows their number; otherwise one iteration counts.
    """
    for one in program.computations.get(computation, []):
        if one.opcode == "while":
            count = int(one.attribute(r'"known_trip_count":\{"n":"(\d+)"') or 1)
            for part in ("condition", "body"):
                yield from kernels(program, one.attribute(rf"\b{part}=%?([\w.\-]+)"), times * count)
        elif one.opcode == "conditional":
            branches = one.attribute(r"branch_computations=\{([^}]*)\}")
            names = branches.split(",") + [
                one.attribute(rf"{side}_computation=%?([\w.\-]+)") for side in ("true", "false")
            ]
            found = [list(kernels(program, name.strip().lstrip("%"), times)) for name in names]
            yield from max(found, key=len)
        elif one.opcode in ("call", "async-start"):
            yield from kernels(program, one.calls, times)
        elif one.opcode == "fusion-start":  # its type lists operands, results and a context
            result = program.computations[one.calls][-1].shape
            yield dataclasses.replace(one, opcode="fusion", shape=result), times
        elif one.opcode not in _NO_KERNEL and not one.opcode.endswith(("-done", "-update")):
            yield one, times


def step_computation(program: Program) -> str:
    """The computation that is one training step: the body of the loop over steps where there is one, else the entry.

    The compiler does not know the number of iterations of the loop over steps.
    """
    loops = [one for one in program.computations[program.entry] if one.opcode == "while"]
    bodies = [one.attribute(r"\bbody=%?([\w.\-]+)") for one in loops if "known_trip_count" not in one.attributes]
    found = max(bodies, key=lambda body: len(program.computations.get(body, [])), default=program.entry)
    return found if sum(1 for _ in kernels(program, found)) > 1 else program.entry


def moved(program: Program, kernel: Instruction, shapes: dict[str, str]) -> int:
    """Bytes that a kernel reads and writes: its operands and results, each once.

    For an operand that a fusion only slices dynamically or gathers from, the slice counts; for a result that is updated
    in place, the update.

    Args:
        program: the program of the kernel.
        kernel: one of `kernels`.
        shapes: the type of every instruction of the program, by name.
    """
    inside = program.computations.get(kernel.calls, []) if kernel.opcode == "fusion" else []
    users: dict[str, list[Instruction]] = collections.defaultdict(list)
    for one in inside:
        for operand in one.operands:
            users[operand].append(one)
    parameters = {int(one.arguments): one.name for one in inside if one.opcode == "parameter"}
    total = _written(inside, kernel, shapes)
    for index, operand in enumerate(kernel.operands):
        whole = size(shapes.get(operand, ""))
        total += min(whole, _read(parameters[index], users, shapes)) if index in parameters else whole
    return total


def _read(name: str, users: dict[str, list[Instruction]], shapes: dict[str, str]) -> int:
    """Bytes that a fusion reads from one of its parameters."""
    total = 0
    for one in users[name]:
        first = one.operands[0] == name
        if first and one.opcode in ("dynamic-slice", "gather"):
            total += size(one.shape)
        elif one.opcode == "bitcast":
            total += _read(one.name, users, shapes)
        elif not (first and one.opcode == "dynamic-update-slice"):
            return size(shapes[name])
    return total


def _written(inside: list[Instruction], kernel: Instruction, shapes: dict[str, str]) -> int:
    """Bytes of the results of a kernel, without the workspace that library calls return as an array of bytes."""
    if kernel.opcode == "custom-call" and kernel.shape.startswith("("):
        return size(re.sub(r"\b[su]8\[\d*\]", "", kernel.shape))
    named = {one.name: one for one in inside}
    root = inside[-1] if inside else None
    results = root.operands if root is not None and root.opcode == "tuple" else [root.name] if root is not None else []
    total = size(kernel.shape)
    for result in results:
        one = named[result]
        while one.opcode == "bitcast" and one.operands[0] in named:
            one = named[one.operands[0]]
        if one.opcode == "dynamic-update-slice":
            total -= size(one.shape) - size(shapes[one.operands[1]])
    return total


def is_matmul(instruction: Instruction) -> bool:
    """Whether an instruction is a matmul: a `dot` or a call of cuBLAS."""
    return instruction.opcode == "dot" or bool(_MATMUL.search(instruction.target))


def matmul(program: Program, kernel: Instruction, shapes: dict[str, str]) -> tuple[int, ...]:
    """Batch, rows, columns and contracted size of the matmul in a kernel; () if it has none."""
    dot = next((one for one in program.inside(kernel) if is_matmul(one)), None)
    if dot is None:
        return ()
    pattern = r"%s_%s_dims=\{([^}]*)\}" if dot.opcode == "dot" else r'"%s_%s_dimensions":\[([^\]]*)\]'
    (_, left), (_, right) = (arrays(shapes[name])[0] for name in (dot.operands * 2)[:2])

    def extent(dims: tuple[int, ...], side: str, role: str) -> int:
        found = re.findall(r"\d+", dot.attribute(pattern % (side, role)))
        return math.prod(dims[int(dim)] for dim in found)

    batch, contracted = extent(left, "lhs", "batch"), extent(left, "lhs", "contracting")
    rows, columns = (math.prod(dims) // (batch * contracted) for dims in (left, right))
    return batch, rows, columns, contracted
