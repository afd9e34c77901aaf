"""Markdown tables from the output of the benchmarks.

    python benchmarks/table.py collect LINES.jsonl results/      # -> results/<device>.json
    python benchmarks/table.py show results/nvidia-h200.json
    python benchmarks/table.py put results/nvidia-h200.json docs/performance.md

`put` replaces the text of the page between <!-- results: NAME --> and <!-- end of results: NAME -->, where NAME is that
of the file; markers that are missing are added at the end.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# For each benchmark, the heading and the key of its columns, in order.
MODEL = [("model", "variant"), ("pixels", "image_size"), ("batch", "batch_size"), ("compute dtype", "dtype")]
RATIO = [("speed of ours / this", "ratio"), ("minimum", "ratio_min"), ("maximum", "ratio_max")]
COLUMNS: dict[str, list[tuple[str, str]]] = {
    "train_step": [
        *MODEL,
        ("side", "name"),
        ("attention", "kernel"),
        ("tokens", "tokens"),
        ("images/s", "images_per_second"),
        ("ms", "step_ms"),
        ("spread, ms", "spread_ms"),
        ("MFU", "mfu"),
        ("compile, s", "compile_s"),
        ("memory, MiB", "peak_memory_mb"),
        *RATIO,
        ("error", "error"),
    ],
    "inference": [
        *MODEL,
        ("side", "name"),
        ("ms", "ms"),
        ("ms, 95 %", "ms_p95"),
        ("images/s", "images_per_second"),
        *RATIO,
        ("error", "error"),
    ],
    "end_to_end": [
        ("config", "config"),
        ("model", "variant"),
        ("batch", "batch_size"),
        ("Python, s", "python_s"),
        ("with imports, s", "imports_s"),
        ("first step, cold, s", "first_step_cold_s"),
        ("cached, s", "first_step_cached_s"),
        ("images/s, whole run", "whole"),
        ("training alone", "training"),
        ("bare step", "bare"),
        ("training / bare", "training_ratio"),
        ("whole / bare", "ratio"),
    ],
    "breakdown": [*MODEL, ("ms per step", "ms"), ("share", "share"), ("attributed by", "attributed")],
    "compiled": [
        ("compiled for", "compiled_for"),
        ("model", "variant"),
        ("pixels", "image_size"),
        ("batch", "batch_size"),
        ("step", "step"),
        ("attention", "kernel"),
        ("options", "fields"),
        ("ms", "step_ms"),
        ("images/s", "images_per_second"),
        ("MFU", "mfu"),
        ("kernels", "kernels"),
        ("GB, other kernels", "other_gb"),
        ("temporary, GiB", "temporary_gib"),
    ],
    "memory": [
        *MODEL,
        ("remat", "remat"),
        ("planned, MiB", "planned_mb"),
        ("peak, MiB", "peak_mb"),
        ("limit, GiB", "limit_gib"),
        ("largest batch", "largest"),
    ],
    "matmul": [
        ("compute dtype", "dtype"),
        ("width", "width"),
        ("rows", "rows"),
        ("matmul", "operation"),
        ("ms", "ms"),
        ("TFLOP/s", "tflops"),
    ],
    "attention": [
        ("compute dtype", "dtype"),
        ("width", "width"),
        ("tokens", "tokens"),
        ("passes", "passes"),
        ("implementation", "implementation"),
        ("ms", "ms"),
        ("TFLOP/s", "tflops"),
        ("error", "error"),
    ],
    "attention_check": [
        ("compute dtype", "dtype"),
        ("width", "width"),
        ("tokens", "tokens"),
        ("implementation", "implementation"),
        ("correct", "correct"),
        ("error of the value", "value_error"),
        ("error of the gradient", "gradient_error"),
        ("error", "error"),
    ],
    "layer_norm": [
        ("compute dtype", "dtype"),
        ("width", "width"),
        ("passes", "passes"),
        ("ms", "ms"),
        ("GB/s", "gb_s"),
    ],
    "gelu": [("compute dtype", "dtype"), ("width", "width"), ("passes", "passes"), ("ms", "ms"), ("GB/s", "gb_s")],
    "skipped": [("command", "command"), ("status", "status")],
}


def cell(value: Any) -> str:
    """A value as a table shows it: with thousands separators and four digits; a dictionary as a list of its items."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {cell(part)}" for name, part in value.items() if part)
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "/")


def table(lines: Sequence[dict[str, Any]], columns: Sequence[tuple[str, str]]) -> str:
    """A table with one row per line; without the columns that no line has."""
    present = [(heading, key) for heading, key in columns if any(line.get(key) is not None for line in lines)]
    rows = [[heading for heading, _ in present], ["---"] * len(present)]
    rows += [[cell(line.get(key)) for _, key in present] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def tables(lines: Sequence[dict[str, Any]]) -> str:
    """A table for each benchmark, in the order of `COLUMNS`."""
    parts = []
    for name, columns in COLUMNS.items():
        chosen = [line for line in lines if line["benchmark"] == name]
        if chosen:
            parts.append(f"**{name}**\n\n{table(chosen, columns)}")
    return "\n\n".join(parts)


def collect(source: Path, directory: Path) -> Path:
    """Writes the lines to one file, named after the device of the measurements; its path."""
    lines = [json.loads(line) for line in source.read_text().splitlines() if line.startswith("{")]
    device = next((line["device"] for line in lines if "device" in line), "unknown")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    path.write_text(json.dumps({"device": device, "lines": lines}, indent=1) + "\n")
    return path


def put(results: Path, page: Path) -> None:
    """Writes the tables into the page, between the markers."""
    start, end = f"<!-- results: {results.stem} -->", f"<!-- end of results: {results.stem} -->"
    text = page.read_text() if page.exists() else ""
    if start not in text:
        text = f"{text.rstrip()}\n\n{start}\n{end}\n"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    page.write_text(f"{before}{start}\n\n{tables(json.loads(results.read_text())['lines'])}\n\n{end}{after}")


def main(arguments: list[str]) -> None:
    match arguments:
        case ["collect", source, directory]:
            print(collect(Path(source), Path(directory)))
        case ["show", results]:
            print(tables(json.loads(Path(results).read_text())["lines"]))
        case ["put", results, page]:
            put(Path(results), Path(page))
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
