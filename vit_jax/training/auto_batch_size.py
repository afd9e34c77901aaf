"""`config.train.batch_size=auto`: the largest batch that fits, according to the compiler's memory plan."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vit_jax import config as options
from vit_jax import terminal
from vit_jax.data.pipeline import Pipeline
from vit_jax.errors import UserError
from vit_jax.models.summary import training_bytes
from vit_jax.runtime import memory, oom
from vit_jax.training import run_directory, setup
from vit_jax.training.setup import Experiment
from vit_jax.training.step import make_update

AUTO = "auto"
TIMED_EXAMPLES = 64  # minimum per device, for timing attention backends while the batch size is not known yet


def recorded(config: ConfigDict, workdir: Path) -> ConfigDict:
    """Returns the config with the batch size of the run in `workdir` in place of 'auto', if there is such a run.

    A run that is resumed, perhaps on another machine, keeps its batch size.
    """
    old = run_directory.recorded_config(workdir) if config.train.batch_size == AUTO else None
    if old is not None:
        config = options.from_dict(config.to_dict())
        config.train.batch_size = old["train"]["batch_size"]
    return config


def resolve(config: ConfigDict, workdir: Path, mesh: Mesh) -> ConfigDict:
    """Returns the config with a number in place of 'auto'; a config that has a number is returned as it is.

    The number is that of the run in `workdir`, or else the largest that fits.

    Raises:
        UserError: the device does not report its memory, there are several processes, or no batch size fits.
    """
    config = recorded(config, workdir)
    if config.train.batch_size != AUTO:
        return config
    config = options.from_dict(config.to_dict())
    limit = memory.device_memory_limit(mesh.devices.flat[0])
    if limit is None or jax.process_count() > 1:
        where = "a cluster" if limit is not None else f"a {mesh.devices.flat[0].platform.upper()}"
        raise UserError(f"config.train.batch_size is {AUTO!r}, on {where}\n  allowed: an integer of at least 1")
    config.train.batch_size = TIMED_EXAMPLES * batch_multiple(config, mesh)  # for choosing the attention backend
    config.train.batch_size = find(setup.assemble(config, mesh, setup.load_sources(config)), memory.SHARE * limit)
    return config


def batch_multiple(config: ConfigDict, mesh: Mesh) -> int:
    """Returns the number of which every batch size is a multiple: devices, microbatches and repeats divide it."""
    return math.lcm(mesh.size * config.train.accumulation, config.augment.repeats)


def find(run: Experiment, available: float) -> int:
    """Returns the largest batch size whose training step fits into `available` bytes per device.

    The resident evaluation data counts too.

    Raises:
        UserError: no batch size fits.
    """
    feeds = run.pipelines.make_all()
    evaluated = [feed.resident for role, feed in feeds.items() if role != "train"]
    others = sum(leaf.nbytes for leaf in jax.tree.leaves(evaluated))
    multiple = batch_multiple(run.config, run.mesh)
    shape, parts = run.image_shape, run.mesh.size * run.config.train.accumulation

    def is_likely(size: int) -> bool:
        return sum(training_bytes(run.model, shape[:2], shape[2], -(-size // parts)).values()) + others <= available

    def fits(size: int) -> bool:
        try:
            return planned_bytes(run, feeds["train"], size) + others <= available
        except jax.errors.JaxRuntimeError as error:
            if oom.is_exhausted(error):
                return False
            raise

    terminal.say("config.train.batch_size: searching for the largest that fits ...")
    found = largest(fits, candidate_sizes(multiple, max(multiple, len(run.sources["train"]))), is_likely)
    if found is None:
        raise UserError(
            f"config.train.batch_size is {AUTO!r}: {multiple} images do not fit into {available / 2**30:.1f} GiB\n"
            "  use a smaller model or image size, or --config.model.remat=full --config.model.scan=True"
        )
    terminal.say(f"config.train.batch_size: {found:,}")
    return found


def candidate_sizes(multiple: int, max_size: int) -> list[int]:
    """Returns the batch sizes to try: `multiple` times 1, 2, 3, 4, 6, 8, 12, ..., up to `max_size`."""
    powers = (2**k for k in itertools.count())
    sizes = (multiple * size for power in powers for size in ([power] if power == 1 else [power, power * 3 // 2]))
    return list(itertools.takewhile(lambda size: size <= max_size, sizes))


def largest(fits: Callable[[int], bool], sizes: list[int], is_likely: Callable[[int], bool]) -> int | None:
    """Returns the largest of the ascending sizes that fits, or None; every size below one that fits must fit too.

    `fits` compiles a program and is called once per size. The search starts at the largest size that `is_likely`, an
    estimate, accepts, and proceeds one size at a time.
    """
    index = sum(1 for _ in itertools.takewhile(is_likely, sizes[1:]))
    if fits(sizes[index]):
        while index + 1 < len(sizes) and fits(sizes[index + 1]):
            index += 1
        return sizes[index]
    while index and not fits(sizes[index - 1]):
        index -= 1
    return sizes[index - 1] if index else None


def planned_bytes(run: Experiment, feeds: Pipeline, batch_size: int) -> int:
    """Returns the bytes per device that the compiled training step needs, training data and state included."""
    update = make_update(run)
    feed = feeds.abstract_feed(feeds.rows(batch_size, run.config.train.steps_per_dispatch), batch_size)
    return oom.bytes_needed(update.lower(run.abstract_state(), feed, np.int32(0), np.int32(0)).compile())
