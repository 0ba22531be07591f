"""The rows of benchmarks as tables: of a report, and of the benchmark's own last words."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from infobatch_fast.report.lines import Line
from infobatch_fast.report.page import Block, Heading, Table, Text
from infobatch_fast.report.read import Benchmark
from infobatch_fast.report.runs import device_of
from infobatch_fast.report.text import amount, figures, seconds

DIFFERENCE = "difference"  # the side that is the first less the second


def benchmark_tables(benchmarks: Sequence[Benchmark]) -> list[Block]:
    """A table for each part, beneath what it was measured on."""
    blocks: list[Block] = []
    for benchmark in benchmarks:
        calls: dict[str, list[Line]] = {}
        for line in benchmark.lines:
            of = (line.benchmark, line.quick, line.source_hash, line.device, line.options)
            calls.setdefault(json.dumps(of, sort_keys=True), []).append(line)
        for lines in calls.values():
            name, marks = lines[0].benchmark, cautions(lines[0].options, lines[0].quick)
            marks += ["STOPPED MIDWAY"] * (not all(line.complete for line in lines))
            marks += ["FILE DAMAGED"] * benchmark.damaged
            title = f"{name}, {benchmark.name}" + f" ({'; '.join(marks)})" * bool(marks)
            blocks += [Heading(title, 3), Text(_about(lines[0]), "aside")]
            for part in dict.fromkeys(line.part for line in lines if line.absent is None):
                rows = [line for line in lines if line.part == part and line.absent is None]
                blocks += [Heading(f"{name}: {part}", 4), Table(*pivot(rows, ends=True))]
            blocks += [Text(f"Absent: {each}.") for each in absences(lines)]
    return blocks


def cautions(options: Mapping[str, Any], quick: bool) -> list[str]:
    """What a reader of a benchmark's figures must know."""
    said = ["a QUICK run: too short to quote"] if quick else []
    load, cores = options.get("load_average", 0.0), options.get("cores", 1)
    if load > cores / 2:
        busy = f"load average {figures(load)} of {cores} cores"
        said.append(f"a BUSY machine, {busy}: it is faster than these figures")
    if options.get("source") == "synthetic":
        said.append("SYNTHETIC images: $INFOBATCH_DATA names the folder of CIFAR-10")
    return said


def words(case: Mapping[str, Any], without: Sequence[str] = ("side",)) -> str:
    """A case in words: "r50, batch size 200, graph", numbers with their names."""
    named = {name: value for name, value in case.items() if name not in without}
    return ", ".join(
        value if isinstance(value, str) else f"{name.replace('_', ' ')} {_figure(value)}"
        for name, value in named.items()
    )


def pivot(lines: Sequence[Line], ends: bool = False) -> tuple[list[str], list[list[str]], int]:
    """Heads and rows of figures, the sides as columns, and how many columns hold words.

    With `ends` each figure has its 20th and 80th percentile, and all else that its line says.
    """
    keys = list(dict.fromkeys(key for line in lines for key in line.case if key != "side"))
    sides = list(dict.fromkeys(line.case.get("side", "") for line in lines))
    cells: dict[tuple[str, ...], dict[str, str]] = {}
    for line in lines:
        of = tuple(_figure(line.case.get(key, "")) for key in keys)
        cells.setdefault(of, {})[line.case.get("side", "")] = cell(line, ends)
    if len(sides) > max(3, len(cells)):  # more than lie side by side
        cases = [", ".join(f"{k} {v}" for k, v in zip(keys, of, strict=True)) for of in cells]
        heads = ["", *cases]
        rows = [[side, *(by.get(side, "-") for by in cells.values())] for side in sides]
    else:
        heads = [*keys, *sides]
        rows = [[*of, *(by.get(side, "-") for side in sides)] for of, by in cells.items()]
    return [head.replace("_", " ") for head in heads], rows, len(keys) if heads[0] else 1


def cell(line: Line, ends: bool = False) -> str:
    """A row's figure: median, and interval or shares of limits."""
    if line.median is None:
        return "absent"
    value, more = amount(line.median, line.unit), line.more
    if line.case.get("side") == DIFFERENCE:
        low, high = more.get("low_seconds"), more.get("high_seconds")
        if low is None or high is None:
            return f"{value} (too few pairs for an interval)"
        share = figures(more["median_percent"])
        return f"{value} ({seconds(low)} to {seconds(high)}; {share}%)"
    if ends and None not in (spread := (line.p20, line.p80)):
        value += f" [{', '.join(amount(of, line.unit) for of in spread if of is not None)}]"
    beside = [f"{figures(more['TFLOP/s'])} TFLOP/s"] if "TFLOP/s" in more else []
    beside += [f"{figures(v)}%" for name, v in more.items() if name.endswith("_percent")]
    if ends:
        rest = {name: v for name, v in more.items() if not name.endswith(("_percent", "TFLOP/s"))}
        for name, v in rest.items():
            timed = name.endswith("_seconds") and isinstance(v, float)
            what = name.removesuffix("_seconds").replace("_", " ")
            beside.append(f"{what} {seconds(v) if timed else _figure(v)}")
    return f"{value} ({', '.join(beside)})" if beside else value


def absences(lines: Sequence[Line]) -> list[str]:
    """What has no figures, and why."""
    whys: dict[tuple[str, str], list[str]] = {}
    for line in lines:
        if line.absent is not None and line.case.get("side") != DIFFERENCE:
            side = f"{line.part}, {line.case['side']}" if "side" in line.case else line.part
            whys.setdefault((line.absent, side), []).append(words(line.case))
    return [
        f"{side}{f' of {of[0]}' if len(of) == 1 else f', {len(of)} rows'}: {why}"
        for (why, side), of in whys.items()
    ]


def _about(line: Line) -> str:
    options = ", ".join(f"{name} {_figure(value)}" for name, value in line.options.items())
    return (
        "Median [20th, 80th percentile], of differences (the 95% interval); % of the limits that "
        f"were measured, of copying last, or of an epoch; started {line.started} on "
        f"{device_of(line.device)}; commit {str(line.commit)[:8]}, source {line.source_hash[:8]}; "
        f"{options}."
    )


def _figure(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return figures(value)
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value)
