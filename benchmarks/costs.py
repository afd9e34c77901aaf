"""The cost of the kernels of a compiled training step: their number, the bytes that they move, and their time."""

import collections
import dataclasses
import math
import re
from collections.abc import Sequence

import hlo
import traces
from devices import Device

ATTENTION_KERNEL = "attention kernel"

# Measured on an H200 (docs/performance.md, `matmul` and `attention` rows), as shares of its peak and bandwidth. That
# other devices reach the same shares is an assumption.
BANDWIDTH_SHARE = 4.0 / 4.8
# bfloat16 matmuls of a block, by their smallest dimension: share of the peak.
MATMUL = {384: 620 / 989, 768: 715 / 989}
# Attention kernels with heads of 64, by tokens: share of the peak, forward and backward, of the matmuls that they
# compute: two (scores, weighted sum) and five (scores again, four gradients). cuDNN's backward pass was not measured
# separately; with the rate of the forward pass, whole steps are predicted within 3 %. The Pallas kernels are those of
# revision 2335790; the time of the backward pass is that of both passes minus that of the forward pass.
FORWARD_MATMULS, BACKWARD_MATMULS = 2, 5
ATTENTION = {
    "cudnn": ({65: 33 / 989, 197: 95 / 989}, {65: 33 / 989, 197: 95 / 989}),
    "pallas": ({65: 64.5 / 989, 197: 91.4 / 989}, {65: 34.7 / 989, 197: 48.1 / 989}),
}


def at(table: dict[int, float], size: float) -> float:
    """The share at a size: interpolated linearly in the logarithm of the size; outside, that of the nearest size."""
    (low, first), (high, last) = sorted(table.items())
    position = math.log(size / low) / math.log(high / low)
    return first + (last - first) * min(1.0, max(0.0, position))


@dataclasses.dataclass
class Row:
    """The kernels of one kind: their number, bytes moved, and predicted milliseconds."""

    count: int = 0
    bytes: int = 0
    ms: float = 0.0


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel of the step.

    Attributes:
        kind: its group in the tables.
        origin: path in the model, and the type of the result.
        count: number of runs per step.
        bytes: read and written per run.
        flops: per run, of a matmul; 0 for others.
        smallest: the smallest dimension of a matmul.
    """

    kind: str
    origin: str
    count: int
    bytes: int
    flops: int
    smallest: int


def account(program: hlo.Program) -> list[Kernel]:
    """All kernels of one step."""
    shapes = {name: one.shape for name, one in program.named().items()}
    found = []
    for one, count in hlo.kernels(program, hlo.step_computation(program)):
        kind, path = group(program, one)
        dims = hlo.matmul(program, one, shapes)
        flops, smallest = (2 * math.prod(dims), min(dims[-3:])) if dims else (0, 0)
        origin = re.sub(r"block_\d+", "block_N", path) or re.sub(r"[.\d]+$", "", one.name)
        found.append(Kernel(kind, f"{origin} -> {one.shape}", count, hlo.moved(program, one, shapes), flops, smallest))
    return found


def group(program: hlo.Program, kernel: hlo.Instruction) -> tuple[str, str]:
    """The kind of a kernel, such as 'elementwise, norm, backward', and the path that determines it."""
    kind, path = traces.describe(program, kernel)
    passes = "backward" if "transpose(jvp" in path else "forward"
    if kind == "attention" and kernel.opcode == "custom-call" and not hlo.is_matmul(kernel):
        if "fmha" in kernel.target:
            passes = "backward" if "Backward" in kernel.target else "forward"
        elif "attention_forward" in path or "attention_backward" in path:
            passes = "forward" if "attention_forward" in path else "backward"
        return f"{ATTENTION_KERNEL}, {passes}", path
    if not path:
        return "elementwise, unnamed", path
    if kind == "elementwise":
        parts = path.split("/")
        prefixes = {"norm": "norm", "mlp": "MLP", "attention": "attention projections"}
        module = next(
            (shown for prefix, shown in prefixes.items() if any(part.startswith(prefix) for part in parts)), "other"
        )
        return f"elementwise, {module}, {passes}", path
    return (f"{kind}, {passes}" if kind in ("matmul", "attention") else kind), path


def price(kernels: list[Kernel], device: Device, peak: float, attention: dict[str, float]) -> dict[str, Row]:
    """Predicted cost of the kernels by kind, the most expensive first.

    Args:
        kernels: of the step.
        device: the GPU.
        peak: FLOP/s of the device.
        attention: milliseconds of all attention kernels by pass, 'forward' and 'backward'.
    """
    rows: dict[str, Row] = collections.defaultdict(Row)
    for one in kernels:
        seconds = one.bytes / (BANDWIDTH_SHARE * device.bandwidth)
        if one.flops:
            seconds = max(seconds, one.flops / (peak * at(MATMUL, one.smallest)))
        row = rows[one.kind]
        row.count += one.count
        row.bytes += one.count * one.bytes
        row.ms += 1e3 * one.count * seconds
    for passes, ms in attention.items():
        if (name := f"{ATTENTION_KERNEL}, {passes}") in rows:
            rows[name].ms = ms
    return dict(sorted(rows.items(), key=lambda item: -item[1].ms))


def attention_rates(kernel: str, tokens: int, peak: float) -> tuple[float, float]:
    """FLOP/s of an attention kernel, forward and backward, at a number of tokens.

    Attention that XLA compiles itself is not an attention kernel.
    """
    forward, backward = ATTENTION["pallas" if kernel.startswith("pallas") else "cudnn"]
    return peak * at(forward, tokens), peak * at(backward, tokens)


def attention_ms(matmul: int, rates: Sequence[float], runs: int, depth: int) -> dict[str, float]:
    """Milliseconds of all attention kernels of a step, by pass.

    Args:
        matmul: FLOPs of one of a block's matmuls, over all images and heads: 2 * batch * tokens^2 * width.
        rates: FLOP/s forward and backward.
        runs: number of forward kernels; more than the number of blocks if some are rematerialized.
        depth: number of blocks. The backward pass of a block counts once, for any number of kernels.
    """
    forward, backward = rates
    return {
        "forward": 1e3 * runs * FORWARD_MATMULS * matmul / forward,
        "backward": 1e3 * depth * BACKWARD_MATMULS * matmul / backward,
    }
