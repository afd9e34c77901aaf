"""Several seeds of one config: the run of each in WORKDIR/seed-K, one after another, and their mean and spread."""

import contextlib
import copy
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vit_jax import atomic, objectives, terminal
from vit_jax.checkpoint import proof, run_files
from vit_jax.errors import UserError, os_errors_of_run
from vit_jax.objectives.base import PrimaryMetric
from vit_jax.runtime import oom
from vit_jax.training import describe, progress, run_directory, setup
from vit_jax.training.lock import Lock, release_all
from vit_jax.training.progress import Progress
from vit_jax.training.setup import Experiment
from vit_jax.training.shutdown import StopRequest
from vit_jax.training.train import compile_step, recorded_attention, train_seed


def seeds_of(config: ConfigDict) -> list[int] | None:
    """Returns the seeds of `config.train.seeds`, or None if it is not set; n means n seeds from `train.seed`."""
    seeds, first = config.train.seeds, config.train.seed
    if isinstance(seeds, int):
        return list(range(first, first + seeds))
    return None if seeds is None else list(seeds)


def workdir_of(workdir: Path, seed: int) -> Path:
    """Returns the run directory of one of several seeds."""
    return workdir / f"seed-{seed}"


def train(config: ConfigDict, workdir: Path, stop: StopRequest | None = None) -> dict[str, Any] | None:
    """Trains every seed that is not finished; returns the content of summary.json (`summarize`).

    None if it was stopped; the run is saved. A seed that fails does not keep the others from being trained.

    Args:
        config: a checked config with `train.seeds`.
        workdir: the run directory of all seeds.
        stop: as of `train.train`.

    Raises:
        UserError: as `train.train`; if seeds have failed, the error of the first one, after the others are finished.
    """
    seeds, primary = seeds_of(config), objectives.make(config).primary_metric
    summary = run_files.read_summary(workdir)
    is_complete = summary is not None and summary.get("seeds") == seeds
    if is_complete and not _changes(workdir, config) and not _unfinished(workdir, config):
        terminal.say(describe.finished(workdir, describe_all(summary, primary)))
        return summary
    mesh = setup.check(config)
    run_directory.claim(workdir, _recorded_seeds(workdir, config))
    terminal.say(describe.versions(mesh))
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(stop or StopRequest(config.train.max_minutes))
        stop.on_exit, stop.exit_on_signal = release_all, True
        stack.enter_context(Lock(workdir, stop.exit_without_saving))
        changes = _changes(workdir, config)  # again: another process may have finished the run in between
        run_directory.record(workdir, _config_of_all(config), changes, terminal.say)
        atomic.remove(workdir / run_files.SUMMARY)
        if unfinished := _unfinished(workdir, config):
            proof.prove(workdir_of(workdir, max(unfinished)))
            attention = recorded_attention(workdir_of(workdir, seeds[0]))
            experiment = setup.assemble(config, mesh, setup.load_sources(config), attention=attention)
            terminal.say(describe.experiment(experiment))
            if not _train_all(experiment, unfinished, workdir, stop):
                finished = len(seeds) - len(_unfinished(workdir, config))
                terminal.say(
                    f"{finished} of {len(seeds)} seeds are finished ({stop.reason}): run the same command to resume"
                )
                return None
    with os_errors_of_run(workdir):
        return _finish(workdir, seeds, primary)


def _train_all(experiment: Experiment, seeds: list[int], workdir: Path, stop: StopRequest) -> bool:
    """Trains these seeds with one compiled program; returns False if a stop was requested.

    Raises:
        UserError: seeds have failed; the error of the first of them.
    """
    failed: dict[int, UserError] = {}

    @functools.cache
    def compile_update() -> Any:
        return compile_step(experiment, terminal.say)

    for seed in seeds:
        directory = workdir_of(workdir, seed)
        shown = Progress(experiment.num_steps, experiment.steps_per_epoch, name=f"seed {seed}")
        run_directory.claim(directory, experiment.config_of(seed))
        explained = oom.explained(experiment.config, experiment.model, experiment.image_shape)
        with Lock(directory, stop.exit_without_saving), explained:
            try:
                summary = train_seed(experiment, seed, directory, stop, shown, compile_update)
            except UserError as error:
                shown.say(f"failed: {error}")
                failed[seed] = error
            else:
                if summary is None:
                    return False
        if stop.reason and seed != seeds[-1]:
            return False
    if failed:
        seed, error = next(iter(failed.items()))
        raise UserError(f"seed {seed}: {error}") from error
    return True


def _finish(workdir: Path, seeds: list[int], primary: PrimaryMetric) -> dict[str, Any]:
    """Writes and prints the summary of all seeds."""
    summary = summarize(seeds, [run_files.read_summary(workdir_of(workdir, seed)) for seed in seeds])
    atomic.write_json(workdir / run_files.SUMMARY, summary)
    terminal.say("\n".join(describe_each(summary, primary)))
    spent = f"{summary['steps']:,} steps each, {progress.clock(summary['seconds'])} of training"
    terminal.say(f"finished: {describe_all(summary, primary)} after {spent}")
    terminal.say(f"results are in {workdir}: {run_files.SUMMARY}, and those of each seed in seed-K/")
    return summary


def _changes(workdir: Path, config: ConfigDict) -> list[str]:
    """As `run_directory.changes`, except that the choice of seeds may change."""
    return run_directory.changes(workdir, _recorded_seeds(workdir, config))


def _recorded_seeds(workdir: Path, config: ConfigDict) -> ConfigDict:
    """The config with the seeds that config.json has, if it has any."""
    config, before = _config_of_all(config), run_files.read_config(workdir)
    if before is not None and before.get("train", {}).get("seeds") is not None:
        config.train.seeds = before["train"]["seeds"]
    return config


def _config_of_all(config: ConfigDict) -> ConfigDict:
    """Returns the config with `train.seeds` as a tuple of seeds."""
    every = copy.deepcopy(config)
    every.train.update(seed=0, seeds=tuple(seeds_of(config)))
    return every


def _unfinished(workdir: Path, config: ConfigDict) -> list[int]:
    """Returns the seeds that are not finished, or that resume with a changed config."""

    def is_finished(seed: int) -> bool:
        directory = workdir_of(workdir, seed)
        if not directory.is_dir():
            return False
        return run_directory.finished(directory, setup.config_of_seed(config, seed)) is not None

    return [seed for seed in seeds_of(config) if not is_finished(seed)]


def summarize(seeds: Sequence[int], summaries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Returns the content of summary.json for several seeds.

    Each metric is the mean over the seeds; `<metric>/std` is the sample standard deviation (None for one seed), and
    `<metric>/each` lists the values in the order of `seeds`. `seconds` is the sum.
    """
    first = summaries[0]
    metrics = {name: [summary[name] for summary in summaries] for name in first if "/" in name}
    seconds = sum(summary["seconds"] for summary in summaries)
    others = {"steps": first["steps"], "seconds": seconds, "parameters": first["parameters"]}
    return {"seeds": list(seeds), **mean_and_std(metrics), **others}


def mean_and_std(metrics: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Returns `<metric>`, `<metric>/std` and `<metric>/each` as `summarize` does; '.../examples' alone, as it is."""
    result: dict[str, Any] = {}
    for name, values in metrics.items():
        if name.endswith("/examples"):
            result[name] = values[0]
            continue
        result[name] = mean = math.fsum(values) / len(values)
        squares = math.fsum((value - mean) ** 2 for value in values)
        result[f"{name}/std"] = math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else None
        result[f"{name}/each"] = list(values)
    return result


def describe_all(summary: dict[str, Any], primary: PrimaryMetric) -> str:
    """Returns 'test accuracy 97.92 +- 0.21 % over 5 seeds (97.50 ... 98.06)': mean, standard deviation and range."""
    name, values = _primary(summary, primary)
    mean, std, low, high = (
        _shown(name, value) for value in (summary[name], summary[f"{name}/std"] or 0.0, min(values), max(values))
    )
    unit, words = " %" if name.endswith("accuracy") else "", name.replace("/", " ")
    if len(values) == 1:
        return f"{words} {mean}{unit} for one seed, {summary['seeds'][0]}"
    return f"{words} {mean} +- {std}{unit} over {len(values)} seeds ({low} ... {high})"


def describe_each(summary: dict[str, Any], primary: PrimaryMetric) -> list[str]:
    """Returns 'seed 3: test accuracy 98.06 %', one line per seed."""
    name, values = _primary(summary, primary)
    unit, words = " %" if name.endswith("accuracy") else "", name.replace("/", " ")
    pairs = zip(summary["seeds"], values, strict=True)
    return [f"seed {seed}: {words} {_shown(name, value)}{unit}" for seed, value in pairs]


def _primary(summary: dict[str, Any], primary: PrimaryMetric) -> tuple[str, list[float]]:
    """Returns the name of the primary metric in a summary, and its values for each seed."""
    name = next(name for role in ("test", "validation") if (name := f"{role}/{primary.name}") in summary)
    return name, summary[f"{name}/each"]


def _shown(name: str, value: float) -> str:
    return f"{100 * value:.2f}" if name.endswith("accuracy") else f"{value:.4f}"
