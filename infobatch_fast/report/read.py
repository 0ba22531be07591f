"""Runs' folders and benchmarks' lines, found, read and checked; what is broken gets one line."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from infobatch_fast.errors import UserError, reason
from infobatch_fast.report import rules
from infobatch_fast.report.inside import read_inside
from infobatch_fast.report.records import Benchmark, Inputs, Run
from infobatch_fast.train import folder as record

_REST = "the rest is reported"


def read(paths: Sequence[Path]) -> Inputs:
    """Read runs' folders, benchmarks' .jsonl files, folders that hold them, and folders of those.

    What cannot be read, be it a line of a file, is in `bad`; the rest is reported.
    """
    runs: dict[Path, Run] = {}
    benchmarks: dict[Path, Benchmark] = {}
    bad: dict[str, str] = {}
    seen: set[Path] = set()
    for path in paths:
        try:
            found = list(_find(path))
        except (OSError, UserError) as error:
            bad.setdefault(str(path), _why(error))
            continue
        for place in found:
            resolved = place.resolve()
            if resolved in seen:
                continue
            seen.add(resolved)
            try:
                if place.is_dir():
                    run, problems = _read_run(resolved, _letters(len(runs)))
                    inside, broken = read_inside(resolved, run)
                    runs[resolved] = replace(run, inside=inside)
                    bad |= {str(place / name): f"{why}; {_REST}" for name, why in broken}
                else:
                    benchmarks[resolved], problems = _read_benchmark(place)
            except (OSError, UserError) as error:
                bad[str(place)] = _why(error)
                continue
            if problems:
                more = len(problems) - 1
                others = f", and {more} more {'lines' if more > 1 else 'line'}" if more else ""
                bad[str(place)] = f"{problems[0]}{others}; {_REST}"
    names = _names(list(runs), 1) | _names(list(benchmarks), 2)
    return Inputs(
        _with_copies([replace(run, name=names[path]) for path, run in runs.items()]),
        [benchmark._replace(name=names[path]) for path, benchmark in benchmarks.items()],
        list(bad.items()),
    )


def _names(paths: Sequence[Path], least: int) -> dict[Path, str]:
    """The last parts of each path, at least so many, and as many as tell it from the others."""
    names: dict[Path, str] = {}
    for path in paths:
        for depth in range(least, len(path.parts) + 1):
            names[path] = "/".join(path.parts[-depth:])
            if sum(other.parts[-depth:] == path.parts[-depth:] for other in paths) == 1:
                break
    return names


def _with_copies(runs: Sequence[Run]) -> list[Run]:
    """The runs, of which those of equal epochs and seed are copies of one: no two take as long."""
    alike: dict[tuple[int, str], list[Run]] = {}
    for run in runs:
        if run.epochs:  # what has not begun is equal to all that has not
            key = run.config["seed"], json.dumps(run.epochs)
            alike.setdefault(key, []).append(run)
    copies = {
        run.letter: original.letter
        for members in alike.values()
        for original in [max(members, key=lambda run: run.complete)]  # the first, if all are
        for run in members
        if run is not original
    }
    return [replace(run, copy_of=copies.get(run.letter)) for run in runs]


def _find(path: Path) -> Iterator[Path]:
    """The runs' folders and benchmarks' files that a path stands for."""
    if path.is_file() and path.suffix == ".jsonl":
        yield path
        return
    if not path.exists():
        raise UserError("there is no such file or folder")
    if not path.is_dir():
        raise UserError("it is no run's folder, no .jsonl file, and no folder of these")
    if _is_run(path):
        yield path
        return
    found = False
    for place in [path, *sorted(path.iterdir())]:
        if place != path and place.is_dir() and _is_run(place):
            found = True
            yield place
        elif place.is_dir():
            # A summary of runs says nothing that their folders do not.
            lines = sorted(p for p in place.glob("*.jsonl") if p.name != record.RESULTS)
            found = found or bool(lines)
            yield from lines
    if not found:
        raise UserError("it holds no run and no benchmark's .jsonl file")


def _is_run(folder: Path) -> bool:
    try:
        names = (record.CONFIG, record.EPOCHS, record.SUMMARY)
        return any((folder / name).exists() for name in names)
    except OSError:  # not to be looked into: reading it as a run says why
        return True


def _letters(number: int) -> str:
    """The name of run 0, 1, ...: a to z, then aa, ab, ..."""
    text = ""
    while number >= 0:
        text = chr(ord("a") + number % 26) + text
        number = number // 26 - 1
    return text


def _read_run(folder: Path, letter: str) -> tuple[Run, list[str]]:
    """The run, and what is wrong with lines of its epochs."""
    about = _object(_bytes(folder / record.CONFIG), record.CONFIG)
    rules.check(about, rules.ABOUT, record.CONFIG, rules.ABOUT_NEW)
    config = about["config"]
    rules.check(config, rules.CONFIG, f"config of {record.CONFIG}", rules.CONFIG_NEW)
    for name, value in config.items():
        if isinstance(value, (dict, list)):
            raise UserError(f"config of {record.CONFIG}: {name} must be a plain value")
    rules.check(about["device"], rules.DEVICE, f"device of {record.CONFIG}")
    samples = about.get("samples", {})
    rules.check(samples, rules.SAMPLES if samples else {}, f"samples of {record.CONFIG}")

    epochs, problems = _read_epochs(folder / record.EPOCHS)
    if epochs and epochs[-1]["epoch"] > config["epochs"]:
        raise UserError(
            f"{record.EPOCHS} has {epochs[-1]['epoch']} epochs, "
            f"but {record.CONFIG} {config['epochs']}"
        )
    # No sample is pruned in a run's first epoch; older records do not say how many there are.
    first = epochs[0]["kept"] if epochs and epochs[0]["epoch"] == 1 else None
    count = samples.get("train") or first
    if count is not None and any(line["kept"] > count for line in epochs):
        raise UserError(f"{record.EPOCHS}: kept must be at most the {count} training samples")
    bins = {len(h["counts"]) for line in epochs if (h := line.get("score_histogram"))}
    if len(bins) > 1:
        raise UserError(f"{record.EPOCHS}: score_histogram must have as many bins in each epoch")

    summary = None
    if (folder / record.SUMMARY).exists():
        summary = _object(_bytes(folder / record.SUMMARY), record.SUMMARY)
        rules.check(summary, rules.SUMMARY, record.SUMMARY, rules.SUMMARY_NEW)
        if not problems and len(epochs) < summary["epochs"]:
            problems.append(
                f"{record.EPOCHS} has {len(epochs)} epochs, but {record.SUMMARY} "
                f"{summary['epochs']}"
            )
    if problems:
        summary = None  # figures and epochs would not be of the same
    run = Run(letter, folder.name, about, epochs, summary, count, bool(problems))
    if summary is not None:
        last = run.evaluated[-1]["accuracy"] if run.evaluated else None
        for name, value in (
            ("epochs", len(epochs)),
            ("samples_trained", run.trained),
            ("accuracy_last", last),
        ):
            if summary[name] != value:
                raise UserError(
                    f"{record.SUMMARY}: {name} must be {value} as in {record.EPOCHS}, "
                    f"got {summary[name]}"
                )
    return run, problems


def _read_epochs(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The epochs' lines that can be read, in order, and what is wrong with the others."""
    epochs: list[dict[str, Any]] = []
    problems: list[str] = []
    expected = 1
    for number, row in enumerate(_bytes(path).splitlines() if path.exists() else [], 1):
        where = f"line {number} of {path.name}"
        try:
            line = _object(row, where)
            rules.check(line, rules.EPOCH, where, rules.EPOCH_NEW)
        except UserError as error:
            problems.append(str(error))
            expected += 1
            continue
        epoch = line["epoch"]
        if epoch != expected:
            problems.append(f"{where}: epoch must be {expected}, got {epoch}")
        if epoch >= expected:
            epochs.append(line)
            expected = epoch + 1
    return epochs, problems


def _read_benchmark(path: Path) -> tuple[Benchmark, list[str]]:
    """The lines that can be read, and what is wrong with the others."""
    if path.name == record.EPOCHS:
        raise UserError("it is part of a run's record: name the folder")
    lines, problems = [], []
    for number, row in enumerate(_bytes(path).splitlines(), 1):
        where = f"line {number}"
        try:
            line = _object(row, where)
            rules.check(line, rules.LINE, where)
            rules.check(line["device"], rules.DEVICE, f"device of {where}")
            if line["absent"] is None and (line["unit"] is None or line["median"] is None):
                raise UserError(f"{where}: it has neither figures nor a reason")
            json.dumps(line, allow_nan=False)
        except ValueError:  # of a number such as 1e999
            problems.append(f"{where}: it holds an infinity")
        except UserError as error:
            problems.append(str(error))
        else:
            lines.append(line)
    if not lines:
        raise UserError(problems[0] if problems else "it holds no lines yet")
    return Benchmark(path.name, lines, bool(problems)), problems


def _bytes(path: Path) -> bytes:
    if not path.exists():
        raise UserError(f"{path.name} is missing")
    if not path.is_file():  # a pipe would be waited for
        raise UserError(f"{path.name} must be a regular file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path.name}: {_why(error)}") from None


def _object(content: bytes, where: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        value = json.loads(content.decode(), parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON object: {reason(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} is no JSON object: it holds a {type(value).__name__}")
    return value


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or reason(error)
