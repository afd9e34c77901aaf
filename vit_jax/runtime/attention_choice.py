"""Which attention backend a run uses: the fastest of those that are right on its device, at its own shapes.

On a CPU and a TPU there is one candidate. On a GPU each is measured (`attention_timing`); the result is kept in the
user's cache folder.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from typing import Any

import flax.linen as nn
import jax

import vit_jax
from vit_jax.errors import UserError
from vit_jax.models import attention_backends
from vit_jax.models.attention import Attention
from vit_jax.models.attention_backends import BACKENDS, FALLBACK, Device, Shape
from vit_jax.models.encoder import Encoder
from vit_jax.runtime import compilation_cache
from vit_jax.runtime.attention_timing import Probe
from vit_jax.sharding import multihost
from vit_jax.training import state

AUTO = "auto"
LIBRARIES = ("jax", "jaxlib", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
LASTING = ("NotImplementedError", "Wrong")  # failures that another attempt would meet again
# Why a backend was chosen, and how it is printed.
REASONS = {
    "config": "",
    "device": "",
    "run": "as the run began",
    "timed": "timed",
    "cached": "timed before",
    "fallback": "no candidate runs",
    "dropout": "in evaluation; training computes attention dropout step by step",
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """A backend, and why it was chosen.

    Attributes:
        backend: of `attention_backends.BACKENDS`.
        reason: of `REASONS`: 'config' (asked for by name), 'run' (as the run began), 'device' (the only one), 'timed',
            'cached' (timed by an earlier command), 'fallback' (no candidate runs), or 'dropout' (attention dropout,
            which no backend has).
        milliseconds: of all attention layers together, by candidate.
        failures: why the other candidates were left out.
        device: kind of the device that it was chosen for.
    """

    backend: str
    reason: str
    milliseconds: dict[str, float] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    device: str | None = None

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
    shapes: Mapping[Shape, int],
    device: Any,
    *,
    training: bool = True,
    recorded: Choice | None = None,
) -> Choice:
    """The backend for calls of attention of these shapes. In a cluster all processes must call this; one decides.

    Args:
        wanted: `config.model.attention_kernel`: a backend's name or 'auto'.
        shapes: the number of calls of each shape (see `recorded_shapes`), with the batch of one device.
        device: a `jax.Device`, where they run.
        training: whether gradients are taken. Where they are not, a backend that is named and cannot run is no error:
            a model may be evaluated on another machine than it was trained on.
        recorded: the choice with which the run began. On the same kind of device it is kept, since other backends round
            differently.

    Raises:
        UserError: a backend was asked for by name, and cannot compute these shapes there.
    """
    kind, here = Device.of(device), device.device_kind
    if wanted != AUTO:
        reason = next(filter(None, (attention_backends.obstacle(wanted, kind, shape) for shape in shapes)), None)
        if reason is None:
            return Choice(wanted, "config", device=here)
        if training:
            usable = [name for name in BACKENDS if not any(attention_backends.obstacle(name, kind, s) for s in shapes)]
            allowed = ", ".join(repr(name) for name in [AUTO, *usable])
            raise UserError(f"config.model.attention_kernel is {wanted!r}: {reason}\n  allowed here: {allowed}")
    able = attention_backends.candidates(kind, shapes)
    kept = recorded is not None and recorded.device == here and recorded.reason not in ("config", "fallback")
    if kept and recorded.backend in able:
        return dataclasses.replace(recorded, reason="run")
    if training and any(shape.dropout for shape in shapes):
        return Choice(attention_backends.default(kind.platform), "dropout", device=here)
    if len(able) == 1 or not shapes:
        return Choice(able[0], "device", device=here)
    return Choice(**multihost.on_rank_0(lambda: dataclasses.asdict(_cached(able, shapes, device, training))))


def resolve_for(
    module: nn.Module, image_shape: tuple[int, int, int], batch: int, wanted: str = AUTO, training: bool = True
) -> Choice:
    """`resolve` for a module called with `batch` images of (height, width, channels) on this process's first device.

    The module's own backend must be one that runs anywhere, as `model.build` makes it.
    """
    with recorded_shapes() as calls:
        jax.eval_shape(lambda: state.initialize(module, image_shape, 0))
    return resolve(wanted, with_batch(calls, batch), jax.local_devices()[0], training=training)


def with_batch(calls: Mapping[Shape, int], batch: int, **changes: Any) -> dict[Shape, int]:
    """The same calls with another batch, and with other fields of `Shape` where they are given."""
    return {dataclasses.replace(shape, batch=batch, **changes): count for shape, count in calls.items()}


@contextlib.contextmanager
def recorded_shapes() -> Iterator[Mapping[Shape, int]]:
    """Counts the calls of attention that are traced inside, by shape; nothing more is computed."""
    found: collections.Counter[Shape] = collections.Counter()

    def note(call: Callable, arguments: tuple, keywords: dict[str, Any], context: nn.module.InterceptorContext) -> Any:
        module = context.module
        if context.method_name != "__call__" or not isinstance(module, Attention | Encoder):
            return call(*arguments, **keywords)
        if isinstance(module, Attention):
            found[module.shape(*arguments, **keywords)] += 1
            return call(*arguments, **keywords)
        before = found.copy()
        results = call(*arguments, **keywords)
        if module.scan:  # its block is traced a few times, and stands for all of them
            found.update({shape: before[shape] + module.depth - found[shape] for shape in found - before})
        return results

    with nn.intercept_methods(note):
        yield found


def choose(names: list[str], shapes: Mapping[Shape, int], seconds: Callable[[str, Shape], float]) -> Choice:
    """The candidate whose calls take the least time together; one for which `seconds` raises is left out."""
    milliseconds, failures = {}, {}
    for name in names:
        try:
            times = [1e3 * count * seconds(name, shape) for shape, count in shapes.items()]
            milliseconds[name] = round(sum(times), 4)
        except Exception as error:  # whatever a compiler, library or driver raises: the next candidate may work
            failures[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
    if not milliseconds:
        return Choice(FALLBACK, "fallback", {}, failures)
    return Choice(min(milliseconds.items(), key=_time)[0], "timed", milliseconds, failures)


def _cached(names: list[str], shapes: Mapping[Shape, int], device: Any, training: bool) -> Choice:
    """The choice of an earlier command on such a device, or a new one, which is kept for later commands."""
    versions = {name: _version(name) for name in LIBRARIES} | {"vit_jax": vit_jax.__version__}
    versions |= {"runtime": getattr(device.client, "platform_version", None), "flags": os.environ.get("XLA_FLAGS")}
    calls = [[dataclasses.asdict(shape), count] for shape, count in shapes.items()]
    about = json.dumps([device.device_kind, versions, calls, names, training], sort_keys=True)
    path = compilation_cache.cache_folder() / "attention" / f"{hashlib.sha256(about.encode()).hexdigest()[:16]}.json"
    try:
        known = Choice(**json.loads(path.read_text()))
        if known.backend in names:
            return dataclasses.replace(known, reason="cached")
    except (OSError, ValueError, TypeError):
        pass  # none yet, or not readable: it is timed
    print(f"timing the attention backends {', '.join(names)} (once; kept in {path.parent}) ...", flush=True)
    probe = functools.cache(lambda shape: Probe(shape, device, training))
    found = choose(names, shapes, lambda name, shape: probe(shape).seconds(name))
    found = dataclasses.replace(found, device=device.device_kind)
    if found.milliseconds and all(reason.startswith(LASTING) for reason in found.failures.values()):
        _keep(path, found)
    return found


def _keep(path: Any, choice: Choice) -> None:
    scratch = path.with_suffix(f".{os.getpid()}")
    with contextlib.suppress(OSError):  # a cache that cannot be written to costs the next command the timing
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(json.dumps(dataclasses.asdict(choice)))
        os.replace(scratch, path)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
