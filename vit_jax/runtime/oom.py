"""Out of memory: what was needed, and which options would make the training step fit."""

import contextlib
from collections.abc import Iterator

import jax
from ml_collections import ConfigDict

from vit_jax.errors import UserError
from vit_jax.models.summary import training_bytes
from vit_jax.models.vit import VisionTransformer
from vit_jax.runtime import memory

ADVISED_SHARE = 0.8  # of a device's memory that an advised configuration may need, because its need is an estimate


@contextlib.contextmanager
def explained(config: ConfigDict, model: VisionTransformer, image_shape: tuple[int, int, int]) -> Iterator[None]:
    """Turns an out-of-memory error of the compiler, the device or the host into a UserError with advice.

    Args:
        config: the run's config.
        model: the backbone with its head.
        image_shape: height, width and channels.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if not is_exhausted(error):
            raise
        raise UserError(_advice(config, model, image_shape)) from error


def bytes_needed(compiled: jax.stages.Compiled) -> int:
    """Returns the bytes of each device that a compiled program uses: arguments, results, temporaries and code."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return 0
    passed = analysis.argument_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return passed + analysis.temp_size_in_bytes + analysis.generated_code_size_in_bytes


def is_exhausted(error: Exception) -> bool:
    """Returns whether an error means that memory is exhausted."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)


def _advice(config: ConfigDict, model: VisionTransformer, image_shape: tuple[int, int, int]) -> str:
    train, devices = config.train, config.mesh.devices or jax.device_count()
    limit = memory.device_memory_limit(jax.local_devices()[0])

    def needed(accumulation: int) -> int:
        return _bytes(model, image_shape, train.batch_size // accumulation // devices)

    # Larger values than the present one that divide the batch: the first that fits, or else the largest.
    larger = range(train.accumulation + 1, train.batch_size + 1)
    allowed = [value for value in larger if not train.batch_size % (value * devices)]
    fitting = (value for value in allowed if not limit or needed(value) <= ADVISED_SHARE * limit)
    accumulation = next(fitting, allowed[-1] if allowed else None)
    ways = [] if accumulation is None else [f"--config.train.accumulation={accumulation}"]
    if not (model.remat and model.scan):
        ways.append("--config.model.remat=True --config.model.scan=True")
    same = f"  with the same batch size of {train.batch_size}: {', or '.join(ways)}\n" if ways else ""
    available = f" of {limit / 2**30:.1f} GiB" if limit else ""
    images = max(train.batch_size // train.accumulation // devices, 1)
    return (
        f"out of memory: a microbatch of {images} images per device needs about "
        f"{needed(train.accumulation) / 2**30:.1f} GiB{available}\n"
        f"{same}  or decrease config.train.batch_size"
    )


def _bytes(model: VisionTransformer, image_shape: tuple[int, int, int], batch_size: int) -> int:
    return sum(training_bytes(model, image_shape[:2], image_shape[2], max(batch_size, 1)).values())
