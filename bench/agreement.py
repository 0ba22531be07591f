"""Whether fast and plain forms train alike on this device: `python bench/agreement.py`.

Four parts, each of figures that have a limit: the same pass from DALI and from torch
(`agreement_loader.py`); epochs drawn by the kernels and by torch (`agreement_choose.py`); the
training step eager, compiled and as a CUDA graph (`agreement_steps.py`); a run stopped and
continued (`agreement_resume.py`). What each row means: bench/results/README.md.
"""

import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback
    # What is compared is the checkout that this file lies in, not an installed copy.
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Annotated

import tyro
from agreement_choose import find_kernels, measure_choosing
from agreement_figures import Bench, tables
from agreement_loader import measure_loaders
from agreement_resume import measure_resume
from agreement_steps import Case, measure_steps
from harness import Lines

from infobatch_fast.data.cifar import (
    DataMissing,
    Dataset,
    default_data_dir,
    load_cifar,
    make_synthetic,
)
from infobatch_fast.errors import UserError, unknown_name
from infobatch_fast.train import folder as record
from infobatch_fast.train.cli import Say, command, parse
from infobatch_fast.train.loop import find_device

DEVICES = ("auto", "cuda", "cpu")
QUICK_SHARE = 0.1  # of the data set
# Of the step forms. ResNet-50 makes roundings so much larger that at 0.01 float32 losses of a batch
# of 32 lay 1.6e-3 apart after nine steps, on a CPU, by the memory format alone; at 0.001 at most
# 1.3e-4 in 26 steps, where training itself had moved them by 2.9e-3.
LR = {False: 0.2, True: 0.001}
SIZES = (1, 127, 50_000, 1_280_000)
OUT_OF_MEMORY = "take a GPU that no one else uses, or --device cpu"


@dataclass(frozen=True)
class Options:
    """Compare fast and plain forms on a device, and write agreement.jsonl.

    Minutes on a GPU and on two CPU cores. Exit codes: 0 every limit is kept; 1 one is not, or a
    form failed on a GPU; 2 a mistake in the input, or no room; 130 or 143 stopped by a signal, with
    what was compared kept.

    Attributes:
        device: auto is CUDA where there is one.
        data_dir: folder of CIFAR-10; default $INFOBATCH_DATA, else a user cache. Synthetic images
            stand in where it has none.
        quick: a minute on a CPU: a tenth of the images, 10 steps for 50, up to N = 50,000.
        out: folder for the results, new or empty; default runs/agreement-<time>.
        seed: of scores, plans, augmentation and weights.
    """

    device: Annotated[str, tyro.conf.arg(metavar="{" + ",".join(DEVICES) + "}")] = "auto"
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    quick: bool = False
    out: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise UserError(unknown_name("device", self.device, DEVICES))
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed must be in [0, 2**63), got {self.seed}")


@dataclass(frozen=True)
class Scope:
    """What is compared: the options and the device, in numbers.

    Attributes:
        model: network of the steps and the runs.
        batch_size: B.
        steps: of each form.
        lr: of these.
        resume_lr: peak of the runs that are resumed.
        sizes: N of the epochs.
    """

    model: str
    batch_size: int
    steps: int
    lr: float
    resume_lr: float
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, quick: bool, cuda: bool) -> "Scope":
        """That of a device."""
        return cls(
            model="r50" if cuda else "small",
            batch_size=200 if cuda else 64,
            steps=10 if quick else 50,
            lr=LR[cuda],
            resume_lr=0.2,
            sizes=SIZES[:-1] if quick else SIZES,
        )


def load_data(options: Options, say: Say) -> tuple[Dataset, str | None]:
    """Genuine CIFAR-10, else synthetic images, on the CPU; and what must be said of it.

    Raises:
        UserError: a file of it is broken.
    """
    try:
        data, caution = (
            load_cifar("cifar10", options.data_dir or default_data_dir(), download=False),
            None,
        )
    except DataMissing as missing:
        data = make_synthetic(seed=options.seed)
        caution = f"WARNING: SYNTHETIC images: {missing}"
        say(caution)
    return (data.part(QUICK_SHARE) if options.quick else data), caution


def run(arguments: Sequence[str], say: Say) -> bool:
    """Compare what the command line asks for, and show it; returns whether all is well.

    Raises:
        Interrupted, UserError: as they say.
    """
    options = parse(Options, arguments, "python bench/agreement.py", Options())
    device = find_device(options.device)
    scope = Scope.of(options.quick, device.type == "cuda")
    data, caution = load_data(options, say)
    folder = options.out or Path("runs") / f"agreement-{datetime.now():%Y%m%d-%H%M%S}"
    folder = folder.expanduser()
    record.make_folder(folder)
    record.check_empty(folder)
    asked = {"quick": options.quick, "seed": options.seed, **asdict(scope)}
    asked |= {"data": data.name, "source": data.source, "images": len(data.labels)}
    lines = Lines(folder / "agreement.jsonl", "agreement", device, asked, quick=options.quick)
    name = f"{record.describe(device)['name']} ({device.type})"
    say(f"{'device':10} {name}: all figures are of it")
    say(f"{'data':10} {data.name} ({data.source}), {len(data.labels):,} images")
    bench = Bench(device, lines, say, options.quick, options.seed)
    with lines.kept_if_stopped():
        _measure(bench, data, scope)
    lines.finish()
    for line in tables(lines.lines):
        say(line)
    wrong = [f"NOT KEPT: {row}" for row in bench.broken]
    wrong += [f"FAILED: {row}" for row in bench.failures]
    for line in ["", *([caution] if caution else []), *wrong]:
        say(line)
    kept = sum(line["more"].get("kept") is True for line in lines.lines)
    absent = sum(line["absent"] is not None for line in lines.lines)
    say(
        f"{kept} limits are kept, {len(bench.broken)} are not; {absent} rows are absent, of which "
        f"{len(bench.failures)} failed, on {name}"
    )
    say(f"They are in {lines.path}")
    return not wrong


def _measure(bench: Bench, data: Dataset, scope: Scope) -> None:
    # First of all: whoever asks first is told, once, why there are no kernels.
    kernels, why = find_kernels(bench.device)
    with bench.guard("loader", {"what": "all"}):
        measure_loaders(bench, data, scope.batch_size)
    with bench.guard("choose", {"what": "all"}):
        measure_choosing(bench, kernels, why, scope.sizes)
    with bench.guard("resume", {"what": "all"}):
        measure_resume(bench, data, scope.model, scope.batch_size, scope.resume_lr)
    with bench.guard("step", {"what": "all"}):
        here = data.to(bench.device)
        case = Case(scope.model, here, scope.batch_size, scope.steps, scope.lr)
        measure_steps(bench, case)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    verdict: list[bool] = []
    code = command(lambda _, say: verdict.append(run(words, say)), OUT_OF_MEMORY)
    return code or (0 if verdict == [True] else 1)


if __name__ == "__main__":
    sys.exit(main())
