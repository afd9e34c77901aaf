"""Which attention backend a run uses: the fastest of those that are right on its device, at its own shapes.

On a CPU and a TPU there is one candidate. On a GPU each computes the attention layer forward and backward at these
shapes, is compared with plain attention in float32, and is timed; the result is kept in the user's cache folder.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import vit_jax
from vit_jax.errors import UserError
from vit_jax.models import attention_backends
from vit_jax.models.attention import Attention
from vit_jax.models.attention_backends import FALLBACK, Device, Shape
from vit_jax.models.positions import Terms
from vit_jax.training import parallel, state

AUTO = "auto"
MAX_TOKENS = 65_536  # of a batch that is timed: more take proportionally longer
TOLERANCE = {2: 0.03, 4: 0.01}  # relative error compared with float32, by bytes per number (GPUs multiply in TF32)
ROUNDS, SECONDS = 5, 0.03  # of timing, per candidate and shape
LIBRARIES = ("jax", "jaxlib", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")


# Why a backend was chosen, and how it is printed.
REASONS = {
    "config": "",
    "device": "",
    "run": "as the run began",
    "timed": "timed",
    "cached": "timed before",
    "fallback": "no candidate runs",
}


class Wrong(Exception):
    """A backend's numbers are not those of plain attention."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A backend, and why it was chosen.

    Attributes:
        backend: of `attention_backends.BACKENDS`.
        reason: of `REASONS`: 'config' (asked for by name), 'run' (as the run began), 'device' (the only one), 'timed',
            'cached' (timed by an earlier command), or 'fallback' (no candidate runs).
        milliseconds: of the attention layers of all shapes, by candidate.
        failures: why the other candidates were left out.
    """

    backend: str
    reason: str
    milliseconds: dict[str, float] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)

    def describe(self) -> str:
        """'cudnn (timed: cudnn 1.20 ms, plain 4.57 ms; pallas failed: ...)'; the name alone where nothing was timed."""
        times = ", ".join(f"{name} {value:.2f} ms" for name, value in sorted(self.milliseconds.items(), key=_time))
        said = ": ".join(filter(None, [REASONS[self.reason], times]))
        failed = [f"{name} failed: {reason}" for name, reason in self.failures.items()]
        details = "; ".join(filter(None, [said, *failed]))
        return f"{self.backend} ({details})" if details else self.backend


def _time(item: tuple[str, float]) -> float:
    return item[1]


def resolve(
    wanted: str,
    shapes: Sequence[Shape],
    device: Any,
    *,
    training: bool = True,
    recorded: str | None = None,
) -> Choice:
    """The backend for calls of attention of these shapes. In a cluster all processes must call this; one decides.

    Args:
        wanted: `config.model.attention_kernel`: a backend's name or 'auto'.
        shapes: of all calls (see `recorded_shapes`), with the batch of one device.
        device: a `jax.Device`, where they run.
        training: whether gradients are taken.
        recorded: what the run began with, which it keeps where it can: other backends round otherwise.

    Raises:
        UserError: a backend was asked for by name, and cannot compute these shapes there.
    """
    kind = Device.of(device)
    able = attention_backends.candidates(kind, shapes)
    if wanted != AUTO:
        for shape in shapes:
            if reason := attention_backends.obstacle(wanted, kind, shape):
                allowed = ", ".join(repr(name) for name in [AUTO, *able])
                raise UserError(f"config.model.attention_kernel is {wanted!r}: {reason}\n  allowed here: {allowed}")
        return Choice(wanted, "config")
    if recorded in able:
        return Choice(recorded, "run")
    if len(able) == 1 or not shapes:
        return Choice(able[0], "device")
    decided = parallel.by_main(lambda: dataclasses.asdict(_cached(able, shapes, device, training)))
    return Choice(**decided)


def resolve_for(
    module: nn.Module, image_shape: tuple[int, int, int], batch: int, wanted: str = AUTO, training: bool = True
) -> Choice:
    """`resolve` for a module called with `batch` images of (height, width, channels) on this process's first device."""
    with recorded_shapes() as calls:
        jax.eval_shape(lambda: state.initialize(module, image_shape, 0))
    shapes = [dataclasses.replace(shape, batch=batch) for shape in calls]
    return resolve(wanted, shapes, jax.local_devices()[0], training=training)


@contextlib.contextmanager
def recorded_shapes() -> Iterator[dict[Shape, None]]:
    """Collects, as keys, the shapes of the calls of attention that are traced inside; nothing more is computed."""
    found: dict[Shape, None] = {}

    def note(call: Callable, arguments: tuple, keywords: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
        if isinstance(context.module, Attention) and context.method_name == "__call__":
            found[context.module.shape(*arguments, **keywords)] = None
        return call(*arguments, **keywords)

    with nn.intercept_methods(note):
        yield found


def choose(names: Sequence[str], shapes: Sequence[Shape], measure: Callable[[str, Shape], float]) -> Choice:
    """The candidate with the smallest sum of `measure` over the shapes; one for which it raises is left out."""
    milliseconds, failures = {}, {}
    for name in names:
        try:
            milliseconds[name] = round(sum(1e3 * measure(name, shape) for shape in shapes), 4)
        except Exception as error:  # whatever a compiler, library or driver raises: the next candidate may work
            failures[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    if not milliseconds:
        return Choice(FALLBACK, "fallback", {}, failures)
    return Choice(min(milliseconds.items(), key=_time)[0], "timed", milliseconds, failures)


def _cached(names: Sequence[str], shapes: Sequence[Shape], device: Any, training: bool) -> Choice:
    versions = {name: _version(name) for name in LIBRARIES} | {"vit_jax": vit_jax.__version__}
    about = [device.device_kind, versions, [dataclasses.asdict(shape) for shape in shapes], list(names), training]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = parallel.cache_folder() / "attention" / f"{digest}.json"
    try:
        known = Choice(**json.loads(path.read_text()))
        if known.backend in names:
            return dataclasses.replace(known, reason="cached")
    except (OSError, ValueError, TypeError):
        pass  # none yet, or not readable: it is timed
    found = choose(names, shapes, functools.partial(measure, device=device, training=training))
    if found.milliseconds:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            scratch = path.with_suffix(f".{os.getpid()}")
            scratch.write_text(json.dumps(dataclasses.asdict(found)))
            os.replace(scratch, path)
        except OSError:
            pass  # a cache that cannot be written to costs the next command the timing
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def measure(name: str, shape: Shape, device: Any, training: bool = True) -> float:
    """Seconds of one attention layer by a backend, its projections included, after comparing it with float32.

    Raises:
        Wrong: it computes something else.
    """
    shape = dataclasses.replace(shape, batch=max(1, min(shape.batch, MAX_TOKENS // shape.tokens)))
    with jax.default_device(device):
        layer, arguments = _layer(name, shape), _arguments(shape)
        run = jax.jit(functools.partial(_passes, layer, training))
        results = jax.block_until_ready(run(*arguments))
        _compare(results, shape, arguments, training)
        return _seconds(lambda: run(*arguments))


def _layer(name: str, shape: Shape, dtype: str | None = None) -> Attention:
    return Attention(shape.heads, dtype=jnp.dtype(dtype or shape.dtype), qk_norm=shape.transformed, kernel=name)


def _arguments(shape: Shape) -> tuple[Any, ...]:
    """Parameters, tokens, the direction of the gradient, and the bias (or None), drawn at random."""
    width, draw = shape.heads * shape.size, np.random.default_rng(0)
    tokens, direction = (
        jnp.asarray(draw.standard_normal((shape.batch, shape.tokens, width), np.float32)).astype(shape.dtype)
        for _ in range(2)
    )
    bias = draw.standard_normal((1, shape.heads, shape.tokens, shape.tokens), np.float32) if shape.bias else None
    parameters = _layer(FALLBACK, shape).init(jax.random.key(0), tokens[:1])["params"]
    return parameters, tokens, direction, None if bias is None else jnp.asarray(bias)


def _passes(layer: Attention, training: bool, parameters: Any, tokens: Any, direction: Any, bias: Any) -> tuple:
    """The layer's outputs, and with `training` the gradients of the tokens and of the rest."""

    def apply(parameters: Any, tokens: jax.Array, bias: jax.Array | None) -> jax.Array:
        return layer.apply({"params": parameters}, tokens, positions=Terms(bias=bias))

    if not training:
        return (apply(parameters, tokens, bias),)
    outputs, pull = jax.vjp(apply, parameters, tokens, bias)
    of_parameters, of_tokens, of_bias = pull(direction.astype(outputs.dtype))
    return outputs, of_tokens, of_parameters, of_bias


def _compare(results: tuple, shape: Shape, arguments: tuple, training: bool) -> None:
    """Against plain attention in float32, on the first two examples: their values and gradients are their own."""
    parameters, tokens, direction, bias = arguments
    few = [array[:2].astype(jnp.float32) for array in (tokens, direction)]
    with jax.default_matmul_precision("highest"):
        wanted = jax.jit(functools.partial(_passes, _layer(FALLBACK, shape, "float32"), training))(
            parameters, *few, bias
        )
    for what, one, other in zip(("outputs", "gradients"), results[:2], wanted[:2], strict=False):
        one, other = np.asarray(one[:2], np.float64), np.asarray(other, np.float64)
        error = np.linalg.norm(one - other) / np.linalg.norm(other)
        if not error <= TOLERANCE[jnp.dtype(shape.dtype).itemsize]:
            raise Wrong(f"the {what} are off by {error:.2g} (relative norm)")
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(results)):
        raise Wrong("some numbers are not finite")


def _seconds(run: Callable[[], Any]) -> float:
    """The median of several rounds; calls of a round follow each other without waiting."""

    def round_of(count: int) -> float:
        began = time.perf_counter()
        for _ in range(count):
            results = run()
        jax.block_until_ready(results)
        return (time.perf_counter() - began) / count

    count = max(1, int(SECONDS / ROUNDS / max(round_of(2), 1e-6)))
    return statistics.median(round_of(count) for _ in range(ROUNDS))
