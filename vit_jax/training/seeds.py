"""Several seeds of one config: which they are, where each one's run lies, and what they come to together."""

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vit_jax.errors import UserError

MOST = 2**31


def listed(config: ConfigDict) -> list[int] | None:
    """The seeds of `config.train.seeds`, or None where it is not set.

    One number is how many, from `config.train.seed` on; several, '0,3,7', are the seeds themselves, and '7,' is one.

    Raises:
        UserError: it is neither, one stands twice, or one is no seed.
    """
    text = config.train.seeds
    if text is None:
        return None
    parts = [part.strip() for part in text.strip().removesuffix(",").split(",")]
    numbers = [int(part) if part.isascii() and part.isdigit() else -1 for part in parts]
    allowed = "a number of seeds, as 5, or different seeds of 0 to 2147483647, as 0,3,7; or None"
    if "," not in text:
        first, count = config.train.seed, numbers[0]
        if not 1 <= count <= MOST - first:
            raise UserError(f"config.train.seeds is {text!r}\n  allowed: {allowed}")
        return list(range(first, first + count))
    if len({*numbers}) < len(numbers) or not all(0 <= number < MOST for number in numbers):
        raise UserError(f"config.train.seeds is {text!r}\n  allowed: {allowed}")
    return numbers


def check(config: ConfigDict) -> None:
    """Raises UserError where `config.train.seeds` is no list of seeds, or does not go with the rest of the config."""
    if listed(config) is None:
        return
    if config.train.batch_size == "auto":
        raise UserError(
            f"config.train.seeds is {config.train.seeds!r}, with config.train.batch_size='auto'\n"
            "  allowed: the same number for all seeds, as one of them alone finds it: config.train.batch_size=128"
        )
    if config.log.profile is not None and (config.train.seeds_at_once or 1) > 1:
        raise UserError(
            f"config.train.seeds is {config.train.seeds!r}, with config.log.profile={config.log.profile!r}\n"
            "  allowed: one seed after another: config.train.seeds_at_once=1"
        )
    if config.mesh.distributed:
        raise UserError(
            f"config.train.seeds is {config.train.seeds!r}, with config.mesh.distributed\n"
            "  allowed: on a cluster one seed a command: config.train.seed"
        )


def folder_of(workdir: Path, seed: int) -> Path:
    """Where a seed's own run lies."""
    return workdir / f"seed-{seed}"


def config_of(config: ConfigDict, seed: int, at_once: int) -> ConfigDict:
    """The config of a seed's own run: what `config.train.seed` alone would be, and how many are trained beside it."""
    one = copy.deepcopy(config)
    one.train.update(seed=seed, seeds=None, seeds_at_once=at_once if at_once > 1 else None)
    return one


def config_of_all(config: ConfigDict) -> ConfigDict:
    """The config with its seeds as a list, whatever way they were given."""
    every = copy.deepcopy(config)
    every.train.update(seed=0, seeds="".join(f"{seed}," for seed in listed(config)))
    return every


def summarise(seeds: Sequence[int], summaries: Sequence[dict[str, Any]], at_once: Sequence[int]) -> dict[str, Any]:
    """What summary.json holds of several seeds.

    Each `test/...` is the mean over the seeds; beside it stand `/std`, the sample standard deviation (None for one
    seed), and `/each`, in the order of `seeds`. `seconds` are those of training all of them: what seeds that were
    trained at once have spent together counts once.

    Args:
        seeds: one or more.
        summaries: of each.
        at_once: how many were trained with each, itself included.
    """
    first, result = summaries[0], {"seeds": list(seeds)}
    for name in (name for name in first if "/" in name):
        each = [summary[name] for summary in summaries]
        if name.endswith("/examples"):
            result[name] = first[name]
            continue
        result[name] = mean = math.fsum(each) / len(each)
        squares = math.fsum((value - mean) ** 2 for value in each)
        result[f"{name}/std"] = math.sqrt(squares / (len(each) - 1)) if len(each) > 1 else None
        result[f"{name}/each"] = each
    seconds = sum(summary["seconds"] / count for summary, count in zip(summaries, at_once, strict=True))
    return {**result, "steps": first["steps"], "seconds": seconds, "parameters": first["parameters"]}


def describe(summary: dict[str, Any]) -> str:
    """'test accuracy 97.92 +- 0.21 % over 5 seeds (97.50 ... 98.06)': mean, sample standard deviation, extremes."""
    name, each = headline(summary)
    values = (summary[name], summary[f"{name}/std"] or 0.0, min(each), max(each))
    mean, spread, least, most = (_shown(name, value) for value in values)
    unit, name = " %" if name.endswith("accuracy") else "", name.replace("/", " ")
    if len(each) == 1:
        return f"{name} {mean}{unit} of one seed, {summary['seeds'][0]}"
    return f"{name} {mean} +- {spread}{unit} over {len(each)} seeds ({least} ... {most})"


def describe_each(summary: dict[str, Any]) -> list[str]:
    """'seed 3: test accuracy 98.06 %', a line a seed."""
    name, each = headline(summary)
    unit, words = " %" if name.endswith("accuracy") else "", name.replace("/", " ")
    values = zip(summary["seeds"], each, strict=True)
    return [f"seed {seed}: {words} {_shown(name, value)}{unit}" for seed, value in values]


def headline(summary: dict[str, Any]) -> tuple[str, list[float]]:
    """The name of what several seeds are judged by, and each one's: the accuracy, or the loss where there is none."""
    names = [f"{role}/{metric}" for metric in ("accuracy", "loss") for role in ("test", "validation")]
    name = next(name for name in names if name in summary)
    return name, summary[f"{name}/each"]


def _shown(name: str, value: float) -> str:
    return f"{100 * value:.2f}" if name.endswith("accuracy") else f"{value:.4f}"
