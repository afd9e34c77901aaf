"""The command `python -m vit_jax.report`, and the report that a run writes at its end."""

import argparse
import contextlib
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from vit_jax import atomic, commands, paths, terminal
from vit_jax.checkpoint import run_files
from vit_jax.errors import UserError, few, one_line

DESCRIPTION = """\
Writes a report of a run as one HTML file, which needs no network and no scripts: result, curves, confusion matrix,
calibration, mistakes, augmented images, pictures of the model, configuration and environment.

  %(prog)s runs/digits
  %(prog)s runs/digits --out=digits.html
  %(prog)s runs/first runs/second --out=comparison.html

A run writes report.html into its directory when it finishes, unless config.log.report=False. Directories of several
seeds (mean and standard deviation), of a learning-rate sweep, and several directories (what differs, and all curves)
have a table of results and curves. If the dataset of a run was moved, --data_dir gives its directory; without it, what
needs images is left out.
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the command's flags; --help and wrong flags end the process, the latter with status 2."""
    parser = commands.parser("report", DESCRIPTION)
    parser.add_argument("directories", metavar="DIR", nargs="*", help="run directories")
    parser.add_argument("--workdir", metavar="DIR", nargs="+", action="extend", default=[], help="the same")
    parser.add_argument("--out", metavar="FILE", help="file to write (default: report.html in DIR; of several: above)")
    parser.add_argument("--data_dir", metavar="DIR", help="directory of the dataset (default: the run's)")
    flags = parser.parse_args(arguments)
    if not flags.directories + flags.workdir:
        parser.error("the run directory is missing, for example runs/digits")
    return flags


def report(flags: argparse.Namespace) -> None:
    """Writes the report and says where.

    Raises:
        UserError: a directory holds no run, or a file cannot be read or written.
    """
    from vit_jax.reporting.records import REPORT

    workdirs = [paths.expand(one, "--workdir") for one in flags.directories + flags.workdir]
    if flags.out is not None:
        out = paths.expand(flags.out, "--out")
    else:
        out = (
            Path(os.path.commonpath([one.absolute() for one in workdirs]) if len(workdirs) > 1 else workdirs[0])
            / REPORT
        )
    if out.is_dir() or (flags.out is not None and not out.parent.is_dir()):
        raise UserError(
            f"--out={out} cannot be written\n  use a file name, such as report.html, in a directory that exists"
        )
    terminal.say(f"wrote {out}: {write(workdirs, out, flags.data_dir) / 1e6:.2f} MB")


def write(
    workdirs: Sequence[Path], out: Path, data_dir: str | None = None, spec: str | None = None, limited: bool = False
) -> int:
    """Writes the report of a run, of several seeds, or of several runs; returns its size in bytes.

    Args:
        workdirs: directories of runs, of several seeds, or of sweeps.
        out: the file.
        data_dir: directory of the dataset of a single run; None for the run's.
        spec: 'CONFIG[:ARG]' of a single run, if it is known.
        limited: leave the evaluation out if it would take long (`report_evaluation.too_long`).

    Raises:
        UserError: a directory holds no run, or a file cannot be read or written.
    """
    from vit_jax import report_evaluation
    from vit_jax.reporting import pages, records

    sweeps = [records.sweep_runs(one) for one in workdirs]
    every = [run for one, sweep in zip(workdirs, sweeps, strict=True) for run in (sweep or [one])]
    runs = [records.read(one) for one in every]
    if len(runs) > 1:
        title = workdirs[0].absolute().name if len(workdirs) == 1 else f"Comparison of {len(runs)} runs"
        subtitle = f"learning-rate sweep, {len(runs)} runs" if len(workdirs) == 1 else few(map(str, workdirs), 5)
        text = pages.of_runs(runs, title, subtitle, out)
    elif runs[0].seeds:
        text = pages.of_seeds(runs[0], out, spec)
    else:
        text = pages.of_run(runs[0], *report_evaluation.evaluate(runs[0], data_dir, limited), spec)
    content = text.encode()
    try:
        atomic.write_bytes(out, content)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}\n  write it elsewhere: --out=FILE") from error
    return len(content)


@contextlib.contextmanager
def at_end(config: ConfigDict, workdir: Path, spec: str | None = None) -> Iterator[None]:
    """Writes the report after training in this context, if that has finished the run; a failure is a warning.

    Args:
        config: of the run; nothing is written if `log.report` is False.
        workdir: the run directory, also of several seeds.
        spec: 'CONFIG[:ARG]' that was given.
    """
    before = _time_of_summary(workdir)
    yield
    from vit_jax.sharding import multihost

    if config.log.report and multihost.is_rank_0() and _time_of_summary(workdir) not in (None, before):
        if spec is not None and Path(spec).name == run_files.CONFIG:  # the run's own: it was resumed without its config
            spec = None
        _try_to_write(workdir, spec)


def _time_of_summary(workdir: Path) -> int | None:
    try:
        return (workdir / run_files.SUMMARY).stat().st_mtime_ns
    except OSError:
        return None


def _try_to_write(workdir: Path, spec: str | None) -> None:
    from vit_jax.reporting.records import REPORT

    began = time.monotonic()
    try:
        write([workdir], workdir / REPORT, spec=spec, limited=True)
        terminal.say(f"wrote {workdir / REPORT} in {time.monotonic() - began:.1f} s")
    except Exception as error:
        later = f"vit-jax report {shlex.quote(str(workdir))}"
        terminal.warn(f"warning: no report was written: {one_line(error)}; to try again: {later}")


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit status."""
    return commands.finish(lambda: report(parse(arguments)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
