"""The command `python -m vit_jax.transfer`."""

import argparse
import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_jax import commands, paths, terminal
from vit_jax.errors import UserError

if TYPE_CHECKING:
    from vit_jax.evaluation.frozen_features import Examples, Settings

DESCRIPTION = """\
Measures how good the frozen features of a backbone are for a dataset, in three ways: least squares from a few examples
per class (few-shot), k nearest neighbours, and a linear probe.

  %(prog)s --init=runs/cifar10 --data=cifar100
  %(prog)s --init=augreg-b16-in21k --data=cifar10 --shots=1,5,10 --draws=10
  %(prog)s --init=augreg-b16-224 --data=folder --data_dir=photos --methods=knn,probe
  %(prog)s --features=runs/digits/features

The features are computed once and stored in OUT/features. Every test example is scored, and the test split is used for
nothing else. The results are printed as a table and written to OUT/transfer.json (docs/transfer.md).
"""
RESULTS = "transfer.json"
METHOD_FLAGS = {
    "fewshot": ("shots", "draws", "fewshot_l2"),
    "knn": ("neighbours", "temperature"),
    "probe": ("probe_l2", "held_out"),
}
# What only the computation of features reads.
COMPUTING_FLAGS = (
    *("step", "pooling", "pre_logits", "data", "data_dir", "train", "test", "image_size", "normalize", "batch_size"),
)


@dataclasses.dataclass(frozen=True)
class Problem:
    """What the features are evaluated on.

    Attributes:
        out: directory of the results.
        about: where the features come from, for transfer.json.
        train: features and labels of the training split.
        test: features and labels of the test split.
        class_names: of the labels.
    """

    out: Path
    about: dict[str, Any]
    train: "Examples"
    test: "Examples"
    class_names: tuple[str, ...]


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command's flags; --help and wrong flags end the process, the latter with status 2."""
    parser = commands.parser("transfer", DESCRIPTION)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--init", help="the backbone: a run directory, file, URL or name (docs/weights.md)")
    source.add_argument("--features", metavar="DIR", help="or stored features of train and test (vit-jax features)")
    _add_backbone_flags(parser.add_argument_group("backbone"))
    _add_data_flags(parser.add_argument_group("data"))
    _add_method_flags(parser.add_argument_group("methods"))
    parser.add_argument(
        "--out",
        metavar="DIR",
        help="output directory (default: INIT/transfer/DATA for a run, runs/transfer/INIT/DATA for a file, or the "
        "directory of --features)",
    )
    return parser.parse_args(arguments)


def _add_backbone_flags(group: Any) -> None:
    group.add_argument("--step", help="for a run: the step of the checkpoint, or best (default: the newest)")
    group.add_argument("--pooling", choices=("token", "mean"), help="replace the pooling of the model")
    group.add_argument("--pre_logits", action="store_true", help="use the output of the layer before the logits")


def _add_data_flags(group: Any) -> None:
    group.add_argument("--data", help="digits, folder, arrays or a TFDS dataset (default: that of the run)")
    group.add_argument("--data_dir", metavar="DIR", help="directory of the dataset")
    group.add_argument("--train", default="train", help="split to learn from (default: %(default)s)")
    group.add_argument("--test", default="test", help="split to score (default: %(default)s)")
    group.add_argument(
        "--label", default="label", help="which labels to use, if there are several kinds (default: %(default)s)"
    )
    group.add_argument(
        "--image_size", type=int, metavar="N", help="side in pixels (default: that of the backbone's training)"
    )
    group.add_argument(
        "--normalize",
        help="normalize images by mean and std of the dataset (set), 0.5 (half), those of ImageNet (imagenet) or CLIP "
        "(clip), or numbers, 0.5,0.5,0.5/0.25,0.25,0.25 (default: as in the backbone's training)",
    )
    group.add_argument("--batch_size", type=int, default=256, help="images per batch (default: %(default)s)")


def _add_method_flags(group: Any) -> None:
    group.add_argument("--methods", default="fewshot,knn,probe", help="methods to run (default: %(default)s)")
    group.add_argument("--shots", default="1,5,10", help="few-shot: examples per class (default: %(default)s)")
    group.add_argument("--draws", type=int, default=5, help="few-shot: random draws (default: %(default)s)")
    group.add_argument("--fewshot_l2", type=float, help="few-shot: L2 constant (default: 4/3 of the width)")
    group.add_argument("--neighbours", default="20", help="k-NN: one or more values of k (default: %(default)s)")
    group.add_argument("--temperature", type=float, help="k-NN: temperature of the votes (default: 0.07)")
    group.add_argument("--probe_l2", help="probe: L2 constants to choose from (default: 1e-6,1e-5,...,10)")
    group.add_argument("--held_out", type=float, help="probe: fraction of train on which L2 is chosen (default: 0.1)")
    group.add_argument(
        "--seed", type=int, default=0, help="random seed of draws and held-out examples (default: %(default)s)"
    )


def parse_settings(flags: argparse.Namespace) -> "Settings":
    """Returns the settings of the methods.

    Raises:
        UserError: a flag has a value that is not allowed.
    """
    from vit_jax.evaluation.frozen_features import METHODS, Settings

    methods = tuple(flags.methods.split(","))
    if not set(methods) <= set(METHODS):
        raise UserError(f"--methods is {flags.methods!r}\n  allowed: {', '.join(METHODS)}, separated by commas")
    for name in ("draws", "batch_size", "image_size"):
        if getattr(flags, name) is not None and getattr(flags, name) < 1:
            raise UserError(f"--{name} is {getattr(flags, name)}\n  allowed: an integer of at least 1")
    if not 0 <= flags.seed < 2**63:
        raise UserError(f"--seed is {flags.seed}\n  allowed: an integer from 0 to 2**63 - 1")
    if flags.held_out is not None and not 0 < flags.held_out < 1:
        raise UserError(f"--held_out is {flags.held_out}\n  allowed: a number between 0 and 1")
    for name in ("fewshot_l2", "temperature"):
        value = getattr(flags, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name} is {value}\n  allowed: a number above 0")
    hyperparameters = {name: getattr(flags, name) for name in ("fewshot_l2", "temperature", "held_out")}
    if flags.probe_l2 is not None:
        hyperparameters["probe_l2"] = _parse_numbers("probe_l2", flags.probe_l2, float, 0)
    return Settings(
        methods=methods,
        shots=_parse_numbers("shots", flags.shots, int, 1),
        neighbours=_parse_numbers("neighbours", flags.neighbours, int, 1),
        draws=flags.draws,
        seed=flags.seed,
        **{name: value for name, value in hyperparameters.items() if value is not None},
    )


def check_unused(flags: argparse.Namespace) -> None:
    """Raises UserError if a flag is set that the chosen methods, or `--features`, do not use."""
    defaults = parse(["--init=none"])
    unused = {name: method for method, names in METHOD_FLAGS.items() for name in names if method not in flags.methods}
    unused |= dict.fromkeys(COMPUTING_FLAGS, "--init") if flags.features else {}
    for name, reader in unused.items():
        if getattr(flags, name) != getattr(defaults, name):
            where = "--init; stored features have it already" if reader == "--init" else f"--methods={reader}"
            raise UserError(f"--{name} is only used with {where}\n  omit --{name}")


def _parse_numbers(name: str, text: str, kind: Callable[[str], float], minimum: float) -> tuple:
    try:
        found = tuple(sorted({kind(part) for part in text.split(",")}))
        if not all(minimum <= value < float("inf") for value in found):
            raise ValueError
        return found
    except ValueError:
        type_name = "integers" if kind is int else "numbers"
        raise UserError(
            f"--{name} is {text!r}\n  allowed: {type_name} of at least {minimum}, separated by commas"
        ) from None


def measure(flags: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Computes or reads the features, runs the methods, and writes the results; returns their file and its content.

    Raises:
        UserError: the backbone, the data or a flag is wrong, or the results cannot be written.
    """
    settings = parse_settings(flags)
    check_unused(flags)
    from vit_jax import atomic
    from vit_jax.evaluation import frozen_features
    from vit_jax.runtime import compilation_cache

    commands.start_jax()
    compilation_cache.cache_compilations()
    problem = (_read_features if flags.features else _compute_features)(flags, settings)
    results = frozen_features.evaluate(problem.train, problem.test, len(problem.class_names), settings)
    content = {**problem.about, "seed": settings.seed, **results}
    path = problem.out / RESULTS
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_json(path, content)
    except OSError as error:
        raise UserError(f"--out={problem.out} cannot be written: {error.strerror}\n  use another --out") from error
    return path, content


def _read_features(flags: argparse.Namespace, settings: "Settings") -> Problem:
    """Returns the problem of `--features`."""
    from vit_jax.data import feature_store
    from vit_jax.evaluation import frozen_features

    directory = paths.expand(flags.features, "--features")
    train, test = (feature_store.read(feature_store.find(directory, role)) for role in ("train", "test"))
    if train.backbone != test.backbone:
        raise UserError(f"{train.path} and {test.path} were computed by different backbones\n  recompute one of them")
    sources = [stored.source((flags.label,)) for stored in (train, test)]
    for stored in (train, test):
        if stored.features.ndim != 2:
            raise UserError(
                f"{stored.path} has the features of every token\n  recompute them with a model that pools its tokens"
            )
    class_names = sources[0].class_names
    frozen_features.check(settings, sources[0].labels, class_names)
    about = {"init": str(directory), "data": train.about["name"], "train": sources[0].split, "test": sources[1].split}
    examples = (frozen_features.Examples(source.images, source.labels) for source in sources)
    out = paths.expand(flags.out, "--out") if flags.out else directory
    return Problem(out, about, *examples, class_names)


def _compute_features(flags: argparse.Namespace, settings: "Settings") -> Problem:
    """Returns the problem of `--init`: the features are read from `--out` if it has them, else computed."""
    from vit_jax import sharding
    from vit_jax.data import normalization, sources
    from vit_jax.evaluation import extraction, frozen_features

    splits, labels = (flags.train, flags.test), (flags.label,)
    name, data_dir, trained_size, held_out = commands.dataset_of(flags, splits)
    selected = {"labels": labels, "held_out": held_out}
    # The default image size is that of the backbone, which is not loaded before the data is known to be there.
    with commands.flags_named(commands.DATA_FLAGS):
        *_, channels = sources.check(name, splits, data_dir=data_dir, image_size=flags.image_size or 1, **selected)
    if flags.normalize is not None:
        normalization.constants(flags.normalize, channels, "--normalize")
    backbone = extraction.load(
        flags.init,
        step=commands.parse_step(flags.step),
        pooling=flags.pooling,
        pre_logits=flags.label if flags.pre_logits else None,
        image_size=flags.image_size,
        channels=channels,
    )
    if flags.normalize is None and backbone.assumed:
        terminal.warn(f"{flags.init}: {backbone.assumed}")
    size = flags.image_size or backbone.image_size or trained_size
    with commands.flags_named(commands.DATA_FLAGS):
        selected |= {"data_dir": data_dir, "image_size": size, "preparation": backbone.preparation}
        loaded = [sources.load(name, split, **selected) for split in splits]
    frozen_features.check(settings, loaded[0].labels, loaded[0].class_names)
    out, mesh, examples = _output_directory(flags, name), sharding.make_mesh(None), []
    for role, source in zip(("train", "test"), loaded, strict=True):
        path = out / "features" / f"{role}.npz"
        stored = extraction.load_or_compute(
            path, backbone, source, mesh, normalize=flags.normalize, batch_size=flags.batch_size
        )
        features = extraction.after_pre_logits(backbone, stored.features)
        examples.append(frozen_features.Examples(features, source.labels))
    about = {
        "init": flags.init,
        "backbone": backbone.description,
        "pooling": backbone.model.pooling,
        "pre_logits": flags.pre_logits,
        "data": name,
        "train": flags.train,
        "test": flags.test,
        "label": flags.label,
        "image_size": list(loaded[0].images.shape[1:3]),
        "preparation": dataclasses.asdict(backbone.preparation),
        "normalize": flags.normalize or backbone.normalization,
    }
    return Problem(out, about, *examples, loaded[0].class_names)


def _output_directory(flags: argparse.Namespace, data: str) -> Path:
    if flags.out:
        return paths.expand(flags.out, "--out")
    from vit_jax.checkpoint import run_files

    init, data = paths.expand(flags.init, "--init"), re.sub(r"[^\w.-]+", "_", data)
    if (init / run_files.CHECKPOINTS).is_dir():
        return init / "transfer" / data
    return Path("runs") / "transfer" / re.sub(r"[^\w.-]+", "_", init.name) / data


def table(content: dict[str, Any]) -> str:
    """Returns the results as a table for the terminal."""
    rows = []
    for name, value in content.items():
        kind, _, rest = name.partition("/")
        if kind == "fewshot" and rest.endswith("/accuracy"):
            shots = rest.split("/")[0]
            std, draws = content[f"fewshot/{shots}/std"], len(content[f"fewshot/{shots}/draws"])
            spread = f"+- {100 * std:.2f} over {draws} draws" if std is not None else "1 draw"
            rows.append((f"few-shot, {shots} per class", value, spread))
        elif kind == "knn" and rest.endswith("accuracy"):
            count, vote = rest.split("/")
            rows.append((f"{count} nearest neighbours", value, "weighted" if vote == "accuracy" else "majority"))
        elif name == "probe/accuracy":
            rows.append(("linear probe", value, f"L2 {content['probe/l2']:g}, chosen on held-out examples of train"))
    width = max(len(row[0]) for row in rows)
    header = (
        f"{content['init']} on {content['data']}: {content['width']} features, {content['classes']} classes, "
        f"{content['train/examples']:,} train, {content['test/examples']:,} test; test accuracy:"
    )
    return "\n".join([header, *(f"  {name:<{width}}  {100 * value:6.2f} %  {note}" for name, value, note in rows)])


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""

    def run() -> None:
        path, content = measure(parse(arguments))
        terminal.say(f"{table(content)}\nresults: {path}")

    return commands.finish(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
