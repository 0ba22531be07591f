"""The tables of a report's runs: experiments beside the reported figures, and run by run."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from infobatch_fast.report import text as tables
from infobatch_fast.report.groups import Row, Section, device_of, mean, same_seeds, state_of
from infobatch_fast.report.methods import ABLATION, REPORTED, Figures, method_of
from infobatch_fast.report.page import Block, Table, Text
from infobatch_fast.report.records import Run

NOT_MEASURED, NOT_REPORTED, NONE = "not measured", "not reported", "–"
COMMIT = 8  # of its hexadecimal digits
SLOWER = " (SLOWER)"
_WATCHED = "on a CPU --host-syncs watches every operation of torch."


class Column(NamedTuple):
    """A figure that rows give the mean of, and the reported one; None is not reported at all."""

    name: str
    measured: Callable[[Run], float | None]
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
    lambda run: None if run.pruning_seconds is None else run.pruning_seconds / 3600,
    lambda figures: figures.overhead_hours,
    places=3,
)
TOTAL = Column("GPU-hours", lambda run: run.device_hours, lambda figures: figures.total_hours)
SAVED = Column("samples saved %", lambda run: 100 * (run.saved_share or 0.0), None, 2)


def experiment(section: Section) -> list[Block]:
    """The three tables of the reported experiments, of one setting on one device.

    Only a section of the reported setting has the reported figures beside its own; another one has
    the rows alone that were measured, and all of them in the first two tables.
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
    if not section.reported:
        named = [row for _, row, _ in by_ratio if row.runs]
        by_ratio = [(row.label, row, None) for row in (*named, *section.rows)]
        by_ratio = list({id(row): (label, row, None) for label, row, _ in by_ratio}.values())
        ablation = [(label, row, None) for label, row, _ in ablation if row.runs]
    total = TOTAL._replace(name="GPU-hours" if section.gpu else "device-hours")
    blocks: list[Block] = []
    for title, rows, columns in (
        ("Accuracy and minutes by r", by_ratio, (ACCURACY, MINUTES, SAVED)),
        ("Accuracy, time, overhead and total", by_ratio, (ACCURACY, HOURS, OVERHEAD, total)),
        ("Ablation at r = 0.5", ablation, (ACCURACY, SAVED)),
    ):
        if section.reported or any(row.runs for _, row, _ in rows):
            blocks.append(_means(title, rows, columns, section.reported))
    others = f"All other settings: {section.others}."
    return blocks + [Text(others)] * bool(section.others) + notes(section)


def run_tables(runs: Sequence[Run], source: str) -> list[Block]:
    """Every run: where its figures come from, and the figures."""
    origin = [
        [
            run.letter,
            run.name,
            method_of(run).label,
            str(run.config["seed"]),
            short_commit(run.about.get("commit")),
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
            tables.figures(run.minutes) + SLOWER * run.watched,
            _pruning(run),
            tables.figures(run.trained / 60 / run.minutes) if run.minutes else NONE,
            *(number(run.figure(name)) for name in ("joules", "host_syncs")),
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
            "incomplete run the figures are of the epochs that there are."
        ),
    ]
    if any(run.watched for run in runs):
        blocks.append(Text(f"SLOWER: {_WATCHED}"))
    if any(run.figure("update_timed") is False for run in runs):
        blocks.append(
            Text(
                "PART: the choosing and what of the update is not in one kernel or CUDA graph with "
                "the step; the overhead benchmark measures the whole."
            )
        )
    if any(run.epochs and run.pruning_seconds is None for run in runs):
        blocks.append(
            Text(
                f"Without telemetry what pruning took is not known ({NONE}); the minutes hold it "
                "all the same."
            )
        )
    phases = list(dict.fromkeys(name for run in runs for name in run.phases or {}))
    if phases:
        seconds = [
            [run.letter, *(tables.seconds((run.phases or {}).get(name, 0.0)) for name in phases)]
            for run in runs
            if run.phases
        ]
        blocks.append(Table("Time by phase", ["run", *phases], seconds))
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
            line.append(_mean(column, row))
        letters = ", ".join(run.letter for run in row.runs) or "none"
        same = ", ".join(str(seed) for seed in same_seeds(row.runs))
        mark = f" (SAME SEED {same})" if same else ""
        cells.append([*line, f"{len(row.runs)}{mark}", letters])
    return Table(title, [*headers, "n", "runs"], cells)


def _mean(column: Column, row: Row) -> str:
    """Of the runs whose records have the figure, and of how many if not of all."""
    if not row.runs:
        return NOT_MEASURED
    values = [column.measured(run) for run in row.runs]
    known = [value for value in values if value is not None]
    if not known:
        return NONE
    of = "" if len(known) == len(values) else f" (of {len(known)})"
    return mean(known, column.digits) + of


def notes(section: Section) -> list[Block]:
    """What a reader must know of the section's means."""
    notes = []
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
    watched = [run.letter for row in section.rows for run in row.runs if run.watched]
    if watched:
        notes.append(f"SLOWER than it need be was {', '.join(watched)}: {_WATCHED}")
    unknown = [run.letter for row in section.rows for run in row.runs if _pruning(run) == NONE]
    if unknown:
        notes.append(
            f"Without telemetry the overhead of {', '.join(unknown)} is not known: its mean is of "
            "the others."
        )
    return [Text(note) for note in notes]


def _pruning(run: Run) -> str:
    seconds = run.pruning_seconds
    if seconds is None or not run.minutes:
        return NONE
    return _percent(seconds / 60 / run.minutes) + " (PART)" * (run.figure("update_timed") is False)


def number(value: float | None) -> str:
    """A number to three figures, a whole one in full."""
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


def short_commit(commit: str | None) -> str:
    """Its beginning, and whether the sources differed from it."""
    if commit is None:
        return "none"
    return commit[:COMMIT] + ("-dirty" if commit.endswith("-dirty") else "")
