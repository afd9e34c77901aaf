"""`config.train.batch_size=auto`: the largest batch that fits, by the compiler's own plan of the device's memory."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import config as options
from vit_jax.data.pipeline import Pipeline
from vit_jax.errors import UserError
from vit_jax.models.summary import training_bytes
from vit_jax.runtime import oom
from vit_jax.training import run_directory, setup
from vit_jax.training.setup import Run
from vit_jax.training.step import make_update

AUTO = "auto"
# Of what a device says that it has; the rest is for evaluation, and for what lies between the buffers.
SHARE = 0.9
TIMED = 64  # examples per device, at least, with which attention backends are timed before the size is known


def resolve(config: ConfigDict, folder: Path, mesh: Mesh) -> ConfigDict:
    """The config with a number in place of 'auto': the one that the folder's run has, or the largest that fits.

    A config with a number is returned as it is. The number goes into config.json, so that a run that goes on, elsewhere
    perhaps, keeps it.

    Raises:
        UserError: the device does not say how much memory it has, there are several processes, or nothing fits.
    """
    if config.train.batch_size != AUTO:
        return config
    config = options.from_dict(config.to_dict())
    old = run_directory.read_config(folder) if run_directory.has_begun(folder) else None
    if old is not None:
        config.train.batch_size = old["train"]["batch_size"]
        return config
    room = limit(mesh)
    if room is None or jax.process_count() > 1:
        where = "a cluster" if room is not None else f"a {mesh.devices.flat[0].platform.upper()}"
        raise UserError(f"config.train.batch_size is {AUTO!r}, on {where}\n  allowed there: a whole number")
    config.train.batch_size = TIMED * unit(config, mesh)  # by which the attention backend is chosen
    config.train.batch_size = find(setup.build(config, mesh), SHARE * room)
    return config


def limit(mesh: Mesh) -> int | None:
    """Bytes that one device has for this process; None where it does not say."""
    return (mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit")


def unit(config: ConfigDict, mesh: Mesh) -> int:
    """What every batch is a multiple of: devices and microbatches share it evenly, and repeats fill it."""
    return math.lcm(mesh.size * config.train.accumulation, config.augment.repeats)


def find(run: Run, room: float) -> int:
    """The largest batch size whose training step fits into `room` bytes a device, beside the sets that lie there.

    Raises:
        UserError: none does.
    """
    feeds = {role: run.feeds(role) for role in run.sources}
    evaluated = [feed.resident for role, feed in feeds.items() if role != "train"]
    others = sum(leaf.nbytes for leaf in jax.tree.leaves(evaluated))
    step = unit(run.config, run.mesh)
    shape, parts = run.image_shape, run.mesh.size * run.config.train.accumulation

    def estimated(size: int) -> bool:
        return sum(training_bytes(run.model, shape[:2], shape[2], -(-size // parts)).values()) + others <= room

    def fits(size: int) -> bool:
        try:
            return planned_bytes(run, feeds["train"], size) + others <= room
        except jax.errors.JaxRuntimeError as error:
            if oom.is_exhausted(error):
                return False
            raise

    print("config.train.batch_size: looking for the largest that fits ...", flush=True)
    found = largest(fits, ladder(step, max(step, len(run.sources["train"]))), estimated)
    if found is None:
        raise UserError(
            f"config.train.batch_size is {AUTO!r}, and not even {step} images fit into {room / 2**30:.1f} GiB\n"
            "  a smaller model, a smaller image, or --config.model.remat=full --config.model.scan=True"
        )
    print(f"config.train.batch_size: {found:,}", flush=True)
    return found


def ladder(step: int, most: int) -> list[int]:
    """The batch sizes that are tried: `step` times 1, 2, 3, 4, 6, 8, 12, ..., up to `most`."""
    powers = (2**k for k in itertools.count())
    sizes = (step * size for power in powers for size in ([power] if power == 1 else [power, power * 3 // 2]))
    return list(itertools.takewhile(lambda size: size <= most, sizes))


def largest(fits: Callable[[int], bool], sizes: list[int], likely: Callable[[int], bool]) -> int | None:
    """The largest of the ascending sizes that fits, or None, given that what is smaller than one that fits does too.

    The search starts where `likely` ends, which costs nothing to ask, and goes from there step by step.
    """
    place = sum(1 for _ in itertools.takewhile(likely, sizes[1:]))
    if fits(sizes[place]):
        while place + 1 < len(sizes) and fits(sizes[place + 1]):
            place += 1
        return sizes[place]
    while place and not fits(sizes[place - 1]):
        place -= 1
    return sizes[place - 1] if place else None


def planned_bytes(run: Run, feeds: Pipeline, size: int) -> int:
    """What one device needs for the training step with batches of `size`: state, data and all that lies between.

    It compiles the step, and reads the compiler's plan.
    """
    update = make_update(run.applied, run.optimizer, run.augment, run.config, run.mesh, run.mask)
    feed = feeds.abstract_feed(feeds.rows(size, run.config.train.steps_per_dispatch), size)
    return oom.bytes_needed(update.lower(run.abstract_state(), feed, np.int32(0)).compile())
