"""How fast the kernels are, beside torch's own operations: `python bench/kernels_bench.py`.

On CUDA each kernel at each size, against the operations of torch that stand in for it and against
torch.compile of them (`kernels_cases.py`), after each side was shown to do what it must
(`kernels_checks.py`): seconds, GB/s, and percent of the rate of a copy in the same run. GB/s of all
sides are of the bytes that ours moves, so that they compare as seconds do. How it is timed, and how
the caches are kept out of it: `kernels_timing.py`.

On a CPU, where nothing stands for a GPU's time, what can be told there: launches and operations of
each kernel and of whole training steps (`kernels_counts.py`), and an epoch's choosing beside
numpy's (`kernels_host.py`).
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
from functools import cache
from typing import Annotated

import harness as measure
import torch
import tyro
from harness import Lines
from kernels_cases import launch_case, make_cases
from kernels_host import measure_choosing, record_counts
from kernels_report import draw, tables
from kernels_step import resnet50_params
from kernels_timing import Bench, measure_case, proven
from tqdm import tqdm

from infobatch_fast.errors import UserError, unknown_name
from infobatch_fast.report.text import figures
from infobatch_fast.train import folder as record
from infobatch_fast.train.cli import Say, command, parse
from infobatch_fast.train.loop import find_device

DEVICES = ("auto", "cuda", "cpu")
LEAST, MOST = 1000, 2**31  # N: fewer samples are no shuffle that can be told from others
GPU_SIZES = (50_000, 1_000_000, 1_280_000, 10_000_000, 100_000_000, 1_000_000_000)
CPU_SIZES = (1_000_000, 10_000_000, 100_000_000)
BATCHES = tuple((batch, classes) for batch in (200, 1024) for classes in (10, 100, 1000))
OUT_OF_MEMORY = "lower --sizes"


@dataclass(frozen=True)
class Options:
    """Time the kernels against torch's operations on a GPU; count what they launch on a CPU.

    Without flags it takes up to three minutes on two CPU cores. Exit codes: 0 done; 2 a mistake in
    the input, or no room; 130 or 143 stopped by a signal, with what was measured kept.

    Attributes:
        sizes: data set sizes N; default 50000 1000000 1280000 10000000 100000000 1000000000 on
            CUDA, and 1000000 10000000 100000000 on a CPU, as far as memory and time allow.
        quick: half a minute on a CPU: fewer sizes and rounds, figures too short to quote.
        device: auto is CUDA where there is one.
        out: folder for the results, new or empty; default runs/kernels-<time>.
        seed: of scores, batches, parameters and models.
    """

    sizes: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...", help_behavior_hint="")] = ()
    quick: bool = False
    device: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(DEVICES) + "}")] = "auto"
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise UserError(unknown_name("device", self.device, DEVICES))
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be in [0, 2**63), got {self.seed}")
        for size in self.sizes:
            if not LEAST <= size <= MOST:
                raise UserError(f"sizes must be in [{LEAST}, 2**31], got {size}")

    def settle(self, cuda: bool) -> tuple[int, ...]:
        """The sizes on a device, ascending."""
        default = GPU_SIZES if cuda else CPU_SIZES
        if self.quick:
            default = default[: 2 if cuda else 1]
        return tuple(sorted(set(self.sizes or default)))


def run(arguments: Sequence[str], say: Say) -> None:
    """Measure what the command line asks for, and show it.

    Raises:
        Interrupted, UserError: as they say.
    """
    options = parse(Options, arguments, "python bench/kernels_bench.py", Options())
    load = os.getloadavg()[0]  # of others: our own work begins below
    device = find_device(options.device)
    sizes = options.settle(device.type == "cuda")
    folder = options.out or Path("runs") / f"kernels-{datetime.now():%Y%m%d-%H%M%S}"
    folder = folder.expanduser()
    record.make_folder(folder)
    record.check_empty(folder)
    asked = {**asdict(options), "sizes": sizes, "load_average": load, "cores": os.cpu_count() or 1}
    del asked["out"]
    lines = Lines(folder / "kernels_bench.jsonl", "kernels", device, asked, quick=options.quick)
    name = f"{record.describe(device)['name']} ({device.type})"
    say(f"{'device':10} {name}: all figures are of it")
    warnings = [f"WARNING: {caution}" for caution in measure.cautions(asked, options.quick)]
    for warning in warnings:
        say(warning)
    plot = folder / "kernels_bench.png"
    bare = {"disable": not sys.stdout.isatty(), "file": sys.stdout, "leave": False}
    with lines.kept_if_stopped(lambda: draw(lines.lines, name, plot)):
        with tqdm(**bare, bar_format="{l_bar}{bar}| {elapsed}") as bar:
            bench = Bench(device, lines, say, bar, options.quick, options.seed)
            if device.type == "cuda":
                measure_kernels(bench, sizes)
            else:
                record_counts(bench)
                measure_choosing(bench, sizes, asked=bool(options.sizes))
        lines.finish()
        for line in tables(lines.lines):
            say(line)
        drawn = draw(lines.lines, name, plot)
    for line in ["", *warnings, f"All figures are of {name}."]:
        say(line)
    say(f"They are in {lines.path}" + (f" and {plot}" if drawn else ""))


def measure_kernels(bench: Bench, sizes: Sequence[int]) -> None:
    """Rows of the parts "limits" and "kernels".

    Args:
        bench: whose rows they are.
        sizes: N.
    """
    most = measure.limits(bench.device, torch.bfloat16, 0.3 if bench.quick else 1.0)
    copy = most["copy_bytes_per_second"]
    more = {"statistic": "best of the repetitions"}
    bench.lines.add("limits", {"limit": "copy"}, "B/s", measure.spread([copy]), more)
    bench.say(f"{'limit':10} copy: {figures(copy / 1e9)} GB/s, read and written")
    params = cache(lambda: resnet50_params(bench.device, bench.seed))
    kernels = proven(bench.device)
    cases = make_cases(sizes, BATCHES, params, kernels, bench.device, bench.seed)
    for case in (launch_case(bench.device), *cases):
        measure_case(bench, case, copy)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    return command(lambda interrupts, say: run(words, say), OUT_OF_MEMORY)


if __name__ == "__main__":
    sys.exit(main())
