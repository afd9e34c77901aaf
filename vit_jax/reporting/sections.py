"""The sections about what a run directory records: header, results, configuration, environment."""

import shlex
from typing import Any

from ml_collections import ConfigDict

from vit_jax import config as options
from vit_jax import progress
from vit_jax.checkpoint import input_spec
from vit_jax.config.option import FREE
from vit_jax.errors import UserError
from vit_jax.reporting import charts
from vit_jax.reporting.evaluated import Evaluated, interval, percent
from vit_jax.reporting.html import Html, details, element, join, table
from vit_jax.reporting.records import Run, finite
from vit_jax.training import describe


def header(run: Run) -> Html:
    """Returns the title, the result in one line, and the key figures."""
    facts = [*_key_result(run), *_key_facts(run)]
    items = (element("div", element("dt", name), element("dd", value)) for name, value in facts)
    about = element("p", f"vit_jax run report · {run.workdir}", class_="about")
    result = element("p", run.result().replace("+-", "±"), class_="result")
    return join([about, element("h1", run.name), result, element("dl", *items)])


def _key_result(run: Run) -> list[tuple[str, str]]:
    """Returns the primary metric with its interval, or its spread over seeds."""
    results, split, name = run.results(), run.final_split(), run.objective.primary_metric.name
    key = f"{split}/{name}"
    if key not in results:
        return []
    accuracy, value = name == "accuracy", finite(results[key])
    shown = percent(value) if accuracy else charts.number(value)
    if run.seeds:
        spread = results.get(f"{key}/std")
        std = "" if spread is None else f" ± {percent(spread) if accuracy else charts.number(spread)}"
        return [(f"{split} {name}, mean of {len(run.seeds)} seeds", shown + std)]
    pairs = [(f"{split} {name}", shown)]
    if accuracy and f"{split}/examples" in results:
        pairs.append(("95 % interval (Wilson)", interval(value, results[f"{split}/examples"])))
    return pairs


def _key_facts(run: Run) -> list[tuple[str, str]]:
    config, summary = run.config, run.summary or {}
    inputs = input_spec.read(next(iter(run.seeds.values())).workdir if run.seeds else run.workdir)
    facts = [("model", config.model.variant or "custom")]
    if "parameters" in summary:
        facts.append(("parameters", describe.short(summary["parameters"])))
    size = "" if inputs is None else f", {'×'.join(map(str, inputs.image_shape))}"
    facts.append(("data", f"{config.data.name}{size}"))
    if "steps" in summary:
        facts.append(("steps", f"{summary['steps']:,} × {config.train.batch_size} images"))
    if "seconds" in summary:
        facts.append(("training time", progress.clock(summary["seconds"])))
    return facts


def results(run: Run, found: Evaluated | None, notes: list[str]) -> Html:
    """Returns the metrics of the final evaluation, with a confidence interval, and what the report lacks."""
    recorded, split = run.results(), run.final_split()
    if found is not None and f"{found.split}/examples" not in recorded:
        recorded, split = found.metrics, found.split
    heads = {} if found is None else found.heads
    rows = []
    for head in heads if len(heads) > 1 else [""]:
        prefix = f"{split}/{head}" if head else split
        rows += _metrics(recorded, prefix, split, head, run)
        if predictions := heads.get(head) or (next(iter(heads.values()), None) if not head else None):
            of = f" of {head}" if head else ""
            rows.append(
                [f"balanced accuracy{of}", percent(predictions.balanced_accuracy()), "mean recall of the classes"]
            )
            error = percent(predictions.calibration_error())
            rows.append([f"calibration error (ECE){of}", error, "15 bins of the probability of the predicted class"])
    count = recorded.get(f"{split}/examples")
    every = f"All {count:,} examples of the {split} split, each once." if count else None
    parts = [element("p", every, class_="note") if every else None]
    if rows:
        parts.append(table("Results", ["metric", "value", "note"], rows, text=[2]))
    if found is not None and (moved := _moved(recorded, found)):
        notes = [*notes, moved]
    return join([*parts, *(element("p", note, class_="warning") for note in notes)])


def _metrics(recorded: dict[str, Any], prefix: str, split: str, head: str, run: Run) -> list[list[str]]:
    """Returns the rows of what is recorded: accuracy with its interval, top-5 accuracy, loss."""
    of, rows, total = (f" of {head}" if head else ""), [], recorded.get(f"{split}/examples")
    if f"{prefix}/accuracy" in recorded:
        accuracy = finite(recorded[f"{prefix}/accuracy"])
        note = f"95 % Wilson interval {interval(accuracy, total)}" if total else ""
        rows.append([f"accuracy{of}", percent(accuracy), note])
    if f"{prefix}/top5" in recorded:
        rows.append([f"top-5 accuracy{of}", percent(finite(recorded[f"{prefix}/top5"])), ""])
    if f"{prefix}/loss" in recorded:
        is_nll = run.objective.needs_labels and run.config.train.loss == "softmax"
        note = "negative log-likelihood of the true class (NLL)" if is_nll else ""
        rows.append([f"loss{of}", charts.number(finite(recorded[f"{prefix}/loss"])), note])
    return rows


def _moved(recorded: dict[str, Any], found: Evaluated) -> str | None:
    """Returns a sentence if the evaluation gives another accuracy than the run recorded."""
    name = f"{found.split}/accuracy"
    before, now = recorded.get(name), found.metrics.get(name)
    if before is None or now is None or before == now:
        return None
    return (
        f"Evaluated again for this report, at step {found.step:,}, the accuracy is {percent(now)}: the sections on "
        "classes and calibration show that."
    )


def configuration(run: Run, spec: str | None) -> Html:
    """Returns the options that differ from the defaults and from the config file, later changes, and all options.

    Args:
        run: the run.
        spec: 'CONFIG[:ARG]' that was given to training; None to take it from the recorded command, if it is a shipped
            config: no other file is loaded, since loading runs its code.
    """
    default, used = options.default().to_dict(), run.config.to_dict()
    spec, file = spec or shipped_spec(run), None
    if spec is not None:
        try:
            file = options.complete(options.load(spec).to_dict())
        except UserError:
            spec = None
    names = {row.partition(":")[0] for other in (default, file or default) for row in options.differences(other, used)}
    header, rows = ["option", "default", *([f"config file ({spec})"] if file else []), "this run"], []
    for name in sorted(names, key=options.names().index):
        section, _, key = name.partition(".")
        texts = [_text(name, of[section].get(key)) for of in (default, *([file] if file else []), used)]
        changed = texts[-1] != texts[-2]
        rows.append([name, *texts[:-1], element("strong", texts[-1]) if changed else texts[-1]])
    note = "Options that differ from the defaults" + (
        f" or from the config file {spec}; those that differ from the file are in bold." if file else "."
    )
    every = "\n".join(f"{name} = {value}" for name, value in all_options(run.config).items())
    content = table("Configuration", header, rows, text=range(1, len(header))) if rows else None
    return join(
        [
            element("p", note, class_="note"),
            content,
            _changes(run),
            details("All options", element("pre", every, tabindex="0")),
        ]
    )


def shipped_spec(run: Run) -> str | None:
    """Returns 'CONFIG[:ARG]' of the recorded command if it names a shipped config, else None."""
    try:
        words = shlex.split(str(run.environment.get("command", "")))
    except ValueError:
        return None
    for index, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == "--config":
            spec = value if equals else "".join(words[index + 1 : index + 2])
            return spec if spec.partition(":")[0] in options.shipped() else None
    return None


def is_free(name: str) -> bool:
    """Returns whether an option changes no result, as its resume policy says."""
    section, _, key = name.partition(".")
    return options.OPTIONS[section][key].resume == FREE


def _text(name: str, value: Any) -> str:
    section, _, key = name.partition(".")
    return options.OPTIONS[section][key].text(value)


def _changes(run: Run) -> Html | None:
    """Returns the options that changed during the run."""
    rows = [
        [f"{one['step']:,}" if isinstance(one.get("step"), int) else "?", one.get("time", ""), str(change)]
        for one in run.changes
        for change in one["changes"]
    ]
    if not rows:
        return None
    content = table("Changes during the run", ["from step", "time", "change"], rows, text=[1, 2])
    return join([element("h3", "Changes during the run"), content])


def environment(run: Run) -> Html:
    """Returns the command and the content of environment.json."""
    rows = []
    for name, value in run.environment.items():
        if name == "packages" and isinstance(value, dict):
            rows += [[package, version] for package, version in value.items()]
        elif name == "attention" and isinstance(value, dict):
            rows.append(["attention backend", value.get("backend")])
        elif name != "command":
            rows.append([name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)])
    command = element("pre", run.environment.get("command", "unknown"), tabindex="0")
    return join([command, table("Environment", ["fact", "value"], rows, text=[1]) if rows else None])


def all_options(config: ConfigDict) -> dict[str, str]:
    """Returns the value of every option as text, by name."""
    used = config.to_dict()
    return {name: _text(name, used[name.partition(".")[0]][name.partition(".")[2]]) for name in options.names()}
