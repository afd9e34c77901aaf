"""The report of one run, and of several: which sections it has."""

import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from vit_jax import __version__, progress
from vit_jax.errors import few
from vit_jax.reporting import charts, curves, evaluated, sections
from vit_jax.reporting.evaluated import Evaluated, interval, percent
from vit_jax.reporting.html import Html, element, escape, join, page, section, table
from vit_jax.reporting.records import REPORT, Run, finite

METRICS = ("accuracy", "top5", "loss")
FOOTER = f"vit_jax {__version__}"


def of_run(run: Run, found: Evaluated | None, reason: str | None, spec: str | None = None) -> str:
    """Returns the report of a run of one seed.

    Args:
        run: its files.
        found: its evaluation; None if there is none.
        reason: why there is none.
        spec: as of `sections.configuration`.
    """
    notes = [reason] if reason else []
    parts = [("result", "Results", sections.results(run, found, [*notes, *(found.missing if found else ())]))]
    if drawn := curves.of_run(run):
        parts.append(("curves", "Curves", _with_note(curves.draw(drawn), run)))
    if found is not None and found.heads:
        parts.append(("classes", "Classes", evaluated.classes(found)))
        parts.append(("calibration", "Calibration", evaluated.calibration(found)))
        parts.append(("mistakes", "Most confident mistakes", evaluated.mistakes(found)))
    if found is not None and found.samples:
        parts.append(("samples", "Training images", evaluated.samples(found)))
    if found is not None and found.pictures:
        parts.append(("model", "What the model learned", evaluated.pictures(found)))
    parts.append(("configuration", "Configuration", sections.configuration(run, spec)))
    parts.append(("environment", "Environment", sections.environment(run)))
    return _page(run.name, sections.header(run), parts)


def of_seeds(run: Run, out: Path, spec: str | None = None) -> str:
    """Returns the report of the runs of several seeds of one config; `out` is where it is written."""
    rows = [_row(of_seed, f"seed {seed}", out) for seed, of_seed in run.seeds.items()]
    if run.summary is not None:
        rows.append(_row(run, f"mean ± std of {len(run.seeds)} seeds", None))
    first = shlex.quote(str(next(iter(run.seeds.values())).workdir))
    note = f"± is the sample standard deviation over the seeds. The predictions of one seed: vit-jax report {first}"
    content = [table("Results of the seeds", *_columns(rows)), element("p", note, class_="note")]
    parts = [("result", "Results", join(content))]
    if drawn := curves.of_run(run):
        note = "Lines are means over the seeds, bands one sample standard deviation to each side."
        parts.append(("curves", "Curves", join([element("p", note, class_="note"), curves.draw(drawn)])))
    parts.append(("configuration", "Configuration", sections.configuration(run, spec)))
    parts.append(("environment", "Environment", sections.environment(run)))
    return _page(run.name, sections.header(run), parts)


def of_runs(runs: Sequence[Run], title: str, subtitle: str, out: Path) -> str:
    """Returns the comparison of several runs: what differs between their configs, their results and curves."""
    labels, values = _labels(runs), [sections.all_options(run.config) for run in runs]
    names = [name for name in values[0] if len({one[name] for one in values}) > 1 and not sections.is_free(name)]
    header, cells = _columns([_row(run, label, out) for run, label in zip(runs, labels, strict=True)])
    best, rows = _best(runs), []
    for index, (row, of_run) in enumerate(zip(cells, values, strict=True)):
        first = join([row[0], element("span", "best", class_="tag") if index == best else None])
        rows.append([first, *(of_run[name] for name in names), *row[1:]])
    options = [Html(escape(name).replace(".", ".<wbr>")) for name in names]
    content = table("Runs", [header[0], *options, *header[1:]], rows)
    parts = [("result", "Runs", join([content, _explained(runs)]))]
    if drawn := curves.of_runs(runs, labels):
        parts.append(("curves", "Curves", curves.draw(drawn, shared_legend=True)))
    parts.append(("commands", "Commands", _commands(runs, labels)))
    about = element("p", "vit_jax run report", class_="about")
    head = join([about, element("h1", title), element("p", subtitle, class_="result")])
    return _page(title, head, parts)


def _labels(runs: Sequence[Run]) -> list[str]:
    """Returns the names of the run directories, with those above them where names are equal."""
    parts, depth = [run.workdir.absolute().parts for run in runs], 1
    while len({one[-depth:] for one in parts}) < len(runs) and depth < max(map(len, parts)):
        depth += 1
    return ["/".join(one[-depth:]) for one in parts]


def _commands(runs: Sequence[Run], labels: Sequence[str]) -> Html:
    """Returns each command once, with the runs that it started."""
    found: dict[str, list[str]] = {}
    for run, label in zip(runs, labels, strict=True):
        found.setdefault(str(run.environment.get("command", "unknown")), []).append(label)
    return join(
        part
        for command, started in found.items()
        for part in (element("p", few(started, len(started))), element("pre", command, tabindex="0"))
    )


def _page(title: str, header: Html, parts: list[tuple[str, str, Html]]) -> str:
    found = [(name, heading, section(name, heading, content)) for name, heading, content in parts]
    return page(f"{title} – vit_jax run report", header, found, FOOTER)


def _with_note(content: Html, run: Run) -> Html:
    """Returns the curves with a sentence about how training and evaluation differ."""
    every = run.config.log.every
    text = "Training values are " + (f"means over {every} steps" if every > 1 else "those of each step")
    text += ", on augmented images"
    if run.objective.needs_labels and run.config.augment.mixup + run.config.augment.cutmix:
        text += " that are mixed with others, so the training accuracy may be below that of the evaluation"
    return join([element("p", f"{text}.", class_="note"), content])


def _row(run: Run, name: str, out: Path | None) -> dict[str, object]:
    """Returns a row of a table of runs by column; `out` is the page, for links to the reports of the runs."""
    target = run.workdir / REPORT
    linked = out is not None and target.is_file() and target.resolve() != out.resolve()
    link = _relative(target, out) if linked else None
    row: dict[str, object] = {"run": name if link is None else element("a", name, href=link)}
    results = run.results()
    for split in ("validation", "test"):
        for metric in METRICS:
            if (key := f"{split}/{metric}") in results:
                shown = charts.number if metric == "loss" else percent
                spread = results.get(f"{key}/std")
                row[f"{split} {metric.replace('top5', 'top-5')}"] = shown(finite(results[key])) + (
                    "" if spread is None else f" ± {shown(spread)}"
                )
        key = f"{split}/accuracy"
        if key in results and f"{split}/examples" in results and not run.seeds:
            row[f"{split} interval"] = interval(finite(results[key]), results[f"{split}/examples"])
    if run.summary is None:
        row["state"] = run.result()
        return row
    row |= {"steps": f"{run.summary['steps']:,}", "training time": progress.clock(run.summary["seconds"])}
    return row | {"parameters": f"{run.summary['parameters']:,}"}


def _relative(target: Path, out: Path) -> str:
    return quote(os.path.relpath(target.resolve(), out.resolve().parent))


def _columns(rows: Sequence[dict[str, object]]) -> tuple[list[str], list[list[object]]]:
    """Returns the titles of all columns, and the cells of each row; '–' where a row has none."""
    header = list(dict.fromkeys(name for row in rows for name in row))
    return header, [[row.get(name, "–") for name in header] for row in rows]


def _best(runs: Sequence[Run]) -> int | None:
    """Returns the index of the best run by the primary metric, of equal ones that with the lower loss; None if unclear.

    Runs without the metric on the split of the first one, as the final run of a sweep, do not count.
    """
    metric, split = runs[0].objective.primary_metric, runs[0].final_split()
    if any(run.objective.primary_metric != metric for run in runs):
        return None
    sign = -1 if metric.higher_is_better else 1
    scores = {
        (sign * finite(results.get(f"{split}/{metric.name}")), finite(results.get(f"{split}/loss"))): index
        for index, results in enumerate(run.results() for run in runs)
    }
    comparable = {score: index for score, index in scores.items() if not any(map(math.isnan, score))}
    return comparable[min(comparable)] if len(comparable) > 1 else None


def _explained(runs: Sequence[Run]) -> Html:
    text = "Columns between name and results are the options in which the configs differ. Intervals are 95 % Wilson"
    text += " intervals of the accuracy."
    if any(run.seeds for run in runs):
        text += " ± is the sample standard deviation over the seeds of a run; their curves are means with bands."
    return element("p", text, class_="note")
