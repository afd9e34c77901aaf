"""The mesh of devices, how arrays lie on it, and the processes that share it."""

import hashlib
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vit_jax.errors import UserError
from vit_jax.training import hardware


def initialize(distributed: bool) -> None:
    """Joins the other processes of the cluster, where asked to; before any device is touched.

    Slurm, Open MPI, Kubernetes and Cloud TPUs tell JAX all that it needs. Elsewhere three variables of the environment
    do: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
        UserError: the cluster cannot be found out.
    """
    if not distributed or jax.distributed.is_initialized():
        return
    given = {name: os.environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
    try:
        jax.distributed.initialize(**{name: int(value) for name, value in given.items() if value})
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"config.mesh.distributed is True, but no cluster is found: {str(error).splitlines()[0]}\n"
            "  allowed: under Slurm, Open MPI, Kubernetes or on Cloud TPUs; else set JAX_COORDINATOR_ADDRESS,\n"
            "  JAX_NUM_PROCESSES and JAX_PROCESS_ID for each process"
        ) from error


def make_mesh(devices: int | None) -> Mesh:
    """A mesh of one axis, 'data', over so many devices, or all.

    Raises:
        UserError: there are not so many.
    """
    present = jax.devices()
    if devices is not None and devices > len(present):
        raise UserError(f"config.mesh.devices is {devices}\n  allowed: 1 to {len(present)}, or None for all")
    count = devices or len(present)
    # Automatic axes: XLA places the collectives; `make_mesh` would make explicit ones by default.
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=present[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def spread(mesh: Mesh) -> NamedSharding:
    """The first axis divided among the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


def is_main() -> bool:
    """Whether this process writes the records; of several, one does."""
    return jax.process_index() == 0


def by_main(act: Callable[[], Any]) -> Any:
    """Lets one process of a cluster decide: what `act` returns there, in all of them; all must call this together.

    What depends on files, clocks or signals may look different from each host, and a process that goes another way
    than the others leaves them waiting for ever.

    Args:
        act: is called in the main process alone; what it returns goes through JSON in a cluster.

    Raises:
        UserError: `act` has raised it; in all processes.
    """
    if jax.process_count() == 1:
        return act()
    said: dict[str, Any] = {}
    if is_main():
        try:
            said["value"] = act()
        except UserError as error:
            said["error"] = str(error)
    said = json.loads(_broadcast(json.dumps(said)))
    if "error" in said:
        raise UserError(said["error"])
    return said["value"]


def any_of(flag: bool) -> bool:
    """Whether it is so in any process of the cluster; all must call this together."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def _broadcast(text: str) -> str:
    """The main process's text."""
    from jax.experimental import multihost_utils

    data = text.encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    room = np.zeros(1 << size.bit_length(), np.uint8)  # few sizes, since each is compiled
    if is_main():
        room[:size] = np.frombuffer(data, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(room), np.uint8)[:size]).decode()


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Raises UserError where the devices and microbatches do not divide the batch evenly."""
    parts = mesh.size * accumulation
    if batch_size % parts:
        lower, upper = batch_size // parts * parts, -(-batch_size // parts) * parts
        near = " or ".join(str(size) for size in (lower, upper) if size)
        microbatches = f" of {accumulation} microbatches" if accumulation > 1 else ""
        raise UserError(
            f"config.train.batch_size is {batch_size}, which does not divide among {mesh.size} devices{microbatches}\n"
            f"  allowed: a multiple of {parts}, as {near}"
        )


def cache_compilations() -> None:
    """Keeps compiled programs in the user's cache folder, so that a second start need not wait for the compiler.

    Host programs are tied to the processor's instructions, so each processor has a folder of its own.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(cache_folder() / f"xla-{_processor()}"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def cache_folder() -> Path:
    """The user's folder for what may be made again at any time."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vit_jax"


def _processor() -> str:
    known = " ".join(sorted(hardware.cpu_flags())) or platform.machine() + platform.processor()
    return hashlib.sha256(known.encode()).hexdigest()[:12]
