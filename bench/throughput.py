"""Images a second of loaders and of training steps, side by side: `python bench/throughput.py`.

Loaders over batch sizes, after a pass in which each is shown to give what ours gives
(`loader_sides.py`, `loader_peers.py`); forms of training, alone and fed by our loader
(`training_forms.py`); and beside each figure its share of what the device can do, measured in the
same run, for work that is counted (`training_work.py`).
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback
    # What is measured is the checkout that this file lies in, not an installed copy.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Annotated, Any

import harness as measure
import throughput_report
import throughput_tables
import torch
import tyro
from loader_sides import MOST_WITHOUT_WORKERS
from throughput_rows import Run, measure_limits, run_loaders
from training_forms import FORMS
from training_rows import run_training

from infobatch_fast.data.cifar import (
    DataMissing,
    Dataset,
    default_data_dir,
    load_cifar,
    make_synthetic,
)
from infobatch_fast.errors import UserError, unknown_name
from infobatch_fast.train import cli as command
from infobatch_fast.train import folder as record
from infobatch_fast.train.cli import Say
from infobatch_fast.train.loop import find_device
from infobatch_fast.train.models import MODELS

DEVICES = ("auto", "cuda", "cpu")
CPU_MODELS = ("small", "r18")  # by default
CPU_FORMS = {"small": ("eager", "channels_last", "amp", "graph")}  # the last: why it is absent
OUT_OF_MEMORY = "lower --samples or --batch-sizes, or take smaller --models"


def _shown(metavar: str) -> Any:
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


@dataclass(frozen=True)
class Options:
    """Measure images/s of loaders and of training steps, side by side, on this machine.

    Without flags it takes less than five minutes on two CPU cores; on a GPU it runs every network
    in every form. Exit codes: 0 done; 2 a mistake in the input; 130 or 143 stopped by a signal,
    with the rows measured so far in throughput.jsonl.

    Attributes:
        quick: batch 200 and the small network alone, within a minute; the figures are too short to
            quote.
        device: auto is CUDA where there is one.
        out: folder of throughput.jsonl and throughput.png, new or empty; default runs/throughput-
            and the time.
        batch_sizes: of the loaders, default 128 200 512 1024; with no number, no loaders.
        models: networks, default small and r18, on a GPU r50 too; with no name, no training.
        forms: of training, each adding to the one before; default all on a GPU, on a CPU eager
            and for the small network channels_last and amp too; compiled and graph, which needs
            CUDA, include amp.
        samples: images of a loader's pass; default all on a GPU, 8192 on a CPU.
        workers: processes of the loaders that have any; default one a core.
        ratio: of the pruned epochs, in (0, 1).
        seed: of plans, augmentation and weights.
    """

    quick: bool = False
    device: Annotated[str, _shown("{auto,cuda,cpu}")] = "auto"
    out: Annotated[Path | None, _shown("PATH")] = None
    batch_sizes: Annotated[tuple[int, ...] | None, _shown("[INT ...]")] = None
    models: Annotated[tuple[str, ...] | None, _shown("[{" + ",".join(MODELS) + "} ...]")] = None
    forms: Annotated[tuple[str, ...] | None, _shown("{" + ",".join(FORMS) + "} ...")] = None
    samples: Annotated[int | None, _shown("INT")] = None
    workers: Annotated[int | None, _shown("INT")] = None
    ratio: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for argument, values, known in (
            ("device", (self.device,), DEVICES),
            ("models", self.models or (), MODELS),
            ("forms", self.forms or (), FORMS),
        ):
            for value in values:
                if value not in known:
                    raise UserError(unknown_name(argument, value, known))
        for argument, values, least in (
            ("batch_sizes", self.batch_sizes or (), 1),
            ("samples", (self.samples,), 1),
            ("workers", (self.workers,), 1),
            ("seed", (self.seed,), 0),
        ):
            for value in values:
                if value is not None and value < least:
                    raise UserError(f"{argument} must be at least {least}, got {value}")
        if self.seed >= 2**63:
            raise UserError(f"seed must be below 2**63, got {self.seed}")
        if not 0 < self.ratio < 1:
            raise UserError(f"ratio must be in (0, 1), got {self.ratio}")
        for argument in ("batch_sizes", "models", "forms"):
            values = getattr(self, argument) or ()
            if len(set(values)) < len(values):
                words = " ".join(str(value) for value in values)
                raise UserError(f"{argument} must differ from each other, got {words}")
        if self.models == () == self.batch_sizes:
            raise UserError("models must be at least one where batch_sizes are none, got none")
        if self.forms == ():
            raise UserError(f"forms must be one of {', '.join(FORMS)}, got none")


@dataclass(frozen=True)
class Scope:
    """What is measured: the options with their defaults.

    Attributes:
        batch_sizes: of the loaders.
        samples: of a loader's pass.
        workers: processes of the loaders that have any.
        forms: of each network.
    """

    batch_sizes: tuple[int, ...]
    samples: int
    workers: int
    forms: dict[str, tuple[str, ...]]


def settle(options: Options, num_samples: int, *, cuda: bool) -> Scope:
    """What to measure of a data set of N samples, where the options leave it open.

    Raises:
        UserError: a number is more than there are samples.
    """
    sizes, samples, models = options.batch_sizes, options.samples, options.models
    if samples is None:
        most = 4096 if options.quick else num_samples if cuda else 8192
        samples = min(most, num_samples)
    if sizes is None:
        sizes = (200,) if options.quick else (128, 200, 512, 1024)
    if models is None:
        models = ("small",) if options.quick else ("small", "r18", "r50") if cuda else CPU_MODELS
    if samples > num_samples:
        raise UserError(f"samples must be at most {num_samples}, got {samples}")
    for size in sizes:
        if size > samples:
            raise UserError(f"batch_sizes must be at most samples = {samples}, got {size}")
    return Scope(sizes, samples, options.workers or _cores(), {
        model: options.forms or (tuple(FORMS) if cuda else CPU_FORMS.get(model, ("eager",)))
        for model in models
    })  # fmt: skip


def train_batch_size(model: str, *, cuda: bool) -> int:
    """That of the reported runs, or one that a CPU gets through."""
    return 200 if cuda or model == "small" else 16


def _cores() -> int:
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def load_data(seed: int, say: Say) -> Dataset:
    """Genuine CIFAR-10 where it lies on this machine, else synthetic images, on the CPU.

    Raises:
        UserError: a file of it is broken.
    """
    try:
        return load_cifar("cifar10", default_data_dir(), download=False)
    except DataMissing:
        if not os.environ.get("INFOBATCH_DATA"):
            say("data       no CIFAR-10 here (INFOBATCH_DATA names its folder): synthetic images")
        return make_synthetic(seed=seed)


def run(arguments: Sequence[str], say: Say) -> None:
    """The command line.

    Raises:
        Interrupted: by a signal.
        UserError: a flag is wrong, or the folder cannot be written.
    """
    options = command.parse(Options, arguments, "python bench/throughput.py", Options())
    load = os.getloadavg()[0]  # of others: our own work begins below
    device = find_device(options.device)
    cuda = device.type == "cuda"
    data = load_data(options.seed, say)
    scope = settle(options, len(data.labels), cuda=cuda)

    folder = options.out or Path("runs") / f"throughput-{datetime.now():%Y%m%d-%H%M%S}"
    folder = folder.expanduser()
    record.make_folder(folder)
    record.check_empty(folder)
    recorded = {"ratio": options.ratio, "seed": options.seed, **asdict(scope)}
    recorded |= {"data": data.name, "source": data.source}
    recorded |= {"load_average": load, "cores": os.cpu_count() or 1}
    path = folder / "throughput.jsonl"
    lines = measure.Lines(path, "throughput", device, recorded, quick=options.quick)

    where = f"{record.describe(device)['name']} ({device.type})"
    say(f"device     {where}, torch threads: {torch.get_num_threads()}, cores: {_cores()}")
    say(
        f"data       {data.name} ({data.source}): {len(data.labels):,} images; a loader's pass: "
        f"{scope.samples:,} of them, {MOST_WITHOUT_WORKERS:,} at most without workers"
    )
    cautions = measure.cautions(recorded, options.quick)
    if data.source != "genuine" and os.environ.get("INFOBATCH_DATA"):
        cautions.append("SYNTHETIC images, as there is no CIFAR-10 in $INFOBATCH_DATA")
    warnings = [f"WARNING: {caution}" for caution in cautions]
    for warning in warnings:
        say(warning)
    plot = folder / "throughput.png"
    with lines.kept_if_stopped(lambda: throughput_report.draw(lines.lines, plot)):
        _measure(Run(data, device, lines, say, options.quick, options.seed), scope, options.ratio)
        lines.finish()
        drawn = throughput_report.draw(lines.lines, plot)
        for line in throughput_tables.summary(lines.lines):
            say(line)
    for line in [*warnings, f"These are figures of {where}"]:
        say(line)
    say(f"written    {folder}: throughput.jsonl" + (", throughput.png" if drawn else ""))


def _measure(run: Run, scope: Scope, ratio: float) -> None:
    cuda = run.device.type == "cuda"
    torch.backends.cudnn.benchmark = True  # as the trainer has it
    used = [FORMS[form].dtype for names in scope.forms.values() for form in names]
    limits = measure_limits(run, list(dict.fromkeys([torch.float32, *used])))
    run_loaders(run, limits, scope.batch_sizes, scope.samples, scope.workers)
    batch_sizes = {model: train_batch_size(model, cuda=cuda) for model in scope.forms}
    run_training(run, limits, scope.forms, ratio, batch_sizes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    return command.command(lambda _, say: run(words, say), OUT_OF_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
