"""The command: python -m vit_jax.checkpoints list|verify|diff|average|restore-config DIR."""

import argparse
import sys
from pathlib import Path
from typing import Any

from vit_jax import commands
from vit_jax import config as options
from vit_jax.errors import UserError

DESCRIPTION = """\
Looks after the checkpoints of a run.

  python -m vit_jax.checkpoints list runs/cifar10            steps, dates, sizes, validation accuracies
  python -m vit_jax.checkpoints verify runs/cifar10          reads every array and compares it with its digest
  python -m vit_jax.checkpoints diff runs/a runs/b           what differs: config, and arrays by name
  python -m vit_jax.checkpoints diff runs/a runs/a --steps=1000,2000
  python -m vit_jax.checkpoints average runs/cifar10 --last=5 --out=mean.safetensors  the mean of parameters
  python -m vit_jax.checkpoints restore-config runs/cifar10  writes config.json anew from the newest checkpoint

Nothing but `average` and `restore-config` writes. What `average` writes is read wherever weights are: by
--config.checkpoint.init_from, vit_jax.evaluate --weights and vit_jax.convert.
The exit status is 1 where `verify` finds damage, or `diff` a difference.
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command's flags; --help and mistakes end the process, the latter with status 2."""
    parser = commands.parser("checkpoints", DESCRIPTION)
    parser.add_argument("action", choices=tuple(ACTIONS))
    parser.add_argument("workdirs", metavar="DIR", nargs="+", help="the folder of a run (two of them for diff)")
    parser.add_argument("--step", type=int, help="verify: this one alone (default: all); restore-config: its config")
    parser.add_argument("--steps", metavar="N,N", help="diff: of these steps (default: the newest of each); average")
    parser.add_argument("--last", type=int, metavar="N", help="average: of the newest so many (default: all there are)")
    parser.add_argument("--out", metavar="FILE", help="average: the file to write, .safetensors")
    flags = parser.parse_args(arguments)
    if len(flags.workdirs) != (2 if flags.action == "diff" else 1):
        parser.error(f"{flags.action} takes {'two folders' if flags.action == 'diff' else 'one folder'}")
    return flags


def _open(workdir: str):
    from vit_jax.checkpoint.manager import FOLDER, Checkpoints

    folder = commands.folder_of(workdir)
    if not (folder / FOLDER).is_dir():
        raise UserError(f"{workdir} holds no checkpoints\n  give the folder of a run: what --workdir was")
    return Checkpoints(folder, read_only=True)


def list_all(flags: argparse.Namespace) -> int:
    """Prints a line a checkpoint."""
    import time

    checkpoints = _open(flags.workdirs[0])
    best = checkpoints.best()
    print(f"{'step':>10}  {'written':<19}  {'size':>10}  validation")
    for step in checkpoints.steps():
        path = checkpoints.folder / str(step)
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(path.stat().st_mtime))
        score = checkpoints.score(step)
        # A run without an accuracy is scored by its loss, the sign turned.
        shown = "-" if score is None else f"accuracy {100 * score:.2f} %" if score >= 0 else f"loss {-score:.4f}"
        shown += "  best" if best and best[0] == step else ""
        print(f"{step:>10,}  {written}  {size / 2**20:>6.1f} MiB  {shown}")
    return 0


def verify(flags: argparse.Namespace) -> int:
    """Prints a line a checkpoint: whole, or what of it is damaged."""
    checkpoints = _open(flags.workdirs[0])
    steps = checkpoints.steps() if flags.step is None else [checkpoints.existing(flags.step)]
    if not steps:
        raise UserError(f"{checkpoints.folder} has no checkpoint; set aside were {len(checkpoints.set_aside())}")
    damaged = 0
    for step in steps:
        reason = checkpoints.damage(step)
        damaged += reason is not None
        print(f"step {step:,}: {'whole' if reason is None else reason}")
    print(f"{len(steps) - damaged} of {len(steps)} are whole")
    return 1 if damaged else 0


def diff(flags: argparse.Namespace) -> int:
    """Prints what differs between two checkpoints."""
    sides: list[dict[str, Any]] = []
    steps: list[str | None] = [None, None]
    if flags.steps is not None:
        steps = flags.steps.split(",")
        if len(steps) != 2 or not all(step.strip().isdigit() for step in steps):
            raise UserError(f"--steps={flags.steps}\n  allowed: two steps, as --steps=1000,2000")
    for workdir, step in zip(flags.workdirs, steps, strict=True):
        checkpoints = _open(workdir)
        number = checkpoints.existing(None if step is None else int(step))
        sides.append({"step": number, **checkpoints.beside(number)})
    one, two = sides
    rows = [f"step: {one['step']} -> {two['step']}"] if one["step"] != two["step"] else []
    configs = (side["metadata"].get("config", {}) for side in sides)
    rows += [f"config.{row}" for row in options.differences(*configs)]
    for name in sorted({*one["digests"], *two["digests"]}):
        kinds = [side["digests"].get(name, "not there").split(" ")[0] for side in sides]
        if kinds[0] != kinds[1]:
            rows.append(f"{name}: {kinds[0]} -> {kinds[1]}")
        elif one["digests"].get(name) != two["digests"].get(name):
            rows.append(f"{name}: {kinds[0]}, other numbers")
    print("\n".join(rows) if rows else f"the same: {len(one['digests'])} arrays and the config")
    return 1 if rows else 0


def restore_config(flags: argparse.Namespace) -> int:
    """Writes config.json from what a checkpoint was saved with."""
    from vit_jax import atomic
    from vit_jax.checkpoint import run_files

    checkpoints = _open(flags.workdirs[0])
    step = checkpoints.existing(flags.step)
    config = checkpoints.metadata(step)["config"]
    options.from_dict(config)
    path = Path(flags.workdirs[0]).expanduser() / run_files.CONFIG
    atomic.write_json(path, config)
    print(f"{path}: as of step {step:,}, {sum(map(len, config.values()))} options")
    return 0


def average(flags: argparse.Namespace) -> int:
    """Writes the mean of the parameters of several checkpoints."""
    from vit_jax.weights import native

    out = Path(flags.out or "").expanduser()
    if out.suffix != ".safetensors":
        raise UserError(f"--out={flags.out}\n  allowed: a name that ends in .safetensors")
    if flags.steps is not None and flags.last is not None:
        raise UserError(f"--steps={flags.steps} and --last={flags.last}\n  give one of them")
    checkpoints = _open(flags.workdirs[0])
    there, folder = checkpoints.steps(), checkpoints.folder.parent
    if flags.last is not None and not 1 <= flags.last <= len(there):
        raise UserError(f"--last={flags.last}\n  allowed: 1 to {len(there)}, as many checkpoints as there are")
    if flags.steps is None:
        wanted = there[-(flags.last or len(there)) :]
    elif all(step.strip().isdecimal() for step in flags.steps.split(",")):
        wanted = sorted({checkpoints.existing(int(step)) for step in flags.steps.split(",")})
    else:
        raise UserError(f"--steps={flags.steps}\n  allowed: steps with commas between them: {_few(there)}")
    if not wanted:
        raise UserError(f"{checkpoints.folder} has no checkpoint")
    native.average(folder, wanted, out)
    print(f"{out}: the mean of the parameters of {len(wanted)} checkpoints, steps {_few(wanted)}")
    return 0


def _few(steps: list[int]) -> str:
    return ", ".join(f"{step}" for step in steps[:8]) + (f" and {len(steps) - 8} more" if len(steps) > 8 else "")


ACTIONS = {"list": list_all, "verify": verify, "diff": diff, "average": average, "restore-config": restore_config}


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    flags = parse(arguments)
    return commands.finish(lambda: ACTIONS[flags.action](flags))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
