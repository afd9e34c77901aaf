"""When a device's memory is too small: what was asked of it, and what would fit."""

import contextlib
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from vit_jax.errors import UserError
from vit_jax.models.summary import training_bytes
from vit_jax.models.vit import VisionTransformer


@contextlib.contextmanager
def explained(
    config: ConfigDict, model: VisionTransformer, image_shape: tuple[int, int, int], seeds: int = 1
) -> Iterator[None]:
    """Turns the compiler's and the device's "out of memory" into a UserError that says the way out.

    Of several `seeds` that are trained at once, fewer are the way out.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not is_exhausted(error):
            raise
        advice = _advice(config, model, image_shape) if seeds == 1 else _fewer(seeds)
        raise UserError(advice) from error


def bytes_needed(compiled: jax.stages.Compiled) -> int:
    """Bytes of each device that a compiled program takes: what goes in, what comes out, and what it needs meanwhile."""
    memory = compiled.memory_analysis()
    if memory is None:
        return 0
    passed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return passed + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


def is_exhausted(error: Exception) -> bool:
    """Whether an error says that memory is too small."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)


def _fewer(seeds: int) -> str:
    return (
        f"out of memory: {seeds} seeds at once\n"
        f"  fewer of them at once need less: --config.train.seeds_at_once={seeds // 2}"
    )


def _advice(config: ConfigDict, model: VisionTransformer, image_shape: tuple[int, int, int]) -> str:
    train, devices = config.train, config.mesh.devices or jax.device_count()
    here = train.batch_size // train.accumulation // devices
    needed = _bytes(model, image_shape, max(here, 1))
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    room = f" of {limit / 2**30:.1f} GiB" if limit else ""
    # More parts than there are, that divide the batch; the first of them that fits, with some room to spare.
    allowed = [
        parts
        for parts in range(train.accumulation + 1, train.batch_size + 1)
        if not train.batch_size % (parts * devices)
    ]
    fits = lambda parts: _bytes(model, image_shape, train.batch_size // parts // devices) <= 0.8 * limit  # noqa: E731
    parts = next((parts for parts in allowed if not limit or fits(parts)), allowed[-1] if allowed else None)
    split = f"--config.train.accumulation={parts}" if parts else "no way"
    remat = "" if model.remat and model.scan else ", or --config.model.remat=True --config.model.scan=True"
    return (
        f"out of memory: {here} images at a time on each device need about {needed / 2**30:.1f} GiB{room}\n"
        f"  the same batch of {train.batch_size} in parts: {split}{remat}\n"
        "  or a smaller config.train.batch_size"
    )


def _bytes(model: VisionTransformer, image_shape: tuple[int, int, int], batch: int) -> int:
    return sum(training_bytes(model, image_shape[:2], image_shape[2], max(batch, 1)).values())
