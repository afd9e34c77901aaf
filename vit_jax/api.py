"""What `import vit_jax` offers: train a config, load a trained or published model, create one. See docs/python.md."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vit_jax import arguments, backbones, commands, config, inference, objectives, paths, report
from vit_jax.backbones import Backbone
from vit_jax.checkpoint import run_files
from vit_jax.checkpoint.manager import CheckpointManager
from vit_jax.config.load import find_option
from vit_jax.errors import UserError, one_line
from vit_jax.inference import Predictor
from vit_jax.models import variants
from vit_jax.models.vit import VisionTransformer
from vit_jax.runtime import compilation_cache
from vit_jax.training import describe, multi_seed
from vit_jax.training import train as training
from vit_jax.training.shutdown import Interruption

SPLITS = ("test", "validation")  # of the metrics; the first one that a run has is its result


@dataclasses.dataclass(frozen=True, repr=False)
class Result:
    """A run that `train` has finished or stopped.

    The metrics of the test split (of the validation split, if there is no test split) are attributes too:
    `result.accuracy` is `result.metrics["test/accuracy"]`.

    Attributes:
        workdir: the run directory.
        finished: whether it has reached its last step; else it was stopped, and is saved.
        steps: number of steps taken; of several seeds, the smallest.
        seconds: of training; of several seeds together.
        metrics: of a finished run, its summary.json: 'test/accuracy', 'parameters', ...; of a stopped one, those of its
            last evaluation.
        seeds: of a run with several seeds; () for one.
        text: the result in one line.
    """

    workdir: Path
    finished: bool
    steps: int
    seconds: float
    metrics: Mapping[str, Any]
    seeds: tuple[int, ...]
    text: str

    def __repr__(self) -> str:
        return f"<{self.workdir}: {'finished' if self.finished else 'stopped'}, {self.text}>"

    def __getattr__(self, name: str) -> Any:
        metrics = self.__dict__.get("metrics", {})
        for split in SPLITS:
            if f"{split}/{name}" in metrics:
                return metrics[f"{split}/{name}"]
        raise AttributeError(f"the result has no {name!r}; its metrics are {', '.join(metrics) or 'not known yet'}")

    def __dir__(self) -> Iterable[str]:
        return [*super().__dir__(), *(name.partition("/")[2] for name in self.metrics if name.startswith(SPLITS))]

    @property
    def history(self) -> list[dict[str, Any]]:
        """The records of metrics.jsonl, in the order of the steps; `pandas.DataFrame(result.history)` is a table."""
        return _history(self._workdir_of_one("history"))

    def model(self, step: int | np.integer | str | None = None) -> Predictor:
        """Returns the trained model, as `load` does; `step` is a step, 'best', or None for the newest checkpoint."""
        return load(self._workdir_of_one("model()"), step=step)

    def of_seed(self, seed: int) -> "Result":
        """Returns the result of one of several seeds."""
        if seed not in self.seeds:
            raise UserError(
                f"seed {seed} is not one of this run\n  allowed: {', '.join(map(str, self.seeds)) or 'none'}"
            )
        return _result(multi_seed.workdir_of(self.workdir, seed))

    def _workdir_of_one(self, what: str) -> Path:
        if self.seeds:
            raise UserError(
                f"{what}: {self.workdir} holds the runs of several seeds\n  use .of_seed({self.seeds[0]}).{what}"
            )
        return self.workdir


def train(
    config: str | os.PathLike | ConfigDict,
    workdir: str | os.PathLike | None = None,
    overrides: Mapping[str, Any] | None = None,
    **options: Any,
) -> Result:
    """Trains a config, or resumes the run in `workdir`; returns its result, also of a run that is finished already.

    It does what `python -m vit_jax.main` does, with the same checks and files, but never ends the process, and works in
    a notebook and in a thread. Ctrl-C (in the main thread) saves the run and raises KeyboardInterrupt; the same call
    resumes it. A run that `train.max_minutes` stops is saved and returned with `finished=False`.

    Args:
        config: a config as on the command line: a file or name, with ':ARG' if it takes an argument; or a config made
            from `vit_jax.config.default()`.
        workdir: the run directory; None for runs/<config name>.
        overrides: options by name, such as {"train.steps": 100} or {"train": {"steps": 100}}, as
            --config.train.steps=100 on the command line.
        **options: the same by the last part of their names, if only one option has it: steps=100.

    Raises:
        UserError: an option, the data or the run directory does not fit; training failed and cannot be resumed.
        KeyboardInterrupt: it was interrupted; the run is saved.
    """
    if not isinstance(config, ConfigDict):
        config = arguments.path("config", config)
    if workdir is None:
        if isinstance(config, ConfigDict):
            raise UserError("workdir is missing\n  name the run directory: vit_jax.train(config, 'runs/NAME')")
        workdir = commands.default_workdir(config)
    workdir = paths.expand(workdir, "workdir")
    if not isinstance(overrides or {}, Mapping):
        raise UserError(
            f"overrides is {arguments.shown(overrides)}\n  allowed: a mapping such as {{'train.steps': 100}}"
        )
    made = commands.make_config(config, _assignments({**(overrides or {}), **options}), workdir)
    compilation_cache.cache_compilations()
    stop = Interruption(made.train.max_minutes)
    with report.at_end(made, workdir, None if isinstance(config, ConfigDict) else config):
        (training.train if made.train.seeds is None else multi_seed.train)(made, workdir, stop)
    if stop.interrupted:
        raise KeyboardInterrupt
    return _result(workdir)


def _assignments(options: Mapping[str, Any]) -> list[str]:
    """Returns options as the command line has them: 'section.key=value'."""
    written = []
    for key, value in options.items():
        if key in config.OPTIONS and isinstance(value, Mapping):  # a section
            written += _assignments({f"{key}.{name}": one for name, one in value.items()})
            continue
        name = _full_name(key)
        one = find_option(name, value)
        written.append(f"{name}={value if isinstance(value, str) else one.text(one.convert(value))}")
    return written


def _full_name(name: str) -> str:
    """Returns 'section.key' of an option; `name` may be its key alone."""
    if "." in name:
        return name
    same = [full for full in config.names() if full.endswith(f".{name}")]
    if len(same) > 1:
        raise UserError(f"{name} is an option of several sections\n  use overrides={{'{same[0]}': ...}} or {same[1]}")
    return same[0] if same else name


def _result(workdir: Path) -> Result:
    """Returns the result of a run directory as its files are now."""
    settings = config.from_dict(run_files.read_config(workdir))
    objective, seeds = objectives.make(settings), settings.train.seeds
    summary = run_files.read_summary(workdir)
    if summary is not None:
        several = "seeds" in summary
        line = (
            multi_seed.describe_all(summary, objective.primary_metric)
            if several
            else describe.result(objective, summary)
        )
        seeds = tuple(summary["seeds"]) if several else ()
        return Result(workdir, True, summary["steps"], summary["seconds"], summary, seeds, line)
    if seeds is not None:
        each = {seed: multi_seed.workdir_of(workdir, seed) for seed in seeds}
        begun = [_result(directory) for directory in each.values() if run_files.read_config(directory) is not None]
        steps = min(one.steps for one in begun) if len(begun) == len(seeds) else 0
        line = f"{sum(one.finished for one in begun)} of {len(seeds)} seeds are finished"
        return Result(workdir, False, steps, sum(one.seconds for one in begun), {}, tuple(seeds), line)
    evaluated = {
        name: value for record in _history(workdir) for name, value in record.items() if name.startswith(SPLITS)
    }
    with CheckpointManager(workdir, read_only=True) as checkpoints:
        step = max(checkpoints.steps(), default=0)
        seconds = checkpoints.metadata(step)["seconds"] if step else 0.0
    return Result(workdir, False, step, seconds, evaluated, (), f"saved at step {step:,}")


def _history(workdir: Path) -> list[dict[str, Any]]:
    try:
        lines = (workdir / run_files.METRICS).read_text().splitlines()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in lines]


def load(
    source: str | os.PathLike,
    *,
    step: int | np.integer | str | None = None,
    class_names: Iterable[str] | None = None,
    prompt: str | Iterable[str] | None = None,
    image_size: int | np.integer | tuple[int, int] | None = None,
    normalize: str | None = None,
    batch_size: int | np.integer = inference.BATCH_SIZE,
) -> Predictor:
    """Returns a model that takes images of any size: `.predict(images)`, `.logits(images)`, `.features(images)`.

    Args:
        source: a run directory; or weights: a file, directory, URL, or the name of a published model.
        step: for a run: a step, or 'best'; None for the newest checkpoint.
        class_names: for weights: one per class, any for a model that embeds texts (CLIP, SigLIP); 'imagenet'; None for
            those of the file, or '0', '1', ...
        prompt: for such a model: a text with '{}' for the class name, or several; None for 'a photo of a {}'.
        image_size: for weights: pixels, an int or (height, width); None for that of the file.
        normalize: for weights: 'half', 'imagenet', 'clip' or numbers; None for what the file says.
        batch_size: images per batch; does not change the result.

    Raises:
        UserError: the source does not exist or cannot be read, or does not match the other arguments.
    """
    of_weights = {"class_names": class_names, "prompt": prompt, "image_size": image_size, "normalize": normalize}
    return Predictor(backbones.classifier(source, step, **of_weights), batch_size=batch_size)


def backbone(
    source: str | os.PathLike,
    *,
    step: int | np.integer | str | None = None,
    image_size: int | np.integer | tuple[int, int] | None = None,
    normalize: str | None = None,
    batch_size: int | np.integer = inference.BATCH_SIZE,
) -> Backbone:
    """Returns a callable object that returns the output tokens of images: of the last block, or of several.

    Args:
        source: as for `load`; a model without a head works too.
        step: for a run: a step, or 'best'; None for the newest checkpoint.
        image_size: pixels, an int or (height, width), to which pictures are resized; None for the size that the
            position embeddings are for. Arrays of normalized images may have any size.
        normalize: for weights: 'half' (Google's models) or 'imagenet' (DeiT, DINO, MAE); None for what the file says.
        batch_size: pictures per batch; does not change the result.

    Raises:
        UserError: the source does not exist or cannot be read, or does not match the other arguments.
    """
    return backbones.load(source, step=step, image_size=image_size, normalize=normalize, batch_size=batch_size)


def create_model(name: str, classes: int | Mapping[str, int] | None = None, **options: Any) -> VisionTransformer:
    """Returns the Flax module of a named size, such as 'B/16', without parameters.

    Args:
        name: Ti, S, B, L or H, a slash and the patch size; or a published hybrid, such as 'R50+B/16'.
        classes: number of logits; a mapping from names to numbers for several heads; None for no head.
        **options: other options of `VisionTransformer`, such as pooling='mean'.

    Raises:
        UserError: there is no such size or option, or a value is not allowed.
    """
    try:
        pooling = options.get("pooling", VisionTransformer.pooling)
        sized = variants.fields_of_options({"variant": name, "pooling": pooling})
        return VisionTransformer(classes=classes, **{**sized, **options})
    except (ValueError, TypeError) as error:
        raise UserError(
            f"create_model: {one_line(error, 400)}\n"
            "  for a published model, use vit_jax.load(NAME) or vit_jax.load_weights(NAME)"
        ) from error
