"""The tables of a report: experiments beside the reported figures, runs, and benchmarks."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from infobatch_fast import tables
from infobatch_fast.report_groups import (
    ABLATION,
    REPORTED,
    Figures,
    Row,
    Section,
    device_of,
    mean,
    method_of,
    same_seeds,
    state_of,
)
from infobatch_fast.report_page import Block, Heading, Table, Text
from infobatch_fast.report_records import Run

NOT_MEASURED, NOT_REPORTED, NONE = "not measured", "not reported", "–"
COMMIT = 8  # of its hexadecimal digits


class Column(NamedTuple):
    """A figure that rows give the mean of, and the reported one; None is not reported at all."""

    name: str
    measured: Callable[[Run], float]
    reported: Callable[[Figures], float | None] | None
    digits: int | None = None  # None: as the measured value needs
    places: int = 2  # of the reported figure


ACCURACY = Column(
    "accuracy %",
    lambda run: 100 * run.evaluated[-1]["accuracy"],
    lambda figures: figures.accuracy,
    2,
)
MINUTES = Column("minutes", lambda run: run.minutes, lambda figures: figures.minutes)
HOURS = Column("time h", lambda run: run.minutes / 60, lambda figures: figures.hours)
OVERHEAD = Column(
    "overhead h",
    lambda run: run.total("pruning_seconds") / 3600,
    lambda figures: figures.overhead_hours,
    places=3,
)
TOTAL = Column("GPU-hours", lambda run: run.device_hours, lambda figures: figures.total_hours)
SAVED = Column("samples saved %", lambda run: 100 * (run.saved_share or 0.0), None, 2)


def experiment(section: Section) -> list[Block]:
    """The three tables of the reported experiments, of one setting on one device.

    Only a section of the reported setting has the reported figures beside its own; in another one
    a table of which nothing was measured is left out.
    """
    by_ratio = [
        (row.label, row, figures)
        for method, figures in REPORTED.items()
        for row in section.row(method)
    ]
    by_ratio += [(row.label, row, None) for row in section.further()]
    ablation = [
        (row.label.replace(method.label, name, 1), row, Figures(accuracy))
        for method, (name, accuracy) in ABLATION.items()
        for row in section.row(method)
    ]
    total = TOTAL._replace(name="GPU-hours" if section.gpu else "device-hours")
    blocks: list[Block] = []
    for title, rows, columns in (
        ("Accuracy and minutes by r", by_ratio, (ACCURACY, MINUTES, SAVED)),
        ("Accuracy, time, overhead and total", by_ratio, (ACCURACY, HOURS, OVERHEAD, total)),
        ("Ablation at r = 0.5", ablation, (ACCURACY, SAVED)),
    ):
        if section.reported or any(row.runs for _, row, _ in rows):
            blocks.append(_means(title, rows, columns, section.reported))
    return blocks + [Text(note) for note in _notes(section)]


def run_tables(runs: Sequence[Run], source: str) -> list[Block]:
    """Every run: where its figures come from, and the figures."""
    origin = [
        [
            run.letter,
            run.name,
            method_of(run).label,
            str(run.config["seed"]),
            _commit(run.about.get("commit")),
            run.about["source_hash"][:COMMIT],
            device_of(run.about),
            str(run.about.get("packages", {}).get("torch") or "unknown"),
            state_of(run, source),
        ]
        for run in runs
    ]
    figures = [
        [
            run.letter,
            _percent(run.evaluated[-1]["accuracy"]) if run.evaluated else NONE,
            _best(run),
            NONE if run.saved_share is None else _percent(run.saved_share),
            tables.figures(run.minutes),
            _percent(run.total("pruning_seconds") / 60 / run.minutes) if run.minutes else NONE,
            tables.figures(run.trained / 60 / run.minutes) if run.minutes else NONE,
            *(_number(run.figure(name)) for name in ("joules", "host_syncs")),
            state_of(run, source),
        ]
        for run in runs
    ]
    blocks: list[Block] = [
        Table(
            "Where the figures of each run come from",
            ["run", "folder", "training", "seed", "commit", "source", "device", "torch", "state"],
            origin,
            left=9,
        ),
        Table(
            "Figures of each run",
            [
                *("run", "accuracy % last", "accuracy % best", "samples saved %", "minutes"),
                *("pruning % of minutes", "images/s", "energy J", "host syncs", "state"),
            ],
            figures,
        ),
        Text(
            "Last: after the last epoch that was evaluated. Best: picked on the test set, and its "
            "epoch. Minutes: of training, pruning included. Energy: of all the run. Of an "
            "incomplete run the figures are those so far."
        ),
    ]
    phases = list(dict.fromkeys(name for run in runs for name in run.phases or {}))
    if phases:
        seconds = [
            [run.letter, *(tables.seconds((run.phases or {}).get(name, 0.0)) for name in phases)]
            for run in runs
            if run.phases
        ]
        blocks.append(Table("Time by phase", ["run", *phases], seconds))
    return blocks


def benchmark_tables(path: Path, lines: Sequence[dict[str, Any]]) -> list[Block]:
    """A table for each part of a benchmark's file, with what it was measured on."""
    of = ("benchmark", "part", "quick", "commit", "source_hash", "device", "options")
    parts: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        key = json.dumps([line[name] for name in of], sort_keys=True)
        parts.setdefault(key, []).append(line)
    blocks: list[Block] = []
    for members in parts.values():
        first = members[0]
        quick = " (QUICK RUN: too short to quote)" if first["quick"] else ""
        about = [
            f"on {device_of(first)}",
            f"commit {_commit(first['commit'])}",
            f"source {first['source_hash'][:COMMIT]}",
            f"file {path.name}",
            f"started {first['started']}",
            *(f"{name} {_setting(value)}" for name, value in first["options"].items()),
        ]
        blocks += [
            Heading(f"{first['benchmark']}: {first['part']}{quick}", 3),
            _benchmark(members),
            Text(f"Median [20th, 80th percentile]; {'; '.join(about)}."),
        ]
    return blocks


def _means(
    title: str,
    rows: Sequence[tuple[str, Row, Figures | None]],
    columns: Sequence[Column],
    beside: bool,
) -> Table:
    """Means of rows, with the reported figures `beside` them."""
    headers = ["training"]
    for column in columns:
        if beside and column.reported:
            headers += [f"{column.name} reported", f"{column.name} measured"]
        else:
            headers.append(column.name)
    cells = []
    for label, row, figures in rows:
        line = [label]
        for column in columns:
            if beside and column.reported:
                value = column.reported(figures) if figures else None
                line.append(NOT_REPORTED if value is None else f"{value:.{column.places}f}")
            values = [column.measured(run) for run in row.runs]
            line.append(mean(values, column.digits) if values else NOT_MEASURED)
        letters = ", ".join(run.letter for run in row.runs) or "none"
        cells.append([*line, str(len(row.runs)), letters])
    return Table(title, [*headers, "n", "runs"], cells)


def _notes(section: Section) -> list[str]:
    """What a reader must know of the section's tables."""
    notes = [f"All other settings: {section.others}."] if section.others else []
    incomplete = [run.letter for run in section.runs if not run.complete]
    if incomplete:
        notes.append(f"In no mean, as they are INCOMPLETE: {', '.join(incomplete)}.")
    for row in section.rows:
        for seed in same_seeds(row.runs):
            letters = ", ".join(run.letter for run in row.runs if run.config["seed"] == seed)
            notes.append(
                f"The runs {letters} of {row.label} have the SAME SEED {seed}: the mean counts "
                "each, and the deviation is not one over seeds."
            )
    return notes


def _benchmark(lines: Sequence[dict[str, Any]]) -> Table:
    case = list(dict.fromkeys(name for line in lines for name in line["case"]))
    more = list(dict.fromkeys(name for line in lines for name in line["more"]))
    rows = []
    for line in lines:
        rows.append(
            [
                *(_setting(line["case"].get(name)) for name in case),
                _measured(line),
                _number(line["count"]),
                *(_figure(name, line["more"].get(name)) for name in more),
            ]
        )
    return Table("", [*case, "median [p20, p80]", "count", *more], rows, left=len(case))


def _measured(line: dict[str, Any]) -> str:
    """Median, percentiles and unit, or why there are none."""
    if line["absent"] is not None:
        return f"absent: {line['absent']}"
    unit, median = line["unit"], line["median"]
    values = [line[name] for name in ("median", "p20", "p80") if line[name] is not None]
    if unit == "s":
        shown = [tables.seconds(value) for value in values]
        unit = ""
    else:
        prefixes = (("T", 1e12), ("G", 1e9), ("M", 1e6)) if unit in ("B/s", "FLOP/s") else ()
        prefix, factor = next((p for p in prefixes if median >= p[1]), ("", 1))
        shown = [_number(value / factor if prefix else value) for value in values]
        unit = f" {prefix}{unit}"
    return shown[0] + (f" [{', '.join(shown[1:])}]" if len(shown) == 3 else "") + unit


def _setting(value: Any) -> str:
    """A value of a case or of the options, as it was given."""
    if isinstance(value, float):
        return f"{value:g}"
    return _figure("", value)


def _figure(name: str, value: Any) -> str:
    """A further figure, whose name ends in its unit."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        in_seconds = name.endswith(("_s", "seconds"))
        return tables.seconds(value) if in_seconds else _number(value)
    return NONE if value is None else json.dumps(value)


def _number(value: float | None) -> str:
    if value is None:
        return NONE
    if isinstance(value, int):
        return f"{value:,}"
    return tables.figures(value) if 1e-6 <= abs(value) < 1e15 or value == 0 else f"{value:.2e}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _best(run: Run) -> str:
    if not run.evaluated:
        return NONE
    best = max(run.evaluated, key=lambda line: line["accuracy"])
    return f"{_percent(best['accuracy'])} (epoch {best['epoch']})"


def _commit(commit: str | None) -> str:
    """Its beginning, and whether the sources differed from it."""
    if commit is None:
        return "none"
    return commit[:COMMIT] + ("-dirty" if commit.endswith("-dirty") else "")
