"""Chooses the attention backend of a run: the fastest that is correct on its device, for its own shapes.

CPUs and TPUs have one candidate. On a GPU each candidate is timed (`attention_timing`), and the result is kept in the
user's cache directory.
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
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import vit_jax
from vit_jax import atomic, paths, terminal
from vit_jax.errors import UserError, one_line
from vit_jax.models import attention_backends
from vit_jax.models.attention import Attention
from vit_jax.models.attention_backends import BACKENDS, FALLBACK, Device, Shape
from vit_jax.models.encoder import Encoder
from vit_jax.runtime.attention_timing import Probe
from vit_jax.sharding import multihost

AUTO = "auto"
LIBRARIES = ("jax", "jaxlib", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
PERMANENT = ("NotImplementedError", "IncorrectBackend")  # failures that another attempt would repeat
# Why a backend was chosen, and the text that is printed for it.
REASONS = {
    "config": "",
    "device": "",
    "run": "as when the run started",
    "timed": "timed",
    "cached": "timed earlier",
    "fallback": "no candidate works",
    "dropout": "in evaluation; in training, attention dropout is computed without a backend",
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """A backend and the reason for it.

    Attributes:
        backend: of `attention_backends.BACKENDS`.
        reason: one of `REASONS`: 'config' (named by the config), 'run' (as when the run started), 'device' (the only
            candidate), 'timed', 'cached' (timed by an earlier command), 'fallback' (no candidate works), or 'dropout'
            (attention dropout, which no backend supports).
        milliseconds: time of all attention layers together, by candidate.
        failures: error of each candidate that failed, by name.
        device: device kind for which it was chosen.
    """

    backend: str
    reason: str
    milliseconds: dict[str, float] = dataclasses.field(default_factory=dict)
    failures: dict[str, str] = dataclasses.field(default_factory=dict)
    device: str | None = None

    def describe(self) -> str:
        """Returns text such as 'cudnn (timed: cudnn 1.20 ms, plain 4.57 ms; pallas failed: ...)'."""
        times = ", ".join(f"{name} {value:.2f} ms" for name, value in sorted(self.milliseconds.items(), key=_time))
        timed = ": ".join(filter(None, [REASONS[self.reason], times]))
        failed = [f"{name} failed: {reason}" for name, reason in self.failures.items()]
        details = "; ".join(filter(None, [timed, *failed]))
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
    """Returns the backend for attention calls of these shapes. All processes of a cluster must call this together.

    Args:
        wanted: `config.model.attention_kernel`: a backend's name or 'auto'.
        shapes: number of calls by shape (see `recorded_shapes`), with the batch size of one device.
        device: the `jax.Device` of the calls.
        training: whether gradients are computed. If not, a backend named by the config that does not work here is
            replaced: a model may be evaluated on another machine than it was trained on.
        recorded: the choice with which the run started. It is kept on the same kind of device, because backends differ
            in rounding.

    Raises:
        UserError: the config names a backend that cannot compute these shapes on this device.
    """
    kind, device_kind = Device.of(device), device.device_kind
    if wanted != AUTO:
        reason = next(filter(None, (attention_backends.obstacle(wanted, kind, shape) for shape in shapes)), None)
        if reason is None:
            return Choice(wanted, "config", device=device_kind)
        if training:
            usable = [name for name in BACKENDS if not any(attention_backends.obstacle(name, kind, s) for s in shapes)]
            allowed = ", ".join(repr(name) for name in [AUTO, *usable])
            raise UserError(f"config.model.attention_kernel is {wanted!r}: {reason}\n  allowed here: {allowed}")
    working = attention_backends.candidates(kind, shapes)
    keep = recorded is not None and recorded.device == device_kind and recorded.reason not in ("config", "fallback")
    if keep and recorded.backend in working:
        return dataclasses.replace(recorded, reason="run")
    if training and any(shape.dropout for shape in shapes):
        return Choice(attention_backends.default(kind.platform), "dropout", device=device_kind)
    if len(working) == 1 or not shapes:
        return Choice(working[0], "device", device=device_kind)
    return Choice(**multihost.on_rank_0(lambda: dataclasses.asdict(_cached(working, shapes, device, training))))


def resolve_for(
    module: nn.Module, image_shape: tuple[int, int, int], batch: int, wanted: str = AUTO, training: bool = True
) -> Choice:
    """Returns `resolve` for a module that is called with `batch` images on this process's first device.

    Args:
        module: its own backend must be one that works on any device (`attention_backends.default`).
        image_shape: height, width and channels.
        batch: number of images per call.
        wanted: as for `resolve`.
        training: as for `resolve`.
    """
    with recorded_shapes() as calls:
        jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, *image_shape))))
    return resolve(wanted, with_batch(calls, batch), jax.local_devices()[0], training=training)


def with_batch(calls: Mapping[Shape, int], batch: int) -> dict[Shape, int]:
    """Returns the same calls with another batch size."""
    return {dataclasses.replace(shape, batch=batch): count for shape, count in calls.items()}


@contextlib.contextmanager
def recorded_shapes() -> Iterator[Mapping[Shape, int]]:
    """Counts the attention calls that are traced within the context, by shape."""
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
        if module.scan:  # its block is traced a few times in place of `depth` blocks
            found.update({shape: before[shape] + module.depth - found[shape] for shape in found - before})
        return results

    with nn.intercept_methods(note):
        yield found


def choose(names: list[str], shapes: Mapping[Shape, int], seconds: Callable[[str, Shape], float]) -> Choice:
    """Returns the candidate whose calls take the least time in total; one for which `seconds` raises is left out."""
    milliseconds, failures = {}, {}
    for name in names:
        try:
            times = [1e3 * count * seconds(name, shape) for shape, count in shapes.items()]
            milliseconds[name] = round(sum(times), 4)
        except Exception as error:  # whatever a compiler, library or driver raises: the next candidate may work
            failures[name] = one_line(f"{type(error).__name__}: {error}")
    if not milliseconds:
        return Choice(FALLBACK, "fallback", {}, failures)
    return Choice(min(milliseconds.items(), key=_time)[0], "timed", milliseconds, failures)


def _cached(names: list[str], shapes: Mapping[Shape, int], device: Any, training: bool) -> Choice:
    """Returns the choice of an earlier command on such a device, or a new one, which is saved for later commands."""
    versions = {name: _version(name) for name in LIBRARIES} | {"vit_jax": vit_jax.__version__}
    versions |= {"runtime": getattr(device.client, "platform_version", None), "flags": os.environ.get("XLA_FLAGS")}
    calls = [[dataclasses.asdict(shape), count] for shape, count in shapes.items()]
    key = atomic.to_json([device.device_kind, versions, calls, names, training], sort_keys=True)
    path = paths.cache_dir() / "attention" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    try:
        saved = Choice(**json.loads(path.read_text()))
        if saved.backend in names:
            return dataclasses.replace(saved, reason="cached")
    except (OSError, ValueError, TypeError):
        pass  # missing or damaged: timed again
    terminal.say(f"timing the attention backends {', '.join(names)} (once; saved in {path.parent}) ...")

    @functools.cache
    def probe(shape: Shape) -> Probe:
        return Probe(shape, device, training)

    choice = choose(names, shapes, lambda name, shape: probe(shape).seconds(name))
    choice = dataclasses.replace(choice, device=device.device_kind)
    if choice.milliseconds and all(reason.startswith(PERMANENT) for reason in choice.failures.values()):
        _save(path, choice)
    return choice


def _save(path: Path, choice: Choice) -> None:
    with contextlib.suppress(OSError):  # without a cache the next command times again
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_json(path, dataclasses.asdict(choice))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
