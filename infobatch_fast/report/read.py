"""Runs' folders and benchmarks' files, found and read; what is damaged gets one line."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from infobatch_fast.errors import UserError, reason
from infobatch_fast.pruning import Pruning
from infobatch_fast.report.lines import Line, read_lines
from infobatch_fast.report.runs import Run
from infobatch_fast.train.records import (
    CONFIG,
    EPOCHS,
    RESULTS,
    SUMMARY,
    EpochLine,
    RunRecord,
    Summary,
)
from infobatch_fast.train.records import read as read_record

_DEEP = 3  # folders below a named one: results, their experiments, their runs


@dataclass(frozen=True)
class Benchmark:
    """The lines of one file, at least one, and whether others cannot be read."""

    name: str
    lines: Sequence[Line]
    damaged: bool


@dataclass
class Inputs:
    """What was named, each once and in that order, and the reason for what cannot be reported."""

    runs: list[Run] = field(default_factory=list)
    benchmarks: list[Benchmark] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)


def read(paths: Sequence[Path]) -> Inputs:
    """Read runs' folders, benchmarks' .jsonl files, and folders that hold them."""
    inputs = Inputs()
    seen: set[Path] = set()
    for path in paths:
        found = [*_find(path, _DEEP)]
        if not found:
            there = os.path.exists(path)
            why = "it holds no run and no benchmark" if there else "there is no such file or folder"
            inputs.bad[str(path)] = why
        for place in found:
            at = place.resolve()
            if at in seen:
                continue
            seen.add(at)
            try:
                problems = _read(at, inputs)
            except UserError as error:
                inputs.bad[str(place)] = str(error)
            else:
                if problems:
                    inputs.bad[str(place)] = f"{problems[0]}; the rest is reported"
    return inputs


def _find(path: Path, deep: int) -> Iterator[Path]:
    """The runs' folders and benchmarks' files that a path stands for, and folders kept shut."""
    marks = [path / name for name in (CONFIG, EPOCHS)] + [path] * (path.suffix == ".jsonl")
    if any(map(os.path.exists, marks)):  # pathlib's raises where a folder is another user's
        yield path
    elif os.path.isdir(path) and deep >= 0:
        try:
            children = sorted(path.iterdir())
        except OSError:
            yield path  # whose reading says why
            return
        for child in children:
            # A summary of runs says nothing that their folders do not.
            if child.name != RESULTS and not child.name.startswith("."):
                yield from _find(child, deep - 1)


def _read(path: Path, inputs: Inputs) -> list[str]:
    """Add a run or a benchmark to the inputs; returns what is wrong with its lines."""
    if path.is_dir():
        run, problems = _read_run(path)
        inputs.runs.append(run)
    else:
        lines, problems = read_lines(path, Line)
        if not lines:
            raise UserError(problems[0] if problems else "it holds no lines yet")
        inputs.benchmarks.append(Benchmark(path.name, lines, bool(problems)))
    return problems


def _read_run(folder: Path) -> tuple[Run, list[str]]:
    record = read_record(RunRecord, folder / CONFIG)
    try:
        Pruning.of(record.config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{CONFIG} tells no pruning: {reason(error)}") from None
    path = folder / EPOCHS
    lines, problems = read_lines(path, EpochLine) if path.exists() else ([], [])
    whole = takewhile(lambda of: of[0] == of[1].epoch, enumerate(lines, 1))
    epochs = [line for _, line in whole]
    if len(epochs) < len(lines):
        problems.append(f"{EPOCHS} has no line for epoch {len(epochs) + 1} in its place")
    path = folder / SUMMARY
    summary = read_record(Summary, path) if path.exists() else None
    return Run(folder.name, folder, record, epochs, summary, bool(problems)), problems
