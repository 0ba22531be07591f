"""The reported tables, trained anew with one command: `python bench/reproduce.py`.

- accuracy: full data, and InfoBatch with r = 0.3, 0.5 and 0.7.
- cost: the same runs; their time, overhead and device-hours.
- ablation: random and soft without rescaling and annealing, soft with one and with both, and hard,
  all at r = 0.5.
- policies: every policy, soft with the score bls, and soft with the ratio schedule pods, each
  leaving out a quarter of the samples of all epochs (half of what is possible, where a quarter is
  not), and full data.

Every table also has training shorter: full data for as many epochs as see the samples that
InfoBatch with r = 0.5 saw with the same seed (in policies: those that are not left out). A run that
two tables need is trained once.

Each run is one command of the trainer, in a folder whose name is made of its settings, so that
another call finds it: what is done is not trained again, what was interrupted is continued, and
what failed is tried again. `<out>/<run>.log` has what the trainer said, `<out>/results.jsonl` a
line a run, and `<out>/report` the tables beside the reported figures. All figures are from the
runs' records. Words after `--` go to the trainer, such as
`python bench/reproduce.py --table all -- --batch-size 128`.
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback
    # What is trained is the checkout that this file lies in, not an installed copy.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
import tyro
from reproduce_estimate import measured_pace, pace_of_runs
from reproduce_plan import TABLES, Setting, expected_config, make_plan, make_setting
from reproduce_records import finished
from reproduce_runs import Runs, plan_lines

from infobatch_fast.data.cifar import DataMissing, default_data_dir, load_cifar
from infobatch_fast.errors import UserError, unknown_name
from infobatch_fast.report import __main__ as report
from infobatch_fast.report.groups import counted
from infobatch_fast.train import folder as record
from infobatch_fast.train.cli import Interrupts, Say, command, complain, parse
from infobatch_fast.train.config import DATASETS, DEVICES, PRESETS
from infobatch_fast.train.loop import find_device

TRAIN = (sys.executable, "-m", "infobatch_fast.train")
OUT_OF_MEMORY = "pass a lower --batch-size to the trainer, after --"


def _one_of(*names: str) -> object:
    return tyro.conf.arg(metavar="{" + ",".join(names) + "}", help_behavior_hint="")


_FOLDER = tyro.conf.arg(metavar="PATH", help_behavior_hint="")


@dataclass(frozen=True)
class Options:
    """Train the runs of the reported tables, and report them; a second call goes on.

    Words after -- go to the trainer. Exit codes: 0 all is done; 1 a run failed, the others are
    done; 2 a mistake in the input, or no room; 130 or 143 stopped by a signal.

    Attributes:
        table: accuracy, cost, ablation, policies, or all of them.
        seeds: each run is trained with each.
        dataset: default cifar10; where preset quick finds none and no folder is named, a synthetic
            one stands in.
        scale: share of the epochs and of the data, in (0, 1], for a small machine: then these
            are not the reported experiments.
        preset: default paper where there is a CUDA device, quick where there is none.
        epochs: of each run, before scaling; default the preset's.
        data_dir: folder of CIFAR; default $INFOBATCH_DATA, else a user cache.
        device: auto is CUDA where there is one.
        out: folder of the runs, their results and their report.
        dry_run: show the plan and what it takes; write nothing.
    """

    table: Annotated[str, _one_of(*TABLES, "all")] = "all"
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (0,)
    dataset: Annotated[str | None, _one_of(*DATASETS)] = None
    scale: float = 1.0
    preset: Annotated[str | None, _one_of(*PRESETS)] = None
    epochs: Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="")] = None
    data_dir: Annotated[Path | None, _FOLDER] = None
    device: Annotated[str, _one_of(*DEVICES)] = "auto"
    out: Path = Path("runs/reproduce")
    dry_run: bool = False

    def __post_init__(self) -> None:
        for argument, value, known in (
            ("table", self.table, (*TABLES, "all")),
            ("dataset", self.dataset, DATASETS),
            ("preset", self.preset, PRESETS),
            ("device", self.device, DEVICES),
        ):
            if value is not None and value not in known:
                raise UserError(unknown_name(argument, value, known))
        if not self.seeds:
            raise UserError("seeds must hold at least one, got none")
        if len(set(self.seeds)) < len(self.seeds):
            raise UserError(f"seeds must differ, got {' '.join(map(str, self.seeds))}")
        if not all(0 <= seed < 2**63 for seed in self.seeds):
            raise UserError(f"seeds must be in [0, 2**63), got {' '.join(map(str, self.seeds))}")
        if not 0 < self.scale <= 1:
            raise UserError(f"scale must be in (0, 1], got {self.scale}")
        if self.epochs is not None and self.epochs < 1:
            raise UserError(f"epochs must be at least 1, got {self.epochs}")


class Unfinished(Exception):
    """Some runs failed."""


def run(
    arguments: Sequence[str],
    interrupts: Interrupts,
    say: Say,
    train: Sequence[str] = TRAIN,
) -> None:
    """Plan, train what is left, and report.

    Args:
        arguments: the words after the program's name.
        interrupts: passed on to the trainer.
        say: shows a line to the user.
        train: the trainer's command.

    Raises:
        Interrupted, Unfinished, UserError: as they say.
    """
    words = list(arguments)
    extra: list[str] = []
    if "--" in words:
        at = words.index("--")
        words, extra = words[:at], words[at + 1 :]
    options = parse(Options, words, "python bench/reproduce.py", Options())
    device = find_device(options.device)
    setting = _setting(options, device, extra, say)
    tables = TABLES if options.table == "all" else (options.table,)
    runs = Runs(setting, make_plan(setting, tables, options.seeds), options.out.expanduser())
    for planned in runs.plan:
        if planned.epochs is not None:
            expected_config(setting, planned)  # what the trainer would not take is known now
    runs.look()
    if options.scale < 1:
        say(
            f"scale      {options.scale:g} of the epochs and of the data: "
            "NOT the reported experiments"
        )
    if setting.dataset == "synthetic":
        say("data       SYNTHETIC: the accuracy says nothing of CIFAR-10")
    pace = None
    if runs.left():
        if setting.dataset != "synthetic" and not options.dry_run:
            _load(setting.dataset, options, download=True)  # what is missing is known now
        pace = pace_of_runs(
            finished(runs.out), setting.defaults.model, record.describe(device)
        ) or measured_pace(setting, interrupts)
    for line in plan_lines(runs, pace):
        say(line)
    if options.dry_run:
        for line in runs.commands():
            say(line)
        say("dry run    nothing was written")
        return
    record.make_folder(runs.out)
    with record.locked(runs.out):
        runs.train(train, interrupts, say)
    _report(runs, say)
    if runs.left():
        raise Unfinished(f"{counted(len(runs.left()), 'run')} of {len(runs.plan)} not done")


def _setting(options: Options, device: torch.device, extra: Sequence[str], say: Say) -> Setting:
    """What the options ask for, with the data set that there is."""
    preset = options.preset or ("paper" if device.type == "cuda" else "quick")
    dataset = options.dataset
    if dataset is None and preset == "quick":
        dataset = "cifar10"
        try:
            _load(dataset, options, download=not options.dry_run)
        except DataMissing as missing:
            if options.data_dir is not None:
                raise
            say(f"WARNING: {missing}")
            dataset = "synthetic"
    return make_setting(
        dataset, preset, device.type, options.epochs, options.scale, options.data_dir, extra
    )


def _load(dataset: str, options: Options, download: bool) -> None:
    """Raise UserError unless the data set is there, whole."""
    load_cifar(dataset, options.data_dir or default_data_dir(), download=download)


def _report(runs: Runs, say: Say) -> None:
    """The report of the runs that have a record, and what became of the others."""
    folders = [str(folder) for folder in runs.folders() if (folder / record.CONFIG).exists()]
    if folders:
        report.run([*folders, "--out", str(runs.out / "report")], say)
    for line in runs.left_lines():
        say(line)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        return command(lambda interrupts, say: run(words, interrupts, say), OUT_OF_MEMORY)
    except Unfinished as error:
        return complain(f"error: {error}", 1)


if __name__ == "__main__":
    sys.exit(main())
