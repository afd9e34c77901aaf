"""Runs with several processes: joining the cluster, rank 0, and decisions that all processes share."""

import json
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vit_jax.errors import UserError


def initialize(distributed: bool) -> None:
    """Joins the other processes of the cluster if `distributed`; to be called before any device is used.

    Under Slurm, Open MPI and Kubernetes and on Cloud TPUs, JAX finds the cluster by itself. Elsewhere three environment
    variables describe it: JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
        UserError: no cluster is found.
    """
    if not distributed or jax.distributed.is_initialized():
        return
    variables = {name: os.environ.get(f"JAX_{name.upper()}") for name in ("num_processes", "process_id")}
    try:
        jax.distributed.initialize(**{name: int(value) for name, value in variables.items() if value})
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"config.mesh.distributed is True, but no cluster was found: {str(error).splitlines()[0]}\n"
            "  Slurm, Open MPI, Kubernetes and Cloud TPUs are detected; otherwise set JAX_COORDINATOR_ADDRESS,\n"
            "  JAX_NUM_PROCESSES and JAX_PROCESS_ID for each process"
        ) from error


def is_rank_0() -> bool:
    """Returns whether this is the process that writes files and prints."""
    return is_alone() or jax.process_index() == 0


def is_alone() -> bool:
    """Returns whether this is the only process; without a cluster no device is started to find out."""
    return not jax.distributed.is_initialized() or jax.process_count() == 1


def on_rank_0(f: Callable[[], Any]) -> Any:
    """Returns, in all processes, what `f` returns on rank 0; all processes must call this together.

    Files, clocks and signals may look different from each host. Processes that act on them differently wait for each
    other forever, so that rank 0 decides for all.

    Args:
        f: called on rank 0 only. With several processes its result must be serializable as JSON.

    Raises:
        UserError: `f` raised it; in all processes.
    """
    if is_alone():
        return f()
    message: dict[str, Any] = {}
    if is_rank_0():
        try:
            message["value"] = f()
        except UserError as error:
            message["error"] = str(error)
    message = json.loads(_broadcast(json.dumps(message)))
    if "error" in message:
        raise UserError(message["error"])
    return message["value"]


def any_of(flag: bool) -> bool:
    """Returns whether `flag` is True in any process; all processes must call this together."""
    if is_alone():
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def _broadcast(text: str) -> str:
    """Returns the text of rank 0."""
    from jax.experimental import multihost_utils

    data = text.encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    buffer = np.zeros(1 << size.bit_length(), np.uint8)  # few sizes, because each one is compiled
    if is_rank_0():
        buffer[:size] = np.frombuffer(data, np.uint8)
    return bytes(np.asarray(multihost_utils.broadcast_one_to_all(buffer), np.uint8)[:size]).decode()
