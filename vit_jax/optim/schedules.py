"""Learning-rate schedules: linear warm-up, then the decay that `config.optimizer.schedule` names.

To add a schedule, write a function and add it to `SCHEDULES` and to the option's choices in the config schema.
"""

import contextlib
from collections.abc import Callable

import jax
import optax
from ml_collections import ConfigDict

Decay = Callable[[float, float, int], optax.Schedule]


def cosine(peak: float, final: float, steps: int) -> optax.Schedule:
    """Half a cosine from `peak` to `final`."""
    return optax.cosine_decay_schedule(peak, steps, alpha=final / peak if peak else 0.0)


def linear(peak: float, final: float, steps: int) -> optax.Schedule:
    """A straight line from `peak` to `final`."""
    return optax.linear_schedule(peak, final, steps)


def constant(peak: float, final: float, steps: int) -> optax.Schedule:
    """`peak` at every step."""
    return optax.constant_schedule(peak)


# (peak, final, number of steps after the warm-up) -> the schedule of those steps.
SCHEDULES: dict[str, Decay] = {"cosine": cosine, "linear": linear, "constant": constant}


def warmup_steps(section: ConfigDict, steps: int) -> int:
    """Returns the number of warm-up steps of a run: a tenth of its steps if it has no more than `warmup_steps`.

    Args:
        section: `config.optimizer`.
        steps: updates of the whole run.
    """
    return section.warmup_steps if section.warmup_steps < steps else steps // 10


def warmup_warning(section: ConfigDict, steps: int) -> str | None:
    """Returns a line about a warm-up that is shortened, or takes more than half of the run; arguments as above."""
    warmup, run = section.warmup_steps, f"the run has {steps:,} steps"
    if (used := warmup_steps(section, steps)) < warmup:
        return f"warning: optimizer.warmup_steps is {warmup:,}, but {run}: warm-up of {used:,} steps"
    if 2 * warmup > steps:
        return f"warning: optimizer.warmup_steps is {warmup:,}, and {run}: most of it is warm-up"
    return None


def schedule(section: ConfigDict, steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the number of updates made before.

    Linear warm-up from 0 to the peak, then the decay over the remaining steps, as in the code published with arXiv
    2010.11929. In a run that is not longer than the warm-up, the warm-up is shortened (`warmup_steps`).

    Args:
        section: `config.optimizer`.
        steps: updates of the whole run.
    """
    peak, warmup = section.learning_rate, warmup_steps(section, steps)
    decay = SCHEDULES[section.schedule](peak, section.final_learning_rate, max(steps - warmup, 1))
    if not warmup:
        return decay
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), decay], [warmup])


def learning_rate(schedule: optax.Schedule, count: int) -> float:
    """Returns the learning rate after `count` updates, computed on the host if JAX has a CPU backend.

    On an accelerator the computation would be queued after the training steps that are still running, and the host
    would wait for them.
    """
    try:
        host = jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:
        host = contextlib.nullcontext()
    with host:
        return float(schedule(count))
