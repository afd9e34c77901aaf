"""The command: python -m vit_jax.main --config=FILE[:ARG] [--workdir=DIR] [--config.section.key=value ...]."""

import argparse
import sys
import textwrap

from vit_jax import commands
from vit_jax import config as options
from vit_jax.errors import UserError

DESCRIPTION = """\
Trains a Vision Transformer. The same command again goes on where it stopped.

  python -m vit_jax.main --config=configs/digits.py
  python -m vit_jax.main --config=configs/cifar10.py:cpu --workdir=runs/first
  python -m vit_jax.main --config=configs/cifar10.py --config.model.variant=S/4 --config.train.epochs=100
"""


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own flags, and the overrides as 'section.key=value'.

    Raises:
        UserError: an argument that is neither.
    """
    overrides, rest = commands.take_overrides(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m vit_jax.main",
        description=DESCRIPTION,
        epilog=_describe_options(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "--config", metavar="FILE[:ARG]", help="a Python file with a function get_config (see configs/)"
    )
    parser.add_argument("--workdir", metavar="DIR", help="where results go (default: runs/<config name>)")
    try:
        flags, unknown = parser.parse_known_args(rest)
    except argparse.ArgumentError as error:
        raise UserError(f"{error}\n  see python -m vit_jax.main --help") from None
    if unknown:
        raise UserError(f"unknown argument: {unknown[0]}\n  options are --config.section.key=value; see --help")
    if flags.config is None:
        raise UserError("--config is missing\n  e.g. python -m vit_jax.main --config=configs/digits.py")
    return flags, overrides


def _describe_options() -> str:
    lines = ["every option (--config.section.key=value), its default before the config file's, and its meaning:"]
    for section, keys in options.OPTIONS.items():
        lines.append("")
        for key, option in keys.items():
            lines.append(f"  {f'{section}.{key} = {option.default}':<40} {option.meaning}")
            if option.choices:
                lines.append(textwrap.indent(f"({', '.join(option.choices)})", " " * 43))
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    return commands.finish(lambda: run(arguments))


def run(arguments: list[str]) -> None:
    """Trains as the arguments say.

    Raises:
        UserError: what is wrong, and the way out.
    """
    flags, overrides = parse(arguments)
    config = commands.make_config(flags.config, overrides)
    # Imported only now: what is wrong with the line typed is said at once.
    from vit_jax.runtime import compilation_cache
    from vit_jax.training import together, train

    compilation_cache.cache_compilations()
    trained = train.train if config.train.seeds is None else together.train
    folder = commands.folder_of(flags.workdir) if flags.workdir else commands.default_workdir(flags.config)
    trained(config, folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
