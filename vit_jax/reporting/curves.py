"""The curves of runs against the step: which charts there are, and the lines in them."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from vit_jax.reporting import charts
from vit_jax.reporting.charts import Point, Series
from vit_jax.reporting.html import Html, element, join, table, values
from vit_jax.reporting.records import Run, finite

ROLES = ("train", "validation", "test")
COLORS = {"train": 0, "validation": 2, "test": 1}
TITLES = {
    "loss": "Loss",
    "accuracy": "Accuracy, %",
    "learning_rate": "Learning rate",
    "gradient_norm": "Gradient norm",
    "images_per_second": "Images per second",
}
HIDDEN = ("examples", "top5", "mfu")
MAX_POINTS = 300  # of a line, and rows of a table
MAX_ALL_POINTS, MIN_POINTS = 1200, 20  # of the lines of a chart together; of each line nevertheless
MAX_CHARTS = 16


class Chart(NamedTuple):
    """A chart: the name of its metric, which is unique in the page, its title and its lines."""

    name: str
    title: str
    series: list[Series]


def of_run(run: Run) -> list[Chart]:
    """Returns the charts of a run, or of the mean over its seeds: one chart per metric, one line per split."""
    lines: dict[str, list[Series]] = {}
    for name in _metrics([run]):
        role, metric = _parts(name)
        points = _points(run, name)
        if points:
            lines.setdefault(metric, []).append(Series(role or metric, COLORS.get(role, 0), points))
    return [Chart(metric, _title(metric), series) for metric, series in _ordered(lines)]


def of_runs(runs: Sequence[Run], labels: Sequence[str]) -> list[Chart]:
    """Returns the charts of several runs: one chart per metric and split, one line per run, with its label."""
    lines = {}
    for name in _metrics(runs):
        count = min(MAX_POINTS, max(MAX_ALL_POINTS // len(runs), MIN_POINTS))
        points = [_points(run, name, count) for run in runs]
        if any(len(one) > 1 for one in points):  # a single point is in the table of results
            lines[name] = [Series(labels[index], index, one) for index, one in enumerate(points) if one]
    found = []
    for name, series in _ordered(lines):
        role, metric = _parts(name)
        title = f"{_title(metric)} ({role})" if role and metric not in ("learning_rate", "gradient_norm") else None
        found.append(Chart(name, title or _title(metric), series))
    return found


def draw(found: Sequence[Chart], shared_legend: bool = False) -> Html:
    """Returns the charts with their legends and the values of their points.

    Args:
        found: of `of_run` or `of_runs`.
        shared_legend: one legend above all charts in place of one for each with several lines.
    """
    figures = []
    for chart in found[:MAX_CHARTS]:
        identifier = "chart-" + "".join(one if one.isalnum() else "-" for one in chart.name)
        steps = sorted({point.step for one in chart.series for point in one.points})
        points = [{point.step: point for point in one.points} for one in chart.series]
        rows = ([f"{step:,}", *(_cell(found.get(step)) for found in points)] for step in steps)
        names = [one.name for one in chart.series]
        legend = charts.legend(chart.series) if len(names) > 1 and not shared_legend else None
        heading = element("figcaption", element("h3", chart.title), legend)
        content = table(f"Values of {chart.title}", ["step", *names], rows)
        figure = element("figure", heading, charts.lines(identifier, chart.title, chart.series), class_="chart")
        figures.append(element("div", figure, values(chart.title, content), class_="card"))
    every = max((chart.series for chart in found), key=len, default=[])
    above = charts.legend(every) if shared_legend and every else None
    return join([above, element("div", *figures, class_="charts")])


def _cell(point: Point | None) -> str | None:
    if point is None:
        return None
    spread = "" if point.spread is None else f" ± {charts.number(point.spread)}"
    return charts.number(point.value) + spread


def _metrics(runs: Iterable[Run]) -> list[str]:
    """Returns the names of the metrics that any of the runs recorded, in the order of their first record."""
    records = (record for run in runs for one in (run, *run.seeds.values()) for record in one.history)
    names = dict.fromkeys(name for record in records for name in record if name != "step")
    return [name for name in names if name.rpartition("/")[2] not in HIDDEN and ("/" in name or name in TITLES)]


def _parts(name: str) -> tuple[str, str]:
    """Returns split and metric of a name: ('test', 'loss'); the split is '' if the name has none."""
    role, _, metric = name.partition("/")
    return (role, metric) if role in ROLES else ("", name)


def _title(metric: str) -> str:
    head, _, name = metric.rpartition("/")
    words, comma, unit = (TITLES.get(name) or name.replace("_", " ").capitalize()).partition(", ")
    return f"{words} of {head}{comma}{unit}" if head else f"{words}{comma}{unit}"


def _ordered(lines: dict[str, list[Series]]) -> list[tuple[str, list[Series]]]:
    """Returns the charts in the order of `TITLES`, then the others."""
    order = list(TITLES)

    def position(item: tuple[str, list[Series]]) -> int:
        metric = _parts(item[0])[1]
        return order.index(metric) if metric in order else len(order)

    return sorted(lines.items(), key=position)


def _points(run: Run, name: str, count: int = MAX_POINTS) -> tuple[Point, ...]:
    """Returns up to `count` values of a metric.

    Of several seeds, they are mean and sample standard deviation at the steps that all have.
    """
    factor = 100 if name.endswith("accuracy") else 1
    each = [
        {record["step"]: factor * finite(record[name]) for record in one.history if name in record}
        for one in (run.seeds.values() if run.seeds else (run,))
    ]
    shared = sorted(set.intersection(*map(set, each)))
    if not run.seeds or len(each) == 1:
        points = [Point(step, each[0][step]) for step in shared]
    else:
        points = [_mean(step, [values[step] for values in each]) for step in shared]
    return tuple(charts.thin(points, count)) if any(math.isfinite(point.value) for point in points) else ()


def _mean(step: int, values: list[float]) -> Point:
    if not all(map(math.isfinite, values)):
        return Point(step, math.nan)
    return Point(step, statistics.fmean(values), statistics.stdev(values))
