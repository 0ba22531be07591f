"""What a run is, and which runs may stand together; pandas comes later, in `paired`."""

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from infobatch_fast.pruning import Pruning
from infobatch_fast.report.text import counted
from infobatch_fast.train.records import EpochLine, RunRecord, Summary

# Settings that make no other experiment. A preset is the defaults of those that stand beside it.
FREE = {"seed", "preset", "epochs", "device", "loader", "host_syncs"}
FREE |= {"eval_every", "checkpoint_every", "telemetry", "log"}
FREE |= {"workers", "cache", "max_bad_files"}
FREE |= {field.name for field in fields(Pruning)}
# The data set with which alone a setting means something; two are older records'.
ONLY_OF = dict.fromkeys(["synthetic_samples", "synthetic_classes"], "synthetic")
ONLY_OF |= dict.fromkeys(["synthetic_easy", "synthetic_hard"], "synthetic")
ONLY_OF |= dict.fromkeys(["train_size", "test_size"], "folder")


@dataclass(frozen=True)
class Run:
    """The record of one run, as far as it has come.

    Attributes:
        epochs: the first ones without a gap.
        damaged: whether there is more in epochs.jsonl that cannot be read.
    """

    name: str
    folder: Path
    record: RunRecord
    epochs: Sequence[EpochLine]
    summary: Summary | None
    damaged: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """The settings by name."""
        return self.record.config

    @cached_property
    def pruning(self) -> Pruning:
        """What it leaves out: one value for all runs that train alike."""
        return Pruning.of(self.config).method

    @property
    def complete(self) -> bool:
        """Whether all epochs are there, and their summary."""
        return self.summary is not None and len(self.epochs) == self.config["epochs"]

    @property
    def size(self) -> int:
        """N, the training samples; the first epoch of older records, which do not tell, has all."""
        return self.record.samples.get("train") or self.epochs[0].kept

    @property
    def trained(self) -> int:
        """Samples trained on so far."""
        return sum(line.kept for line in self.epochs)

    @property
    def saved_share(self) -> float | None:
        """Share of the samples of the epochs so far that were left out."""
        return 1 - self.trained / (self.size * len(self.epochs)) if self.epochs else None

    @property
    def accuracy(self) -> float | None:
        """Percent, of the last epoch that was evaluated."""
        known = [line.accuracy for line in self.epochs if line.accuracy is not None]
        return 100 * known[-1] if known else None

    @property
    def seconds(self) -> float:
        """Of training and pruning so far, without start-up and evaluation."""
        return sum(map(training_seconds, self.epochs))

    @property
    def pruning_seconds(self) -> float | None:
        """So far; None where an epoch did not measure it."""
        known = [line.pruning_seconds for line in self.epochs if line.pruning_seconds is not None]
        return sum(known) if len(known) == len(self.epochs) else None

    @property
    def epoch_seconds(self) -> float | None:
        """Median of training and pruning over the epochs that no start-up was part of."""
        if self.summary is not None and self.summary.epoch_seconds is not None:
            return self.summary.epoch_seconds
        known = [training_seconds(line) for line in self.epochs if not line.startup_seconds]
        return statistics.median(known) if known else None

    @property
    def images_per_second(self) -> float | None:
        """Of training and pruning, but for the images that start-up took."""
        images = self.trained - sum(line.startup_images for line in self.epochs)
        return images / self.seconds if images and self.seconds else None

    @property
    def joules(self) -> float | None:
        """Of everything; None where it was not measured, or the run has not ended."""
        return self.summary.joules if self.summary else None

    @property
    def startup_seconds(self) -> float:
        """Of compiling, capturing and tuning."""
        return sum(line.startup_seconds for line in self.epochs)

    @property
    def total_seconds(self) -> float:
        """Wall time so far, of everything."""
        return sum(line.seconds or 0.0 for line in self.epochs)  # older records do not tell

    @property
    def device(self) -> str:
        """As far as figures depend on it."""
        return device_of(self.record.device)

    @property
    def form(self) -> str:
        """What else a run's speed depends on; fallbacks show here."""
        parts: dict[str | None, bool | None] = {}
        if (of := self.summary) is not None:
            parts = {of.loader: True, "compiled": of.compiled, "captured": of.captured}
            parts |= {"kernels": of.by_kernels}
        parts["host syncs watched"] = self.config.get("host_syncs", "off") != "off"
        return ", ".join(word for word, has in parts.items() if word and has)

    @property
    def state(self) -> str:
        """Complete or not, and what a reader must know of its figures."""
        far = f"INCOMPLETE: {len(self.epochs)} of {counted(self.config['epochs'], 'epoch')}"
        words = ["complete" if self.complete else far]
        if self.damaged:
            words.append("DAMAGED")
        if skipped := sum(line.skipped_steps for line in self.epochs):
            words.append(f"{counted(skipped, 'step')} SKIPPED")
        return "; ".join(words)


@dataclass(frozen=True)
class Section:
    """Runs of one setting: what they leave out, their length, device and seed may differ."""

    title: str
    setting: dict[str, Any]
    runs: Sequence[Run]

    def label(self, run: Run) -> str:
        """Of its training, with the epochs where others have more."""
        epochs = run.config["epochs"]
        fewer = epochs < max(run.config["epochs"] for run in self.runs)
        return run.pruning.label + f", {counted(epochs, 'epoch')}" * fewer

    @property
    def reported(self) -> bool:
        """Whether a run is of the reported experiments' setting."""
        of = {"model": "r50", "dataset": "cifar10", "data_fraction": 1.0}
        return (
            of.items() <= self.setting.items()
            and self.setting["data"] != "synthetic"
            and any(run.config["epochs"] == 200 for run in self.runs)
        )


def device_of(device: Mapping[str, Any]) -> str:
    """The name of a recorded device and, of a CPU, its threads."""
    threads = device.get("threads")
    return str(device.get("name")) + (f", {counted(threads, 'thread')}" if threads else "")


def training_seconds(line: EpochLine) -> float:
    """Of an epoch, pruning included."""
    return line.train_seconds + (line.pruning_seconds or 0.0)


def sections(runs: Iterable[Run]) -> list[Section]:
    """Runs by setting: the reported one first, then that of most complete runs."""
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(json.dumps(_setting(run), sort_keys=True), []).append(run)
    settings = [_setting(members[0]) for members in grouped.values()]
    names = dict.fromkeys(name for each in settings for name in each)
    # Older records lack some: that a value is not known tells nobody anything.
    known = [{n: repr(v) for n, v in each.items() if v is not None} for each in settings]
    varied = [n for n in names if len({each[n] for each in known if n in each}) > 1]
    found = [
        Section(_title(setting, varied, members), setting, members)
        for setting, members in zip(settings, grouped.values(), strict=True)
    ]
    return sorted(found, key=lambda of: (not of.reported, -sum(run.complete for run in of.runs)))


def _setting(run: Run) -> dict[str, Any]:
    """What runs must have in common for their figures to be compared."""
    config, dataset = run.config, run.config["dataset"]
    setting = {
        name: value
        for name, value in config.items()
        if name not in FREE and ONLY_OF.get(name, dataset) == dataset
    }
    data = {"genuine": "published"}.get(run.record.data, run.record.data)  # its older name
    setting["data_fraction"] = config.get("data_fraction", 1.0)
    if not config.get("label_noise"):  # which wrong ones follows the seed
        setting["data_hash"] = run.record.data_hash
    processes = run.record.device.get("processes", 1)  # each normalises a batch of its own
    return setting | {"data": data, "source": run.record.source_hash[:8], "processes": processes}


def _title(setting: dict[str, Any], varied: Sequence[str], runs: Sequence[Run]) -> str:
    longest = max(run.config["epochs"] for run in runs)
    data = str(setting["dataset"])
    if setting["data"] == "synthetic":
        data = "SYNTHETIC data"
    elif setting["data"] == "files" and data.startswith("cifar"):
        data += " (of files not known to be the published ones)"
    if setting["data_fraction"] != 1:
        data = f"{100 * setting['data_fraction']:g}% of {data}"
    if setting.get("validation"):
        data += f", judged by {setting['validation']:,} held-out training images"
    told = {"model", "dataset", "data", "data_fraction", "validation"}
    words = [f", {n} {setting[n]}" for n in varied if setting.get(n) is not None and n not in told]
    return f"{setting['model']} on {data}, {counted(longest, 'epoch')}" + "".join(words)
