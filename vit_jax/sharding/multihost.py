"""Several processes of one run: start, rank 0, decisions that all of them share."""

import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vit_jax.errors import UserError


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


def is_rank_0() -> bool:
    """Whether this process writes the records; of several, one does."""
    return jax.process_index() == 0


def on_rank_0(act: Callable[[], Any]) -> Any:
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
    if is_rank_0():
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
    if is_rank_0():
        room[:size] = np.frombuffer(data, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(room), np.uint8)[:size]).decode()
