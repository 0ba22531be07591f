"""Which runs may stand together: the same setting, device and source; the seeds alone differ."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from infobatch_fast.report import methods as report_methods
from infobatch_fast.report.methods import ABLATION, FULL, REPORTED, Method, method_of
from infobatch_fast.report.records import Run

# What a run's figures do not depend on (but for its noise), or what names its method instead. A
# preset is the defaults of the settings that stand beside it.
_NO_SETTING = (
    *("seed", "preset", "device"),
    *("loader", "eval_every", "checkpoint_every", "telemetry", "host_syncs"),
)
_REPORTED_SETTING = {
    "model": "r50",
    "dataset": "cifar10",
    "epochs": 200,
    "batch_size": 200,
    "optimizer": "lars",
    "max_lr": 5.2,
    "weight_decay": 5e-4,
    "label_smoothing": 0.1,
    "data_fraction": 1.0,
}


@dataclass(frozen=True)
class Row:
    """Complete runs of one method and one source, whose figures may be averaged.

    Attributes:
        label: of the method, with the mark of another source.
        method: what they leave out.
        runs: theirs; none for a method that was not measured.
        epochs: of each.
    """

    label: str
    method: Method
    runs: tuple[Run, ...]
    epochs: int


@dataclass(frozen=True)
class Section:
    """The runs of one setting on one device.

    Attributes:
        setting: every setting but method, seed and what does not matter.
        device: name, and threads of a CPU.
        gpu: whether that is a GPU.
        synthetic: whether the data are.
        reported: whether the setting is that of the reported figures.
        rows: of its complete runs.
        runs: all, complete or not, in the order given.
        apart: the settings that tell it from another section whose title is the same without.
    """

    setting: dict[str, Any]
    device: str
    gpu: bool
    synthetic: bool
    reported: bool
    rows: tuple[Row, ...]
    runs: tuple[Run, ...]
    apart: str = ""

    @property
    def title(self) -> str:
        """Model, data, length, optimizer, what sets it apart, and device."""
        s = self.setting
        data = f"SYNTHETIC data ({s['dataset']})" if self.synthetic else s["dataset"]
        if s["data_fraction"] < 1:
            data = f"{_fraction(s['data_fraction'])} of {data}"
        return (
            f"{s['model']} on {data}, {counted(s['epochs'], 'epoch')}, batch {s['batch_size']}, "
            f"{s['optimizer']}, max lr {s['max_lr']:g}{self.apart}; {self.device}"
        )

    @property
    def others(self) -> str:
        """The settings that the title leaves out."""
        told = ("model", "dataset", "epochs", "batch_size", "optimizer", "max_lr", "data_fraction")
        return ", ".join(f"{k} {v}" for k, v in sorted(self.setting.items()) if k not in told)

    def row(self, method: Method) -> list[Row]:
        """The method's rows in the tables, at least one: that of no runs."""
        rows = [r for r in self.rows if r.method == method and r.epochs == self.setting["epochs"]]
        return rows or [Row(method.label, method, (), self.setting["epochs"])]

    def further(self) -> list[Row]:
        """Rows that the reported tables do not have."""
        known = {*REPORTED, *ABLATION}
        epochs = self.setting["epochs"]
        return [r for r in self.rows if r.method not in known or r.epochs != epochs]


def main_source(runs: Sequence[Run]) -> tuple[str, bool]:
    """The source hash of most runs, and whether it was a tie, which the run given first decides."""
    counts = Counter(run.about["source_hash"] for run in runs if run.copy_of is None)
    ranked = counts.most_common()  # of equals, the first given comes first
    return ranked[0][0], len(ranked) > 1 and ranked[0][1] == ranked[1][1]


def state_of(run: Run, source: str) -> str:
    """Complete or not, and the marks that keep a run out of others' means."""
    done, epochs = len(run.epochs), run.config["epochs"]
    states = ["complete"]
    if run.damaged:
        read = f"{done} of {counted(epochs, 'epoch')} can be read"
        states = [f"INCOMPLETE: its record is DAMAGED, {read}"]
    elif not run.complete:
        ended = "no summary" if done == epochs else f"{done} of {counted(epochs, 'epoch')}"
        states = [f"INCOMPLETE: {ended}"]
    if run.copy_of is not None:
        states.append(f"copy of {run.copy_of}, not counted")
    if run.about["source_hash"] != source:
        states.append("OTHER SOURCE")
    if run.about["data"] != "genuine":
        states.append("SYNTHETIC data")
    if run.data_fraction < 1:
        states.append(_fraction(run.data_fraction))
    return "; ".join(states)


def device_of(about: dict[str, Any]) -> str:
    """The device of a record, as far as its figures depend on it."""
    device = about["device"]
    threads = f", torch threads: {device['threads']}" if "threads" in device else ""
    return f"{device['name']} ({device['type']}{threads})"


def sections(runs: Iterable[Run], source: str) -> list[Section]:
    """Runs grouped so that within a row of a section the seeds alone differ.

    The reported setting comes first. Full-data runs of fewer epochs stand in the section of the
    longer ones, if all else is the same and it has pruned runs: training shorter is what pruning
    has to beat.

    Args:
        runs: from `report_read.read`.
        source: the hash of the rest; runs of another have rows of their own.
    """
    grouped: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        if run.copy_of is not None:
            continue
        setting = tuple(sorted(_setting(run).items(), key=lambda item: item[0]))
        key = (run.about["data"] != "genuine", device_of(run.about), setting)
        grouped.setdefault(key, []).append(run)
    for key in list(grouped):
        longer = _longer(key, grouped)
        if longer is not None:
            grouped[longer] += grouped.pop(key)
    found = []
    for (synthetic, device, items), members in grouped.items():
        setting = dict(items)
        reported = not synthetic and _REPORTED_SETTING.items() <= setting.items()
        rows = _rows(members, source, setting["epochs"])
        gpu = members[0].about["device"]["type"] == "cuda"
        found.append(Section(setting, device, gpu, synthetic, reported, rows, tuple(members)))
    return sorted(_told_apart(found), key=lambda section: not section.reported)


def counted(number: int, word: str) -> str:
    """So many of a word: 1 epoch, 2 epochs."""
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def same_seeds(runs: Iterable[Run]) -> list[int]:
    """Seeds that more than one of the runs has."""
    counts = Counter(run.config["seed"] for run in runs)
    return sorted(seed for seed, count in counts.items() if count > 1)


def mean(values: Sequence[float], digits: int | None = None) -> str:
    """Mean and sample standard deviation (n - 1); a single value has none.

    Args:
        values: at least one.
        digits: behind the point; None is two, or more where three figures need them.
    """
    center = statistics.fmean(values)
    if digits is None:
        digits = 2
        while 0 < abs(center) * 10**digits < 99.95 and digits < 9:
            digits += 1
    text = f"{center:,.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {statistics.stdev(values):,.{digits}f}"


def _setting(run: Run) -> dict[str, Any]:
    dropped = (*_NO_SETTING, *report_methods.SETTINGS)
    setting = {
        name: value
        for name, value in run.config.items()
        if name not in dropped
        and (not name.startswith("synthetic_") or run.config["dataset"] == "synthetic")
    }
    return {**setting, "data_fraction": run.data_fraction}


def _fraction(share: float) -> str:
    return f"{100 * share:g}% OF THE DATA"


def _told_apart(found: Sequence[Section]) -> list[Section]:
    """Sections of equal titles with the settings that differ between them in their titles."""
    titles = Counter(section.title for section in found)
    apart = []
    for section in found:
        alike = [other.setting for other in found if other.title == section.title]
        names = {name for setting in alike for name in setting if titles[section.title] > 1}
        words = [
            f", {name} {section.setting.get(name, 'not recorded')}"
            for name in sorted(names)
            if len({repr(setting.get(name)) for setting in alike}) > 1
        ]
        apart.append(replace(section, apart="".join(words)))
    return apart


def _longer(key: tuple[Any, ...], grouped: dict[tuple[Any, ...], list[Run]]) -> Any:
    """The group that full-data runs are the shorter training of; None if there is none."""
    if any(method_of(run) != FULL for run in grouped[key]):
        return None
    mine = dict(key[2])
    fits = []
    for other, members in grouped.items():
        theirs = dict(other[2])
        alike = other[:2] == key[:2] and {**theirs, "epochs": mine["epochs"]} == mine
        pruned = any(method_of(run) != FULL for run in members)
        if alike and pruned and theirs["epochs"] > mine["epochs"]:
            fits.append((theirs["epochs"], other))
    return min(fits, key=lambda fit: fit[0])[1] if fits else None


def _rows(runs: list[Run], source: str, epochs: int) -> tuple[Row, ...]:
    grouped: dict[tuple[Method, int, str], list[Run]] = {}
    for run in runs:
        if run.complete:
            key = (method_of(run), run.config["epochs"], run.about["source_hash"])
            grouped.setdefault(key, []).append(run)
    rows = []
    # The main source first; sorting is stable.
    for (method, length, hashed), members in sorted(
        grouped.items(), key=lambda g: g[0][2] != source
    ):
        label = method.label
        if length != epochs:
            label += f", {counted(length, 'epoch')} (training shorter)"
        if hashed != source:
            label += f" (OTHER SOURCE {hashed[:8]})"
        rows.append(Row(label, method, tuple(members), length))
    return tuple(rows)
