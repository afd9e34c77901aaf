"""The command: python -m vit_jax.transfer --init=WORKDIR_OR_FILE --data=cifar10 [--shots=1,5,10] [--out=DIR] ..."""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vit_jax import commands
from vit_jax.errors import UserError

if TYPE_CHECKING:
    from vit_jax.evaluation.frozen_features import Examples, Settings

DESCRIPTION = """\
Judges a backbone by its frozen features: least squares from a few examples a class, nearest neighbours, a linear probe.

  python -m vit_jax.transfer --init=runs/cifar10 --data=cifar100
  python -m vit_jax.transfer --init=ViT-B_16.npz --data=cifar10 --shots=1,5,10 --draws=10
  python -m vit_jax.transfer --init=augreg-b16-224 --data=folder --data_dir=photos --methods=knn,probe
  python -m vit_jax.transfer --features=runs/digits/features

The features are computed once and kept in OUT/features; every test example is scored, and nothing is chosen by the test
split. What was measured is printed as a table and written to OUT/transfer.json (docs/transfer.md).
"""
RESULTS = "transfer.json"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command's flags; --help and mistakes end the process, the latter with status 2."""
    parser = commands.parser("transfer", DESCRIPTION)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--init", help="a run's folder, or any file, URL or name that docs/weights.md lists")
    which.add_argument("--features", metavar="DIR", help="stored features of train and test, see vit_jax.features")
    _add_backbone(parser.add_argument_group("the backbone"))
    _add_data(parser.add_argument_group("the data"))
    _add_measures(parser.add_argument_group("what is measured"))
    parser.add_argument("--out", metavar="DIR", help="where results go (default: beside the run, else below runs/)")
    return parser.parse_args(arguments)


def _add_backbone(group: Any) -> None:
    group.add_argument("--step", help="of a run: the checkpoint of this step, or best (default: the newest)")
    group.add_argument("--pooling", choices=("token", "mean"), help="in place of the model's own")
    group.add_argument("--pre_logits", action="store_true", help="features behind the layer before the logits")


def _add_data(group: Any) -> None:
    group.add_argument("--data", help="digits, folder, arrays or a set of TFDS (default: the run's)")
    group.add_argument("--data_dir", help="of folder and arrays; or where TFDS keeps its sets")
    group.add_argument("--train", default="train", help="split to learn from (default: %(default)s)")
    group.add_argument("--test", default="test", help="split to score (default: %(default)s)")
    group.add_argument("--label", default="label", help="kind of label (default: %(default)s)")
    group.add_argument("--image_size", type=int, metavar="N", help="pixels (default: what the backbone is made for)")
    group.add_argument(
        "--normalize",
        help="images by the set's own mean and std (set), half or imagenet (default: as the backbone was trained)",
    )
    group.add_argument("--batch_size", type=int, default=256, help="images at a time (default: %(default)s)")


def _add_measures(group: Any) -> None:
    group.add_argument("--methods", default="fewshot,knn,probe", help="default: %(default)s")
    group.add_argument("--shots", default="1,5,10", help="examples a class (default: %(default)s)")
    group.add_argument("--draws", type=int, default=5, help="of such examples (default: %(default)s)")
    group.add_argument("--fewshot_l2", type=float, help="its L2 constant (default: 4/3 of the width)")
    group.add_argument("--neighbours", default="20", help="how many vote; several: 5,20 (default: %(default)s)")
    group.add_argument("--temperature", type=float, help="of their votes (default: 0.07)")
    group.add_argument("--probe_l2", help="L2 constants to choose from (default: 1e-6,1e-5,...,10)")
    group.add_argument("--held_out", type=float, help="share of train to choose on (default: 0.1)")
    group.add_argument("--seed", type=int, default=0, help="of draws and held-out examples (default: %(default)s)")


def settings(flags: argparse.Namespace) -> "Settings":
    """What is measured, from the flags.

    Raises:
        UserError: a flag's value is none that it can have.
    """
    from vit_jax.evaluation.frozen_features import METHODS, Settings

    methods = tuple(flags.methods.split(","))
    if not set(methods) <= set(METHODS):
        raise UserError(f"--methods={flags.methods}\n  allowed: {', '.join(METHODS)}, joined by commas")
    for name in ("draws", "batch_size"):
        if getattr(flags, name) < 1:
            raise UserError(f"--{name} is {getattr(flags, name)}\n  allowed: a whole number of at least 1")
    if not 0 <= flags.seed < 2**63:
        raise UserError(f"--seed is {flags.seed}\n  allowed: a whole number of at least 0")
    if flags.held_out is not None and not 0 < flags.held_out < 1:
        raise UserError(f"--held_out is {flags.held_out}\n  allowed: a number between 0 and 1")
    for name in ("fewshot_l2", "temperature"):
        value = getattr(flags, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"--{name} is {value}\n  allowed: a number above 0")
    given = {name: getattr(flags, name) for name in ("fewshot_l2", "temperature", "held_out")}
    if flags.probe_l2 is not None:
        given["probe_l2"] = _numbers("probe_l2", flags.probe_l2, float, 0)
    return Settings(
        methods=methods,
        shots=_numbers("shots", flags.shots, int, 1),
        neighbours=_numbers("neighbours", flags.neighbours, int, 1),
        draws=flags.draws,
        seed=flags.seed,
        **{name: value for name, value in given.items() if value is not None},
    )


def _numbers(name: str, text: str, kind: Callable[[str], float], least: float) -> tuple:
    try:
        found = tuple(sorted({kind(part) for part in text.split(",")}))
        if not all(least <= value < float("inf") for value in found):
            raise ValueError
        return found
    except ValueError:
        words = "whole numbers" if kind is int else "numbers"
        raise UserError(f"--{name}={text}\n  allowed: {words} of at least {least}, joined by commas") from None


def measure(flags: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """Computes the features, measures and writes; returns the file that was written and what is in it.

    Raises:
        UserError: a backbone, data or flags that will not do, or a place that cannot be written to.
    """
    wanted = settings(flags)
    from vit_jax import atomic
    from vit_jax.evaluation import frozen_features
    from vit_jax.runtime import compilation_cache

    compilation_cache.cache_compilations()
    out, about, train, test, names = _stored(flags, wanted) if flags.features else _computed(flags, wanted)
    measured = frozen_features.evaluate(train, test, len(names), wanted)
    content = {**about, "seed": wanted.seed, **measured}
    try:
        out.mkdir(parents=True, exist_ok=True)
        atomic.write_json(out / RESULTS, content)
    except OSError as error:
        raise UserError(f"--out={out} cannot be written to: {error.strerror}\n  give another --out") from error
    return out / RESULTS, content


Parts = tuple[Path, dict[str, Any], "Examples", "Examples", tuple[str, ...]]


def _stored(flags: argparse.Namespace, wanted: "Settings") -> Parts:
    """Where results go, what they are of, train, test and class names; of stored features."""
    from vit_jax.data import feature_store
    from vit_jax.evaluation import frozen_features

    folder = commands.folder_of(flags.features)
    train, test = (feature_store.read(feature_store.find(folder, role)) for role in ("train", "test"))
    if train.backbone != test.backbone:
        raise UserError(f"{train.path} and {test.path} were computed by different backbones\n  make one of them again")
    sources = [one.source((flags.label,)) for one in (train, test)]
    for one in (train, test):
        if one.features.ndim != 2:
            raise UserError(f"{one.path} holds every token's features\n  make it anew with a model that pools them")
    frozen_features.check(wanted, sources[0].labels, sources[0].class_names)
    about = {"init": str(folder), "data": train.about["name"], "train": sources[0].split, "test": sources[1].split}
    examples = (frozen_features.Examples(one.images, one.labels) for one in sources)
    return Path(flags.out).expanduser() if flags.out else folder, about, *examples, sources[0].class_names


def _computed(flags: argparse.Namespace, wanted: "Settings") -> Parts:
    """The same, of features that the backbone computes, or has computed."""
    from vit_jax import sharding
    from vit_jax.data import normalization, sources
    from vit_jax.evaluation import extraction, frozen_features

    name, data_dir, trained_size = _data(flags)
    splits, kinds = (flags.train, flags.test), (flags.label,)
    # Any size will do for now: which one it is, only the backbone tells.
    *_, channels = sources.check(name, splits, data_dir=data_dir, image_size=flags.image_size or 1, labels=kinds)
    if flags.normalize is not None:
        normalization.constants(flags.normalize, channels, "--normalize")
    fitted = {"image_size": flags.image_size, "channels": channels}
    asked = {"step": commands.step_of(flags.step), "pooling": flags.pooling}
    asked["pre_logits"] = flags.label if flags.pre_logits else None
    backbone = extraction.load(flags.init, **asked, **fitted)
    normalize = flags.normalize or backbone.normalization
    size = flags.image_size or backbone.image_size or trained_size
    loaded = [sources.load(name, split, data_dir=data_dir, image_size=size, labels=kinds) for split in splits]
    frozen_features.check(wanted, loaded[0].labels, loaded[0].class_names)
    out, mesh, made = _out(flags, name), sharding.make_mesh(None), []
    for role, source in zip(("train", "test"), loaded, strict=True):
        file, how = out / "features" / f"{role}.npz", {"normalize": normalize, "batch_size": flags.batch_size}
        features = extraction.store(file, backbone, source, mesh, **how).features
        made.append(frozen_features.Examples(extraction.after_pre_logits(backbone, features), source.labels))
    about = {
        "init": flags.init,
        "backbone": backbone.about,
        "pooling": backbone.model.pooling,
        "pre_logits": flags.pre_logits,
        "data": name,
        "train": flags.train,
        "test": flags.test,
        "label": flags.label,
        "image_size": list(loaded[0].images.shape[1:3]),
        "normalize": normalize,
    }
    return out, about, *made, loaded[0].class_names


def _data(flags: argparse.Namespace) -> tuple[str, str | None, tuple[int, int] | None]:
    """The set's name, where it lies, and the size of the images that a run was trained on: its own where none is named.

    Raises:
        UserError: there is no run to take them from.
    """
    from vit_jax.checkpoint.manager import FOLDER
    from vit_jax.training import input_spec, run_directory

    folder = commands.folder_of(flags.init)
    if flags.image_size is not None and flags.image_size < 1:
        raise UserError(f"--image_size is {flags.image_size}\n  allowed: a whole number of at least 1")
    config = run_directory.trained_config(folder) if (folder / FOLDER).is_dir() else None
    if config is None:
        if flags.data is None:
            raise UserError(f"--data is missing: {flags.init} is no run that would tell\n  e.g. --data=cifar10")
        return flags.data, flags.data_dir, None
    own = flags.data in (None, config.data.name)
    known = input_spec.read(folder)
    size = known.image_shape[:2] if known else config.data.image_size and (config.data.image_size,) * 2
    return flags.data or config.data.name, flags.data_dir or (config.data.dir if own else None), size


def _out(flags: argparse.Namespace, data: str) -> Path:
    if flags.out:
        return commands.folder_of(flags.out)
    folder, name = commands.folder_of(flags.init), re.sub(r"[^\w.-]+", "_", data)
    if folder.is_dir():
        return folder / "transfer" / name
    return Path("runs") / "transfer" / re.sub(r"[^\w.-]+", "_", folder.name) / name


def table(content: dict[str, Any]) -> str:
    """What was measured, for eyes."""
    rows = []
    for name, value in content.items():
        kind, _, rest = name.partition("/")
        if kind == "fewshot" and rest.endswith("/accuracy"):
            shots = rest.split("/")[0]
            std, count = content[f"fewshot/{shots}/std"], len(content[f"fewshot/{shots}/draws"])
            spread = f"+- {100 * std:.2f}, {count} draws" if std is not None else "one draw"
            rows.append((f"few-shot, {shots} a class", value, spread))
        elif kind == "knn" and rest.endswith("accuracy"):
            count, how = rest.split("/")
            rows.append((f"{count} nearest neighbours", value, "weighted" if how == "accuracy" else "majority"))
        elif name == "probe/accuracy":
            rows.append(("linear probe", value, f"L2 {content['probe/l2']:g}, chosen on held-out train"))
    width = max(len(row[0]) for row in rows)
    head = (
        f"{content['init']} on {content['data']}: features {content['width']} wide, {content['classes']} classes, "
        f"{content['train/examples']:,} train, {content['test/examples']:,} test"
    )
    return "\n".join([head, *(f"  {name:<{width}}  {100 * value:6.2f} %  {note}" for name, value, note in rows)])


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    flags = parse(arguments)

    def run() -> None:
        path, content = measure(flags)
        print(f"{table(content)}\nwritten: {path}")

    return commands.finish(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
