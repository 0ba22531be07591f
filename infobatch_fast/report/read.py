"""Runs' folders and benchmarks' files, found and read; what is damaged gets one line.

Dimensions: N samples, P samples pictured.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from infobatch_fast.errors import UserError, reason
from infobatch_fast.pruning import Pruning
from infobatch_fast.report.lines import Line, read_lines
from infobatch_fast.report.runs import Run
from infobatch_fast.report.text import counted
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
    runs: dict[Path, Run] = {}
    files: dict[Path, Benchmark] = {}
    firsts: dict[str, Path] = {}
    for path in paths:
        try:
            found = [*_find(path, _DEEP)]
            if not found:
                there = "there is no such file or folder"
                raise UserError("it holds no run and no benchmark" if path.exists() else there)
        except (OSError, UserError) as error:
            inputs.bad[str(path)] = _why(error)
            continue
        for place in found:
            at = place.resolve()
            if at in runs or at in files:
                continue
            try:
                if place.is_dir():
                    run, problems = _read_run(at)
                    same = f"{run.config['seed']} {run.epochs}" if run.epochs else str(at)
                    if (first := firsts.setdefault(same, place)) != place:
                        raise UserError(f"it is a copy of {first}, which is counted once")
                    runs[at] = run
                else:
                    lines, problems = read_lines(at, Line)
                    if not lines:
                        raise UserError(problems[0] if problems else "it holds no lines yet")
                    files[at] = Benchmark(at.name, lines, bool(problems))
            except (OSError, UserError) as error:
                inputs.bad[str(place)] = _why(error)
            else:
                if problems:
                    more = f", and {counted(len(problems) - 1, 'more line')}" * (len(problems) > 1)
                    inputs.bad[str(place)] = f"{problems[0]}{more}; the rest is reported"
    inputs.runs = [replace(run, name=name) for run, name in _named(runs)]
    inputs.benchmarks = [replace(of, name=name) for of, name in _named(files)]
    return inputs


def arrays(run: Run) -> tuple[dict[str, np.ndarray], list[str]]:
    """Those of a run's .npy files that are used, and what is wrong with others.

    kept, scores, labels (N,); pictured (P,) and pictures (P, H, W, 3), neither without the other.
    """
    size, epochs = run.size, len(run.epochs)
    shapes: dict[str, tuple[int | None, ...]] = {
        **dict.fromkeys(("kept", "scores", "labels"), (size,)),
        **{"pictured": (None,), "pictures": (None, None, None, 3)},
    }
    bounds = {"kept": epochs + 1, "labels": size, "pictured": size}
    found: dict[str, np.ndarray] = {}
    problems = []
    for name, shape in shapes.items():
        path = run.folder / f"{name}.npy"
        if not path.is_file():
            continue
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if len(array.shape) != len(shape) or any(
                want not in (None, got) for want, got in zip(shape, array.shape, strict=True)
            ):
                raise ValueError(f"its shape must be {shape}, got {array.shape}")
            if name in bounds and array.size and not 0 <= array.min() <= array.max() < bounds[name]:
                raise ValueError(f"it must hold numbers in [0, {bounds[name]})")
            found[name] = array
        except Exception as error:  # a damaged header fails in many ways
            problems.append(f"{path.name} of {run.name} cannot be used: {reason(error)}")
    if len(found.get("pictured", ())) != len(found.get("pictures", ())):
        found = {name: found[name] for name in found.keys() - {"pictured", "pictures"}}
    return found, problems


def _find(path: Path, deep: int) -> Iterator[Path]:
    """The runs' folders and benchmarks' files that a path stands for."""
    if path.name == EPOCHS and path.is_file():
        path = path.parent
    if any((path / name).exists() for name in (CONFIG, EPOCHS, SUMMARY)) or (
        path.suffix == ".jsonl" and path.exists()
    ):
        yield path
    elif path.is_dir() and deep >= 0:
        for child in sorted(path.iterdir()):
            # A summary of runs says nothing that their folders do not.
            if child.name != RESULTS and not child.name.startswith("."):
                yield from _find(child, deep - 1)


def _named(found: Mapping[Path, Any]) -> Iterator[tuple[Any, str]]:
    """Each with the end of its path that tells it from the others."""
    for path, each in found.items():
        alike = [other for other in found if other.name == path.name]
        depth = next(
            n for n in range(1, 99) if len({other.parts[-n:] for other in alike}) == len(alike)
        )
        yield each, "/".join(path.parts[-depth:])


def _read_run(folder: Path) -> tuple[Run, list[str]]:
    """The run, and what is wrong with its epochs."""
    record = read_record(RunRecord, folder / CONFIG)
    config = record.config
    kinds = {"epochs": int, "seed": int, "model": str, "dataset": str}
    for values, expected in ((config, kinds), (record.device, {"name": str, "type": str})):
        for name, kind in expected.items():
            if type(values.get(name)) is not kind:
                got = values.get(name)
                raise UserError(f"{CONFIG}: {name} must be {kind.__name__}, got {got!r:.80}")
    if config["epochs"] < 1 or record.samples.get("train", 1) < 1:
        raise UserError(f"{CONFIG}: epochs and samples must be at least 1")
    try:
        Pruning.of(config)
    except (TypeError, ValueError) as error:
        raise UserError(f"{CONFIG} tells no pruning: {reason(error)}") from None
    path = folder / EPOCHS
    lines, problems = read_lines(path, EpochLine) if path.exists() else ([], [])
    size = record.samples.get("train") or max((line.kept for line in lines), default=0)
    epochs: list[EpochLine] = []
    for line in lines:
        if line.epoch != len(epochs) + 1 or not _possible(line, size, config["epochs"]):
            problems.append(f"{EPOCHS}: epoch {line.epoch} cannot follow epoch {len(epochs)}")
            break
        epochs.append(line)
    summary = None
    if (folder / SUMMARY).exists():
        summary = read_record(Summary, folder / SUMMARY)
        trained = sum(line.kept for line in epochs)
        if (summary.epochs, summary.samples_trained) != (len(epochs), trained):
            problems.append(f"{SUMMARY} is not of the {counted(len(epochs), 'epoch')} of {EPOCHS}")
            summary = None
    return Run(folder.name, folder, record, epochs, summary, bool(problems)), problems


def _possible(line: EpochLine, size: int, epochs: int) -> bool:
    times = (line.train_seconds, line.pruning_seconds or 0.0, line.startup_seconds)
    return (
        1 <= line.epoch <= epochs
        and 1 <= line.kept <= size
        and 0 <= (line.accuracy or 0.0) <= 1
        and min(times) >= 0
        and (line.score_histogram is None or _is_histogram(**line.score_histogram))
    )


def _is_histogram(
    low: Any = 0, high: Any = 0, counts: Any = (), unseen: Any = None, **more: object
) -> bool:
    numbers = all(isinstance(of, (int, float)) for of in (low, high, unseen, *counts))
    return numbers and 0 < low < high and len(counts) > 2


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or reason(error)
