"""The tables of a report's benchmarks: one for each part of each file."""

import json
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

from infobatch_fast.report import text as tables
from infobatch_fast.report.lines import Line
from infobatch_fast.report.page import Block, Heading, Table, Text
from infobatch_fast.report.read import Benchmark
from infobatch_fast.report.runs import device_of

NONE = "–"
# As further figures' names end; what else they end in is no unit.
_UNITS = {"percent": "%", "joules": "J", "watts": "W", "s": "s", "seconds": "s"}
_UNITS |= {of: of for of in ("bytes", "images/s", "B/s", "FLOP/s", "TFLOP/s", "FLOP", "images")}
_TIMES = {"s": 1.0, "ms": 1e3, "us": 1e6}  # in a second


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
    options = ", ".join(f"{name} {_setting(value)}" for name, value in first.options.items())
    low = any(name.split("_")[0] == "low" for line in lines for name in line.more)
    interval = " Low to high: the 95% interval of the median of paired differences." * low
    return (
        f"Median [20th, 80th percentile]; started {first.started} on {device_of(first.device)}; "
        f"commit {str(first.commit)[:8]}, source {first.source_hash[:8]}; {options}.{interval}"
    )


def _table(lines: Sequence[Line]) -> Table:
    case = dict.fromkeys(name for line in lines for name in line.case)
    more = dict.fromkeys(name for line in lines for name in line.more)
    columns = [_column(name, [line.more.get(name) for line in lines]) for name in more]
    rows = [
        [
            *(_setting(line.case.get(name)) for name in case),
            _measured(line),
            _figure(line.count),
            *(cells[index] for _, cells in columns),
        ]
        for index, line in enumerate(lines)
    ]
    heads = [*(name.replace("_", " ") for name in case), "median [p20, p80]", "count"]
    return Table([*heads, *(head for head, _ in columns)], rows, left=len(case))


def _column(name: str, values: Sequence[Any]) -> tuple[str, list[str]]:
    """Head and cells of a further figure, whose name ends in its unit; times in one that suits."""
    words, _, last = name.rpartition("_")
    unit = _UNITS.get(last, "") if words else ""
    if not unit:
        return name.replace("_", " "), [_figure(value) for value in values]
    factor = 1.0
    numbers = [abs(value) for value in values if _is_number(value) and value]
    if unit == "s" and numbers:
        unit = tables.seconds(statistics.median(numbers)).split()[-1]
        factor = _TIMES[unit]
    cells = [_figure(value * factor if _is_number(value) else value) for value in values]
    return f"{words.replace('_', ' ')} ({unit})", cells


def _measured(line: Line) -> str:
    """Median, percentiles and unit, or why there are none."""
    if line.median is None:
        return f"absent: {line.absent or 'no reason is given'}"
    spread = [line.p20, line.p80] if line.count is None or line.count > 1 else []
    values = [value for value in (line.median, *spread) if value is not None]
    unit = line.unit or ""
    if unit == "s":
        shown, unit = [tables.seconds(value) for value in values], ""
    else:
        prefixes = (("T", 1e12), ("G", 1e9), ("M", 1e6)) if unit in ("B/s", "FLOP/s") else ()
        prefix, factor = next((p for p in prefixes if line.median >= p[1]), ("", 1))
        shown, unit = [_figure(value / factor) for value in values], f" {prefix}{unit}"
    return shown[0] + (f" [{', '.join(shown[1:])}]" if len(shown) == 3 else "") + unit


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _setting(value: Any) -> str:
    """A value of a case or of the options, as it was given."""
    return f"{value:g}" if isinstance(value, float) else _figure(value)


def _figure(value: Any) -> str:
    if isinstance(value, float):
        small = value == 0 or 1e-6 <= abs(value) < 1e15
        return tables.figures(value) if small else f"{value:.2e}"
    if _is_number(value):
        return f"{value:,}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return NONE if value is None else value if isinstance(value, str) else json.dumps(value)
