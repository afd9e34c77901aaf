"""The training command: python -m vit_jax.main --config=CONFIG[:ARG] [--workdir=DIR] [--config.SECTION.OPTION=...]."""

import argparse
import sys

from vit_jax import commands, config, paths, report, terminal
from vit_jax.checkpoint import run_files
from vit_jax.config import document
from vit_jax.errors import UserError, nearest

DESCRIPTION = """\
Trains a Vision Transformer. The same command resumes a run that was stopped; so does --workdir=DIR alone.

  %(prog)s --config=digits
  %(prog)s --config=cifar10:cpu --workdir=runs/first
  %(prog)s --config=cifar10:S --config.train.epochs=100
  %(prog)s --workdir=runs/first
"""
EPILOG = """\
CONFIG is a shipped config (below), a Python file (mine.py, configs/mine.py), or the config.json of
a run. Options of a config, with their values:
  %(prog)s --config=cifar10 --help

docs/options.md describes all options.
"""


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command's flags; config overrides are removed from the arguments beforehand."""
    parser = terminal.Parser(
        prog=terminal.prog("vit_jax.main"),
        usage="%(prog)s --config=CONFIG[:ARG] [--workdir=DIR] [--config.SECTION.OPTION=VALUE ...]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--config", metavar="CONFIG[:ARG]", help="config and its argument (default: that of the run)")
    parser.add_argument("--workdir", metavar="DIR", help="run directory (default: runs/<config>-<ARG>)")
    parser.add_argument("--parameters", action="store_true", help="print the table of all parameters before training")
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
        flags.config = _config_of_run(flags.workdir)
    return flags, overrides


def _config_of_run(workdir: str | None) -> str:
    """Returns the path of the config.json of a run directory.

    Raises:
        UserError: there is none.
    """
    if workdir is not None and (file := paths.expand(workdir, "--workdir") / run_files.CONFIG).is_file():
        return str(file)
    raise UserError("--config is missing\n  for example: python -m vit_jax.main --config=digits")


def _unknown(argument: str) -> UserError:
    """Returns the error for an unknown argument, with what to type in its place."""
    name, equals, value = argument.lstrip("-").partition("=")
    near = config.nearest_options(name) if argument.startswith("-") or equals else []
    way_out = "options are --config.SECTION.OPTION=VALUE; see --help"
    if flag := nearest(name, ("config", "workdir", "help"), cutoff=0.75):
        way_out = f"nearest: --{flag[0]}{equals}{value}"
    elif not equals and (name.endswith(".py") or name.partition(":")[0] in config.shipped()):
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
        terminal.output(f"configs, for --config=CONFIG or --config=CONFIG:ARG:\n{document.shipped_configs()}")
        return
    loaded = commands.load_config(spec)
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
    from vit_jax.training import describe, multi_seed, train

    compilation_cache.cache_compilations()
    trained = train.train if made.train.seeds is None else multi_seed.train
    with report.at_end(made, workdir, flags.config):
        trained(made, workdir, shown=describe.Shown(parameters=flags.parameters))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
