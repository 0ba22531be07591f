"""The tables of a report's benchmarks: one for each part of each file."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

from infobatch_fast.report import text as tables
from infobatch_fast.report.lines import Line
from infobatch_fast.report.page import Block, Heading, Table, Text
from infobatch_fast.report.read import Benchmark
from infobatch_fast.report.runs import device_of

NONE = "–"


def benchmark_tables(benchmarks: Sequence[Benchmark]) -> list[Block]:
    """A table for each part, beneath what it was measured on."""
    blocks: list[Block] = []
    for benchmark in benchmarks:
        calls: dict[str, dict[str, list[Line]]] = {}
        for line in benchmark.lines:
            of = (line.benchmark, line.quick, line.source_hash, line.device, line.options)
            call = calls.setdefault(json.dumps(of, sort_keys=True), {})
            call.setdefault(line.part, []).append(line)
        for parts in calls.values():
            lines = [line for part in parts.values() for line in part]
            marks = "; ".join(_marks(benchmark, lines))
            title = f"{lines[0].benchmark}, {benchmark.name}" + f" ({marks})" * bool(marks)
            blocks += [Heading(title, 3), Text(_about(lines), "aside")]
            for part, of_part in parts.items():
                blocks += [Heading(f"{lines[0].benchmark}: {part}", 4), _table(of_part)]
    return blocks


def _marks(benchmark: Benchmark, lines: Sequence[Line]) -> Iterator[str]:
    """What keeps a table's figures from being taken at their word."""
    if lines[0].quick:
        yield "QUICK RUN: too short to quote"
    if not all(line.complete for line in lines):
        yield "STOPPED MIDWAY"
    if benchmark.damaged:
        yield "FILE DAMAGED"
    loads = [of.get("load_average") for line in lines for of in (line.options, line.more)]
    load = max((of for of in loads if isinstance(of, (int, float))), default=0.0)
    cores = lines[0].options.get("cores")
    if isinstance(cores, int) and load > cores:
        yield f"BUSY MACHINE: load average {tables.figures(load)} on {cores} cores"


def _about(lines: Sequence[Line]) -> str:
    first = lines[0]
    options = ", ".join(f"{name} {_figure(value)}" for name, value in first.options.items())
    return (
        f"Median [20th, 80th percentile], of differences low to high: the 95% interval; started "
        f"{first.started} on {device_of(first.device)}; commit {str(first.commit)[:8]}, source "
        f"{first.source_hash[:8]}; {options}."
    )


def _table(lines: Sequence[Line]) -> Table:
    case = dict.fromkeys(name for line in lines for name in line.case)
    more = dict.fromkeys(name for line in lines for name in line.more)
    rows = [
        [
            *(_figure(line.case.get(name)) for name in case),
            _measured(line),
            _figure(line.count),
            *(_further(name, line.more.get(name)) for name in more),
        ]
        for line in lines
    ]
    heads = [
        *case,
        "median [p20, p80]",
        "count",
        *(name.replace("_percent", " %") for name in more),
    ]
    heads = [head.removesuffix("_seconds").replace("_", " ") for head in heads]
    return Table(heads, rows, left=len(case))


def _measured(line: Line) -> str:
    """Median and percentiles, or why there are none."""
    if line.median is None:
        return f"absent: {line.absent or 'no reason is given'}"
    spread = [line.p20, line.p80] if line.count is None or line.count > 1 else []
    ends = ", ".join(tables.amount(of, line.unit) for of in spread if of is not None)
    return tables.amount(line.median, line.unit) + f" [{ends}]" * bool(ends)


def _further(name: str, value: Any) -> str:
    timed = name.endswith("_seconds") and isinstance(value, float)
    return tables.seconds(value) if timed else _figure(value)


def _figure(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return tables.figures(value)
    if isinstance(value, int):
        return f"{value:,}"
    return NONE if value is None else value if isinstance(value, str) else json.dumps(value)
