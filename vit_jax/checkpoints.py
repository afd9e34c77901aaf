"""The command: python -m vit_jax.checkpoints list|verify|diff|average|restore-config DIR."""

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING, Any

from vit_jax import commands, paths, terminal
from vit_jax import config as options
from vit_jax.errors import UserError, few

if TYPE_CHECKING:
    import numpy as np

    from vit_jax.checkpoint.manager import CheckpointManager

    Arrays = dict[str, np.ndarray]

SHOWN = 5  # arrays that `diff` shows without --all
DESCRIPTION = """\
Lists, verifies, compares and averages the checkpoints of a run.

  %(prog)s list runs/cifar10            steps, dates, sizes, validation metrics, changed options
  %(prog)s verify runs/cifar10          reads every array and compares it with its digest
  %(prog)s diff runs/a runs/b           differences in the config and in the arrays
  %(prog)s diff runs/a runs/a --steps=1000,2000 --all
  %(prog)s average runs/cifar10 --last=2 --out=mean.safetensors  the mean of the parameters
  %(prog)s restore-config runs/cifar10  writes config.json and changes.jsonl from the newest

Two checkpoints are kept; to average more, train with --config.checkpoint.keep=5.
Only `average` and `restore-config` write files. A file written by `average` can be used wherever weights are read:
--config.checkpoint.init_from, vit-jax evaluate --weights, vit-jax convert.
The exit status is 1 if `verify` finds a corrupt checkpoint or `diff` finds a difference.
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command's flags; --help and wrong flags end the process, the latter with status 2."""
    parser = commands.parser("checkpoints", DESCRIPTION)
    parser.add_argument("action", choices=tuple(ACTIONS))
    parser.add_argument("workdirs", metavar="DIR", nargs="+", help="a run directory (two of them for diff)")
    parser.add_argument("--step", type=int, help="verify, restore-config: this checkpoint (default: all, the newest)")
    parser.add_argument(
        "--steps", metavar="N,N", help="diff: the step of each run (default: the newest); average: the steps"
    )
    parser.add_argument("--all", action="store_true", help="diff: list every array that differs, not only the largest")
    parser.add_argument("--last", type=int, metavar="N", help="average: the newest N checkpoints (default: all)")
    parser.add_argument("--out", metavar="FILE", help="average: the file to write, .safetensors")
    flags = parser.parse_args(arguments)
    if len(flags.workdirs) != (2 if flags.action == "diff" else 1):
        parser.error(f"{flags.action} needs {'two run directories' if flags.action == 'diff' else 'one run directory'}")
    return flags


def _open(workdir: str):
    from vit_jax.checkpoint import run_files
    from vit_jax.checkpoint.manager import CheckpointManager

    path = paths.expand(workdir, "WORKDIR")
    if not run_files.has_checkpoints(path):
        raise UserError(f"{workdir} has no checkpoints\n  use a run directory, as in vit_jax.main --workdir=DIR")
    commands.start_jax()
    return CheckpointManager(path, read_only=True)


def list_all(flags: argparse.Namespace) -> int:
    """Prints one line per checkpoint."""
    import time

    manager = _open(flags.workdirs[0])
    best = manager.best()
    terminal.output(f"{'step':>10}  {'written':<19}  {'size':>10}  validation")
    for step in manager.steps():
        path = manager.directory / str(step)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))
        metrics = manager.content(step)["metrics"] if manager.has(step) else {}
        shown = ", ".join(_metric(name, value) for name, value in metrics.items()) or "-"
        shown += "  best" if best and best[0] == step else ""
        terminal.output(f"{step:>10,}  {written}  {size / 2**20:>6.1f} MiB  {shown}")
    _list_changes(manager)
    return 0


def _list_changes(manager: "CheckpointManager") -> None:
    """Prints the steps at which options of the config changed, and where config.json is not what was trained."""
    from vit_jax.checkpoint import run_files

    workdir, intact = manager.directory.parent, [step for step in manager.steps() if manager.has(step)]
    if not intact:
        return
    metadata = manager.metadata(intact[-1])
    for change in run_files.changes_until(workdir, intact[-1], metadata):
        since = f"from step {change['step']:,} on" if "step" in change else "at an unknown step"
        terminal.output(f"changed {since}: {'; '.join(change['changes'])}  ({change.get('time', 'no time')})")
    written = None
    with contextlib.suppress(UserError):  # commands that need config.json report what is wrong with it
        written = run_files.read_config(workdir)
    if written is not None and (rows := options.differences(written, metadata.get("config", written))):
        terminal.output(
            f"{run_files.CONFIG} differs from what was trained: {few(rows)}\n"
            f"  restore it: python -m vit_jax.checkpoints restore-config {workdir}"
        )


def _metric(name: str, value: float) -> str:
    """Returns 'accuracy 97.50 %' or 'loss 0.1234', without the split."""
    name = name.rpartition("/")[2]
    return f"{name} {100 * value:.2f} %" if name == "accuracy" else f"{name} {value:.4f}"


def verify(flags: argparse.Namespace) -> int:
    """Prints one line per checkpoint: intact, or what is corrupt."""
    manager = _open(flags.workdirs[0])
    steps = manager.steps() if flags.step is None else [manager.find(flags.step)]
    if not steps:
        raise UserError(
            f"{manager.directory} has no checkpoint ({len(manager.corrupt())} were moved away as corrupt)\n"
            "  use another run directory, or train this one again"
        )
    num_corrupt = 0
    for step in steps:
        problem = manager.verify(step)
        num_corrupt += problem is not None
        terminal.output(f"step {step:,}: {problem or 'intact'}")
    terminal.output(f"{len(steps) - num_corrupt} of {len(steps)} are intact")
    return 1 if num_corrupt else 0


def diff(flags: argparse.Namespace) -> int:
    """Prints the differences between two checkpoints; of the arrays a summary, or all of them with --all."""
    sides: list[dict[str, Any]] = []
    managers = []
    steps = _parse_steps(flags.steps) if flags.steps is not None else [None, None]
    if len(steps) != 2:
        raise UserError(f"--steps={flags.steps}\n  allowed: two steps, such as --steps=1000,2000")
    for workdir, wanted in zip(flags.workdirs, steps, strict=True):
        manager = _open(workdir)
        step = manager.find(wanted)
        managers.append(manager)
        sides.append({"step": step, **manager.content(step)})
    one, two = sides
    rows = [f"step: {one['step']} -> {two['step']}"] if one["step"] != two["step"] else []
    configs = (side["metadata"].get("config", {}) for side in sides)
    rows += [f"config.{row}" for row in options.differences(*configs)]
    names = sorted({*one["digests"], *two["digests"]})
    changed = {}
    for name in names:
        shapes = [side["digests"].get(name, "missing").split(" ")[0] for side in sides]
        if shapes[0] != shapes[1]:
            changed[name] = f"{name}: {shapes[0]} -> {shapes[1]}"
        elif one["digests"].get(name) != two["digests"].get(name):
            changed[name] = f"{name}: {shapes[0]}, values differ"
    if flags.all or not changed:
        rows += changed.values()
    else:
        parameters = [
            manager.read_part(side["step"], "parameters") for manager, side in zip(managers, sides, strict=True)
        ]
        rows += summarize_arrays(names, changed, *parameters)
    terminal.output(
        "\n".join(rows) if rows else f"no difference: {len(one['digests'])} arrays and the config are equal"
    )
    return 1 if rows else 0


def summarize_arrays(names: list[str], changed: dict[str, str], one: "Arrays", two: "Arrays") -> list[str]:
    """Returns the rows of a short comparison: the number of changed arrays per module, and the largest differences.

    Args:
        names: of all arrays.
        changed: for the name of an array that has changed, the row about it.
        one: the parameters of the first checkpoint, by name.
        two: the parameters of the second one.
    """
    import numpy as np

    both = [name for name in changed if name in one and name in two and one[name].shape == two[name].shape]
    squares = {name: np.square(np.subtract(two[name], one[name], dtype=np.float64)).sum() for name in both}
    sizes = {name: np.square(one[name], dtype=np.float64).sum() for name in both}

    def relative(members: list[str]) -> float:
        """The norm of the differences over the norm of the first arrays."""
        size = sum(sizes[name] for name in members)
        return float(np.sqrt(sum(squares[name] for name in members) / size)) if size else np.inf

    modules: dict[str, list[str]] = {}
    for name in names:
        parts = name.split("/")
        modules.setdefault("/".join(parts[: 2 if parts[0] == "parameters" else 1]), []).append(name)
    rows = []
    modules.pop("step", None)  # has a row of its own
    for module, members in modules.items():
        count, compared = sum(name in changed for name in members), [name for name in members if name in squares]
        if members == [module]:
            rows += [changed[module]] if count else []
        elif count:
            by = f", relative difference {relative(compared):.3g}" if compared else ""
            rows.append(f"{module}: {count} of {len(members)} arrays differ{by}")
    largest = sorted(both, key=lambda name: -relative([name]))[:SHOWN]
    others = [row for name, row in changed.items() if name.startswith("parameters/") and name not in squares][:SHOWN]
    rows += [*others, *(f"{changed[name]}, relative difference {relative([name]):.3g}" for name in largest)]
    return [*rows, f"with --all: each of the {len(changed)} arrays that differ"]


def _parse_steps(text: str) -> list[int]:
    if not all(step.strip().isdecimal() for step in text.split(",")):
        raise UserError(f"--steps={text}\n  allowed: steps separated by commas, such as --steps=1000,2000")
    return [int(step) for step in text.split(",")]


def restore_config(flags: argparse.Namespace) -> int:
    """Writes config.json and changes.jsonl from a checkpoint."""
    from vit_jax.checkpoint import run_files

    manager = _open(flags.workdirs[0])
    step = manager.find(flags.step)
    config = manager.metadata(step)["config"]
    options.from_dict(config)
    path = manager.directory.parent / run_files.CONFIG
    run_files.write_config(path.parent, config, run_files.changes_until(path.parent, step, manager.metadata(step)))
    terminal.say(f"{path}: written from the checkpoint of step {step:,}, {sum(map(len, config.values()))} options")
    return 0


def average(flags: argparse.Namespace) -> int:
    """Writes the mean of the parameters of several checkpoints."""
    from vit_jax.weights import native

    out = paths.expand(flags.out, "--out") if flags.out else None
    if out is None or out.suffix != ".safetensors":
        raise UserError(f"--out is {flags.out or 'missing'}\n  allowed: a file name that ends in .safetensors")
    if flags.steps is not None and flags.last is not None:
        raise UserError(f"--steps={flags.steps} and --last={flags.last} cannot be combined\n  use one of them")
    manager = _open(flags.workdirs[0])
    existing = manager.steps()
    if flags.last is not None and not 1 <= flags.last <= len(existing):
        found = f"{len(existing)} checkpoints, of steps" if len(existing) > 1 else "one checkpoint, of step"
        more = f"; to keep {flags.last}, train with --config.checkpoint.keep={flags.last}" if flags.last > 1 else ""
        raise UserError(
            f"--last={flags.last}: {flags.workdirs[0]} has {found} {few(map(str, existing), 8)}\n"
            f"  use --last={len(existing)} to average what there is{more}"
        )
    if flags.steps is None:
        steps = existing[-(flags.last or len(existing)) :]
    else:
        steps = sorted({manager.find(step) for step in _parse_steps(flags.steps)})
    if not steps:
        raise UserError(f"{manager.directory} has no checkpoint\n  allowed: a run directory with checkpoints")
    native.average(manager.directory.parent, steps, out)
    terminal.say(f"{out}: mean of the parameters of {len(steps)} checkpoints, steps {few(map(str, steps), 8)}")
    return 0


ACTIONS = {"list": list_all, "verify": verify, "diff": diff, "average": average, "restore-config": restore_config}


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""

    def run() -> int:
        flags = parse(arguments)
        return ACTIONS[flags.action](flags)

    return commands.finish(run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
