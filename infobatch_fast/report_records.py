"""What a report is made of: runs' folders and benchmarks' lines, found, read and checked."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from infobatch_fast import measure, record
from infobatch_fast import report_rules as rules
from infobatch_fast.errors import UserError, reason


@dataclass(frozen=True)
class Run:
    """The record of one run, as far as it has come.

    Attributes:
        letter: names it in the report.
        name: its folder's.
        about: config.json.
        epochs: lines of epochs.jsonl, in order.
        summary: summary.json; None while there is none.
        samples: N, the training samples; None if the record does not tell.
    """

    letter: str
    name: str
    about: dict[str, Any]
    epochs: list[dict[str, Any]]
    summary: dict[str, Any] | None
    samples: int | None

    @property
    def config(self) -> dict[str, Any]:
        """The settings."""
        return self.about["config"]

    @property
    def complete(self) -> bool:
        """Whether all epochs are there, and their summary."""
        return self.summary is not None and len(self.epochs) == self.config["epochs"]

    @property
    def trained(self) -> int:
        """Samples trained on so far."""
        return sum(line["kept"] for line in self.epochs)

    @property
    def saved_share(self) -> float | None:
        """Share of the samples of the epochs so far that were left out."""
        if not self.epochs or self.samples is None:
            return None
        return 1 - self.trained / (self.samples * len(self.epochs))

    @property
    def minutes(self) -> float:
        """Minutes of training so far, pruning included."""
        return (self.total("train_seconds") + self.total("pruning_seconds")) / 60

    @property
    def device_hours(self) -> float:
        """Hours of all of the run so far, on its one device."""
        of_all = [self.summary] if self.summary else self.epochs
        walls = [of.get("seconds") for of in of_all]
        known = [wall for wall in walls if wall is not None]
        if len(known) == len(walls):
            return sum(known) / 3600
        return sum(self.total(name) for name in rules.SECONDS) / 3600

    @property
    def phases(self) -> dict[str, float] | None:
        """Seconds so far by phase; None if they were not recorded."""
        if self.summary is not None:
            return self.summary.get("phases")
        if not self.epochs or not all(line.get("phases") for line in self.epochs):
            return None
        sums: Counter[str] = Counter()
        for line in self.epochs:
            sums.update(line["phases"])
        return dict(sums)

    @property
    def evaluated(self) -> list[dict[str, Any]]:
        """The epochs' lines that have an accuracy."""
        return [line for line in self.epochs if line["accuracy"] is not None]

    def total(self, name: str) -> float:
        """Sum of a field over the run so far."""
        return self.summary[name] if self.summary else sum(line[name] for line in self.epochs)

    def figure(self, name: str) -> float | None:
        """A field that only the summary has; None where it is absent."""
        return self.summary.get(name) if self.summary else None

    def no_energy(self) -> str:
        """Why there are no joules."""
        if self.summary is None:
            return "the run is incomplete"
        absent = (self.summary.get("nvml") or {}).get("absent", {})
        for field in ("joules", "all", "power_watts"):
            if field in absent:
                return absent[field]
        return "not recorded"


@dataclass(frozen=True)
class Inputs:
    """Everything that was named on the command line.

    Attributes:
        runs: each once, in the order given.
        benchmarks: lines by their file.
        bad: path and reason of each that cannot be reported.
    """

    runs: list[Run]
    benchmarks: dict[Path, list[dict[str, Any]]]
    bad: list[tuple[str, str]]


def read(paths: Sequence[Path]) -> Inputs:
    """Read runs' folders, benchmarks' .jsonl files, folders that hold them, and folders of those.

    What cannot be read is in `bad`; the rest is reported.
    """
    runs: dict[Path, Run] = {}
    benchmarks: dict[Path, list[dict[str, Any]]] = {}
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
                    runs[resolved] = _read_run(resolved, _letters(len(runs)))
                else:
                    benchmarks[place] = _read_benchmark(place)
            except (OSError, UserError) as error:
                bad[str(place)] = _why(error)
    names = Counter(run.name for run in runs.values())
    return Inputs(
        [
            run if names[run.name] == 1 else replace(run, name=f"{path.parent.name}/{run.name}")
            for path, run in runs.items()
        ],
        benchmarks,
        list(bad.items()),
    )


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
            lines = sorted(place.glob("*.jsonl"))
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


def _read_run(folder: Path, letter: str) -> Run:
    about = _object(_text(folder / record.CONFIG), record.CONFIG)
    rules.check(about, rules.ABOUT, record.CONFIG, rules.ABOUT_NEW)
    config = about["config"]
    rules.check(config, rules.CONFIG, f"config of {record.CONFIG}")
    for name, value in config.items():
        if isinstance(value, (dict, list)):
            raise UserError(f"config of {record.CONFIG}: {name} must be a plain value")
    rules.check(about["device"], rules.DEVICE, f"device of {record.CONFIG}")
    samples = about.get("samples", {})
    rules.check(samples, rules.SAMPLES if samples else {}, f"samples of {record.CONFIG}")

    epochs = []
    if (folder / record.EPOCHS).exists():
        for number, row in enumerate(_text(folder / record.EPOCHS).splitlines(), 1):
            where = f"line {number} of {record.EPOCHS}"
            line = _object(row, where)
            rules.check(line, rules.EPOCH, where, rules.EPOCH_NEW)
            if line["epoch"] != number:
                raise UserError(f"{where}: epoch must be {number}, got {line['epoch']}")
            epochs.append(line)
    if len(epochs) > config["epochs"]:
        raise UserError(
            f"{record.EPOCHS} has {len(epochs)} epochs, but {record.CONFIG} {config['epochs']}"
        )
    # No sample is pruned in a run's first epoch; older records do not say how many there are.
    count = samples.get("train") or (epochs[0]["kept"] if epochs else None)
    if epochs and max(line["kept"] for line in epochs) > count:
        raise UserError(f"{record.EPOCHS}: kept must be at most the {count} training samples")
    bins = {len(h["counts"]) for line in epochs if (h := line.get("score_histogram"))}
    if len(bins) > 1:
        raise UserError(f"{record.EPOCHS}: score_histogram must have as many bins in each epoch")

    summary = None
    if (folder / record.SUMMARY).exists():
        summary = _object(_text(folder / record.SUMMARY), record.SUMMARY)
        rules.check(summary, rules.SUMMARY, record.SUMMARY, rules.SUMMARY_NEW)
    run = Run(letter, folder.name, about, epochs, summary, count)
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
    return run


def _read_benchmark(path: Path) -> list[dict[str, Any]]:
    if path.name == record.EPOCHS:
        raise UserError("it is part of a run's record: name the folder")
    _text(path)  # a pipe would be waited for
    try:
        lines = measure.read_lines(path)
    except RecursionError:
        raise UserError("it is nested too deeply") from None
    if not lines:
        raise UserError("it holds no lines yet")
    for number, line in enumerate(lines, 1):
        where = f"line {number}"
        rules.check(line, rules.LINE, where)
        rules.check(line["device"], rules.DEVICE, f"device of {where}")
        if line["absent"] is None and (line["unit"] is None or line["median"] is None):
            raise UserError(f"{where}: it has neither figures nor a reason")
        try:
            json.dumps(line, allow_nan=False)
        except ValueError:
            raise UserError(f"{where}: it holds a NaN or an infinity") from None
    return lines


def _text(path: Path) -> str:
    if not path.exists():
        raise UserError(f"{path.name} is missing")
    if not path.is_file():
        raise UserError(f"{path.name} must be a regular file")
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path.name}: {_why(error)}") from None


def _object(text: str, where: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number of JSON")

    try:
        value = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON object: {reason(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{where} is no JSON object: it holds a {type(value).__name__}")
    return value


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or reason(error)
