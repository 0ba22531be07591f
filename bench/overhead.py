"""What pruning adds to training, alone and in whole steps: `python bench/overhead.py`.

The sides, all on the same scores and each checked once to do what InfoBatch does with them:

- device: ours. `choose` gives the epoch's order and weights as tensors on the device, for a loader
  there; it holds the epoch's one host sync. `update` is the rescaled mean, forward and backward,
  and the record of the scores, as in the training step.
- numpy: the same on the host. `choose` gives the order as an array, for a sampler on the host;
  making a list of it, or a copy on the device, would come on top. `update` copies the losses to the
  host and the weights to the device.
- none: no pruning. `choose` shuffles all N on the device; `update` is the plain mean, forward and
  backward. What pruning adds is the difference to this side.
- original: the package `infobatch`, if installed. `choose` gives the Python list its sampler needs.

Clocks: "wall" is until the work is done on host and device. On a GPU there is also "device": what
the device takes behind a backlog, the waits of a call that waits for the host included. What such a
wait costs the steps around it is in neither. Before each call a buffer larger than the caches is
written, as the rest of a step or epoch would: with warm caches an update took a sixth of the time
on a CPU, and the whole steps contradicted it.

Dimensions: N samples, K kept in an epoch, B batch.
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
from typing import Annotated

import harness as measure
import torch
import tyro
from harness import Lines
from overhead_parts import Bench, measure_alone, measure_epoch, measure_steps, measure_telemetry
from overhead_report import draw, tables
from overhead_sides import Setting, Steps, lack_of_memory, least_size, sure_to_keep
from tqdm import tqdm

from infobatch_fast.errors import UserError, unknown_name
from infobatch_fast.train import folder as record
from infobatch_fast.train.cli import Say, command, is_out_of_memory, parse
from infobatch_fast.train.loop import find_device
from infobatch_fast.train.models import MODELS

DEVICES = ("auto", "cuda", "cpu")
OUT_OF_MEMORY = "lower --batch-size or --sizes, or take a smaller --model"


@dataclass(frozen=True)
class Options:
    """Measure what pruning adds to training, and write overhead.jsonl and overhead.png.

    Exit codes: 0 done; 2 a mistake in the input, or no room; 130 or 143 stopped by a signal, with
    what was measured kept.

    Attributes:
        sizes: data set sizes N; default 50000 1000000 1280000 10000000, and 100000000 on CUDA.
        quick: half a minute: fewer sizes and rounds, figures too short to quote.
        device: auto is CUDA where there is one.
        out: folder for the results, new or empty; default runs/overhead-<time>.
        batch_size: samples a step.
        model: of the whole steps; default small on a CPU, r50 on CUDA.
        ratio: share of the well-learned samples that an epoch leaves out, in (0, 1).
        seed: of the scores, the plans and the model.
    """

    sizes: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...", help_behavior_hint="")] = ()
    quick: bool = False
    device: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(DEVICES) + "}")] = "auto"
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    batch_size: int = 200
    model: Annotated[
        str | None, tyro.conf.arg(metavar="{" + ",".join(MODELS) + "}", help_behavior_hint="")
    ] = None
    ratio: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (("device", self.device, DEVICES), ("model", self.model, MODELS)):
            if value is not None and value not in known:
                raise UserError(unknown_name(name, value, known))
        if not 0 < self.ratio < 1:
            raise UserError(f"ratio must be in (0, 1), got {self.ratio}")
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {self.batch_size}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be in [0, 2**63), got {self.seed}")
        if self.sizes and min(self.sizes) < 1:
            raise UserError(f"sizes must be at least 1, got {min(self.sizes)}")
        most = sure_to_keep(50_000, self.ratio)
        if not self.sizes and self.batch_size > most:
            raise UserError(
                f"batch_size must be at most {most}, the samples that an epoch of the smallest "
                f"size is sure to keep, got {self.batch_size}"
            )
        least = least_size(self.batch_size, self.ratio)
        if self.sizes and min(self.sizes) < least:
            raise UserError(
                f"sizes must be at least {least} with batch_size {self.batch_size} and ratio "
                f"{self.ratio}, for a whole batch in every epoch, got {min(self.sizes)}"
            )

    def settle(self, cuda: bool) -> Setting:
        """What they ask for on a device."""
        sizes = (50_000, 1_000_000)
        if not self.quick:
            sizes += (1_280_000, 10_000_000) + ((100_000_000,) if cuda else ())
        return Setting(
            sizes=tuple(sorted(set(self.sizes or sizes))),
            quick=self.quick,
            batch_size=self.batch_size,
            model=self.model or ("r50" if cuda else "small"),
            ratio=self.ratio,
            seed=self.seed,
        )


def run(arguments: Sequence[str], say: Say) -> None:
    """Measure what the command line asks for, and show it.

    Raises:
        Interrupted, UserError: as they say.
    """
    options = parse(Options, arguments, "python bench/overhead.py", Options())
    load = os.getloadavg()[0]  # of others: our own work begins below
    device = find_device(options.device)
    setting = options.settle(device.type == "cuda")
    for side in ("device", "none"):
        lack = lack_of_memory(side, setting.training_size, device)
        if lack is not None:
            raise UserError(f"sizes must hold one that fits, got {setting.training_size}: {lack}")
    folder = options.out or Path("runs") / f"overhead-{datetime.now():%Y%m%d-%H%M%S}"
    folder = folder.expanduser()
    record.make_folder(folder)
    record.check_empty(folder)
    asked = {**asdict(options), **asdict(setting)}
    asked |= {"load_average": load, "cores": os.cpu_count() or 1}
    del asked["out"]
    lines = Lines(folder / "overhead.jsonl", "overhead", device, asked, quick=options.quick)
    name = _device_name(device)
    say(f"{'device':10} {name}: all figures are of it")
    warnings = [f"WARNING: {caution}" for caution in measure.cautions(asked, options.quick)]
    for warning in warnings:
        say(warning)
    plot = folder / "overhead.png"
    bare = {"disable": not sys.stdout.isatty(), "file": sys.stdout, "leave": False}
    with lines.kept_if_stopped(lambda: draw(lines.lines, name, plot)):
        with tqdm(**bare, bar_format="{l_bar}{bar}| {elapsed}") as bar:
            bench = Bench(setting, device, lines, say, bar)
            measure_alone(bench)
            _measure_whole(bench)
        lines.finish()
        for line in tables(lines.lines):
            say(line)
        drawn = draw(lines.lines, name, plot)
    for line in ["", *warnings, f"All figures but the reported ones are of {name}."]:
        say(line)
    say(f"They are in {lines.path}" + (f" and {plot}" if drawn else ""))


def _measure_whole(bench: Bench) -> None:
    """The parts with whole steps; memory that they do not find makes them absent."""
    try:
        steps = Steps(bench.setting, bench.device)
        measure_steps(bench, steps)
        measure_epoch(bench, steps.kept)
        measure_telemetry(bench, steps)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        done = {line["part"] for line in bench.lines.lines}
        case = {"samples": bench.setting.training_size, "batch_size": bench.setting.batch_size}
        for part in ("step", "epoch", "telemetry"):
            if part not in done:
                bench.lines.add_absent(part, case, f"out of memory: {OUT_OF_MEMORY}")


def _device_name(device: torch.device) -> str:
    about = record.describe(device)
    if device.type == "cuda":
        return f"{about['name']} (CUDA {about['cuda']}, driver {about['driver']})"
    return f"{about['name']} (CPU, {about['threads']} thread{'s'[: about['threads'] > 1]})"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    return command(lambda interrupts, say: run(words, say), OUT_OF_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
