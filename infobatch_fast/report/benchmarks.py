"""The tables of a report's benchmarks, a table for each part of each file."""

import json
import os
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from infobatch_fast.report import text as tables
from infobatch_fast.report.groups import device_of
from infobatch_fast.report.page import Block, Heading, Table, Text
from infobatch_fast.report.records import Benchmark
from infobatch_fast.report.tables import COMMIT, NONE, number, short_commit

_INTERVAL = (
    " In a row with low and high: the 95% interval from low to high, of the median of paired "
    f"differences ({NONE}: too few pairs for one)."
)
# As further figures' names end; what else they end in is no unit.
_UNITS = {
    "percent": "%",
    "bytes": "bytes",
    "images/s": "images/s",
    "B/s": "B/s",
    "FLOP/s": "FLOP/s",
    "FLOP": "FLOP",
    "images": "images",
    "steps": "steps",
    "joules": "J",
    "watts": "W",
}
_SECONDS = ("s", "seconds")
_TIMES = {"s": 1.0, "ms": 1e3, "us": 1e6}  # in a second


def benchmark_tables(benchmarks: Sequence[Benchmark]) -> list[Block]:
    """A table for each part of each benchmark, with what it was measured on."""
    files = Counter(name for b in benchmarks for name in {line["benchmark"] for line in b.lines})
    blocks: list[Block] = []
    for benchmark in benchmarks:
        for lines in _parts(benchmark.lines):
            first = lines[0]
            name = f", {benchmark.name}" if files[first["benchmark"]] > 1 else ""
            marks = "; ".join(_marks(benchmark, lines))
            title = f"{first['benchmark']}: {first['part']}{name}" + f" ({marks})" * bool(marks)
            blocks += [Heading(title, 3), _table(lines), Text(_about(benchmark, lines))]
    return blocks


def _parts(lines: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Lines that are rows of one table."""
    of = ("benchmark", "part", "quick", "commit", "source_hash", "device", "options")
    parts: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        key = json.dumps([line[name] for name in of], sort_keys=True)
        parts.setdefault(key, []).append(line)
    return list(parts.values())


def _marks(benchmark: Benchmark, lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What keeps a table's figures from being taken at their word."""
    if lines[0]["quick"]:
        yield "QUICK RUN: too short to quote"
    if not all(line["complete"] for line in lines):
        yield "STOPPED MIDWAY"
    if benchmark.damaged:
        yield "FILE DAMAGED"
    loads = [
        of["load_average"]
        for line in lines
        for of in (line["options"], line["more"])
        if isinstance(of.get("load_average"), (int, float))
    ]
    cores, where = lines[0]["options"].get("cores"), "its"
    if not isinstance(cores, int):
        cores, where = os.cpu_count() or 1, "this machine's"
    if loads and max(loads) > cores:
        yield f"BUSY MACHINE: load average {number(max(loads))}, above {where} {cores} cores"


def _about(benchmark: Benchmark, lines: Sequence[dict[str, Any]]) -> str:
    first = lines[0]
    about = [
        f"on {device_of(first)}",
        f"commit {short_commit(first['commit'])}",
        f"source {first['source_hash'][:COMMIT]}",
        f"file {benchmark.name}",
        f"started {first['started']}",
        *(f"{name} {_setting(value)}" for name, value in first["options"].items()),
    ]
    names = {name.split("_")[0] for line in lines for name in line["more"]}
    interval = _INTERVAL if {"low", "high"} <= names else ""
    return f"Median [20th, 80th percentile]; {'; '.join(about)}.{interval}"


def _table(lines: Sequence[dict[str, Any]]) -> Table:
    case = list(dict.fromkeys(name for line in lines for name in line["case"]))
    more = list(dict.fromkeys(name for line in lines for name in line["more"]))
    columns = [
        _column(name, [line["more"].get(name) for line in lines], _time_unit(lines))
        for name in more
    ]
    rows = []
    for index, line in enumerate(lines):
        rows.append(
            [
                *(_setting(line["case"].get(name)) for name in case),
                _measured(line),
                number(line["count"]),
                *(cells[index] for _, cells in columns),
            ]
        )
    heads = [*(_words(name) for name in case), "median [p20, p80]", "count"]
    return Table("", [*heads, *(head for head, _ in columns)], rows, left=len(case))


def _time_unit(lines: Sequence[dict[str, Any]]) -> str:
    """One that suits the seconds among the further figures of a table."""
    sizes = [
        abs(value)
        for line in lines
        for name, value in line["more"].items()
        if name.rpartition("_")[2] in _SECONDS and _is_number(value) and value
    ]
    return tables.seconds(statistics.median(sizes)).split()[-1] if sizes else "s"


def _column(name: str, values: Sequence[Any], time_unit: str) -> tuple[str, list[str]]:
    """Head and cells of a further figure, whose name ends in its unit.

    Args:
        name: as the lines have it.
        values: of each line; None where there is none.
        time_unit: s, ms or us, for seconds.
    """
    words, _, last = name.rpartition("_")
    if words and last in _UNITS:
        return f"{_words(words)} ({_UNITS[last]})", [_figure(value) for value in values]
    if words and last in _SECONDS:
        factor = _TIMES[time_unit]
        scaled = [value * factor if _is_number(value) else value for value in values]
        return f"{_words(words)} ({time_unit})", [_figure(value) for value in scaled]
    return _words(name), [_figure(value) for value in values]


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
        shown = [number(value / factor if prefix else value) for value in values]
        unit = f" {prefix}{unit}"
    return shown[0] + (f" [{', '.join(shown[1:])}]" if len(shown) == 3 else "") + unit


def _words(name: str) -> str:
    return name.replace("_", " ")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _setting(value: Any) -> str:
    """A value of a case or of the options, as it was given."""
    return f"{value:g}" if isinstance(value, float) else _figure(value)


def _figure(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return number(value)
    return NONE if value is None else json.dumps(value)
