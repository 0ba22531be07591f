"""What a report is made of: records of runs, and lines of benchmarks."""

import statistics
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np


class Sample(NamedTuple):
    """A training sample, and in how many epochs it was trained on.

    Attributes:
        number: its index.
        label: of its class.
        kept: epochs.
        score: after the last epoch; NaN where there is none, or it is not recorded.
        data: its image, (32, 32, 3) uint8, or its scores after each epoch, (E,) float32.
    """

    number: int
    label: int
    kept: int
    score: float
    data: np.ndarray


class Inside(NamedTuple):
    """What became of single samples; what was not recorded is empty.

    So are images and classes of a run that pruned nothing.

    Attributes:
        least: samples that were kept least, with their images, ascending.
        most: those that were kept most often, descending.
        classes: share of the (sample, epoch) pairs that were left out, by label.
        tracked: samples with their scores, in the order of how often they were kept.
    """

    least: tuple[Sample, ...] = ()
    most: tuple[Sample, ...] = ()
    classes: Mapping[int, float] = MappingProxyType({})
    tracked: tuple[Sample, ...] = ()


NOTHING = Inside()


@dataclass(frozen=True)
class Run:
    """The record of one run, as far as it has come.

    Attributes:
        letter: names it in the report.
        name: its folder's.
        about: config.json.
        epochs: lines of epochs.jsonl, in order.
        summary: summary.json; None while there is none, and where epochs it sums are missing.
        samples: N, the training samples; None if the record does not tell.
        damaged: whether epochs of epochs.jsonl cannot be read.
        copy_of: the letter of the run that this is a copy of, and not counted beside.
        inside: what became of single samples.
    """

    letter: str
    name: str
    about: dict[str, Any]
    epochs: list[dict[str, Any]]
    summary: dict[str, Any] | None
    samples: int | None
    damaged: bool = False
    copy_of: str | None = None
    inside: Inside = NOTHING

    @property
    def config(self) -> dict[str, Any]:
        """The settings."""
        return self.about["config"]

    @property
    def data_fraction(self) -> float:
        """Share of the data set's samples that there are; older records have all."""
        return self.config.get("data_fraction", 1.0)

    @property
    def expected_share(self) -> float | None:
        """Share of the samples of the epochs so far that the policy expected to leave out."""
        shares = [line.get("expected_saving") for line in self.epochs]
        known = [share for share in shares if share is not None]
        return statistics.fmean(known) if known and len(known) == len(shares) else None

    def class_name(self, label: int) -> str:
        """As the data set calls it."""
        names = self.about.get("classes") or []
        return names[label] if label < len(names) else f"class {label}"

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
        return sum(training_seconds(line) for line in self.epochs) / 60

    @property
    def pruning_seconds(self) -> float | None:
        """Seconds that pruning took so far; None where that was not measured in each epoch."""
        values = [line["pruning_seconds"] for line in self.epochs]
        return None if None in values else sum(values)

    @property
    def watched(self) -> bool:
        """Whether its host syncs were looked for on a CPU, which slows every operation."""
        on_cpu = self.about["device"]["type"] != "cuda"
        return on_cpu and self.config.get("host_syncs", "off") != "off"

    @property
    def device_hours(self) -> float:
        """Hours of all of the run so far, on its one device."""
        of_all = [self.summary] if self.summary else self.epochs
        walls = [of.get("seconds") for of in of_all]
        known = [wall for wall in walls if wall is not None]
        if len(known) == len(walls):
            return sum(known) / 3600
        others = ("evaluation_seconds", "checkpoint_seconds")
        rest = sum(of[name] for of in of_all for name in others)
        return self.minutes / 60 + rest / 3600

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

    @property
    def unbroken(self) -> list[dict[str, Any]]:
        """The epochs' lines before the first that is missing: sums over them lack nothing."""
        return [line for number, line in enumerate(self.epochs, 1) if line["epoch"] == number]

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


class Benchmark(NamedTuple):
    """The lines of one benchmark's file.

    Attributes:
        name: the file's with its folder's, and as much more as tells it from the others.
        lines: those that can be read, at least one.
        damaged: whether there are others.
    """

    name: str
    lines: list[dict[str, Any]]
    damaged: bool


@dataclass(frozen=True)
class Inputs:
    """Everything that was named on the command line.

    Attributes:
        runs: each once, in the order given.
        benchmarks: each file once, in the order given.
        bad: path of each that cannot be reported, in all or in part, and the reason.
    """

    runs: list[Run]
    benchmarks: list[Benchmark]
    bad: list[tuple[str, str]]


def training_seconds(line: dict[str, Any]) -> float:
    """Seconds of training of an epoch's line, pruning included."""
    return line["train_seconds"] + (line["pruning_seconds"] or 0.0)
