"""The training command: python -m vit_jax.main --config=FILE[:ARG] [--workdir=DIR] [--config.SECTION.OPTION=VALUE]."""

import argparse
import sys

from vit_jax import commands, config, paths, terminal
from vit_jax.config import document
from vit_jax.errors import UserError, nearest

DESCRIPTION = """\
Trains a Vision Transformer. The same command resumes a run that was stopped.

  python -m vit_jax.main --config=configs/digits.py
  python -m vit_jax.main --config=configs/cifar10.py:cpu --workdir=runs/first
  python -m vit_jax.main --config=configs/cifar10.py --config.model.variant=S/4 --config.train.epochs=100
"""
EPILOG = """\
options of a config, with the values that they have there:
  python -m vit_jax.main --config=configs/cifar10.py --help

docs/options.md describes all options.
"""


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's flags; config overrides are removed from the arguments beforehand."""
    parser = terminal.Parser(
        prog="python -m vit_jax.main",
        usage="%(prog)s --config=FILE[:ARG] [--workdir=DIR] [--config.SECTION.OPTION=VALUE ...]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", metavar="FILE[:ARG]", help="config file and its argument; see configs/")
    parser.add_argument("--workdir", metavar="DIR", help="run directory (default: runs/<config name>)")
    parser.add_argument("-h", "--help", action="store_true", help="show this help; with --config, the config's options")
    return parser


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the flags, and the overrides as 'section.option=value'.

    Raises:
        UserError: an unknown argument, or --config is missing.
    """
    overrides, rest = commands.take_overrides(arguments)
    try:
        flags, unknown = make_parser().parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}\n  see python -m vit_jax.main --help") from None
    if unknown:
        raise _unknown(unknown[0])
    if flags.config is None and not flags.help:
        raise UserError("--config is missing\n  for example: python -m vit_jax.main --config=configs/digits.py")
    return flags, overrides


def _unknown(argument: str) -> UserError:
    """Returns the error for an unknown argument, with what to type in its place."""
    name, equals, value = argument.lstrip("-").partition("=")
    near = config.nearest_options(name) if argument.startswith("-") or equals else []
    way_out = "options are --config.SECTION.OPTION=VALUE; see --help"
    if flag := nearest(name, ("config", "workdir", "help"), cutoff=0.75):
        way_out = f"nearest: --{flag[0]}{equals}{value}"
    elif name.endswith(".py") and not equals:
        way_out = f"nearest: --config={name}"
    elif note := config.note(name):
        way_out = note
    elif near:
        value = value if config.takes_same_values(name, near[0]) else ""
        way_out = f"nearest: --config.{near[0]}={value or 'VALUE'}"
    return UserError(f"unknown argument: {argument}\n  {way_out}")


def show_help(spec: str | None, overrides: list[str]) -> None:
    """Prints the command's help, or the options of a config with the overrides of the command line.

    Raises:
        UserError: the config cannot be loaded, or an override is wrong.
    """
    if spec is None:
        terminal.output(make_parser().format_help())
        terminal.output(f"configs, for --config=FILE or --config=FILE:ARG:\n{document.shipped_configs()}")
        return
    loaded = config.load(spec)
    read_in_file = config.read_options(loaded)
    config.reset_unread(loaded, read_in_file - config.override_all(loaded, overrides).typed)
    terminal.output(document.describe(loaded, spec))


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    return commands.finish(lambda: run(arguments))


def run(arguments: list[str]) -> None:
    """Trains as the arguments say, or shows the help.

    Raises:
        UserError: a mistake in the arguments, or a failure that the user can fix.
    """
    flags, overrides = parse(arguments)
    if flags.help:
        show_help(flags.config, overrides)
        return
    if flags.workdir is not None:
        workdir = paths.expand(flags.workdir, "--workdir")
    else:
        workdir = paths.expand(commands.default_workdir(flags.config), "--config")
    made = commands.make_config(flags.config, overrides, workdir)
    # Imported only now, so that mistakes on the command line are reported at once.
    from vit_jax.runtime import compilation_cache
    from vit_jax.training import multi_seed, train

    compilation_cache.cache_compilations()
    trained = train.train if made.train.seeds is None else multi_seed.train
    trained(made, workdir)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
