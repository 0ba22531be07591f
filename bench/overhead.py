"""What pruning adds to training: `python bench/overhead.py`.

First the headline: a step in the form that is trained with (on CUDA compiled and captured as a
graph, on a CPU eager) with InfoBatch and without, interleaved, tens of steps a call on a GPU. Then
its parts alone: choosing an epoch, and an update with a batch, beside the original package's way
in numpy and beside no pruning (`sides/pruning.py`); what they make of an epoch; and telemetry.

Clocks: "wall" is until the work is done on host and device. On a GPU there is also "device": what
the device takes behind a backlog. Before each call more than the caches hold is read, as the rest
of a step or epoch would: with warm caches an update took a sixth of the time on a CPU, and the
whole steps contradicted it.

Dimensions: N samples, K kept in an epoch, B batch.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Self

import torch
from harness import Bench, Options, Side, Timer, main, on_device, said, shown, wall
from sides import pruning
from sides.pruning import RATIO
from sides.steps import FORMS, Form, Model, WithAndWithout
from torch.utils.data import DataLoader, TensorDataset

from infobatch_fast import InfoBatch
from infobatch_fast.errors import UserError
from infobatch_fast.telemetry.nvml import Nvml
from infobatch_fast.telemetry.phases import Phases
from infobatch_fast.train.cli import say

TITLES = {
    "step": "A training step with InfoBatch and without; their difference, with its 95% interval",
    "epoch": "Choosing and updates of a pruned epoch (% of that epoch's steps, of a full epoch's); "
    "reported of one A100: 1.03 s (2.3%, 1.5%)",
    "choose": "Choosing an epoch: threshold, choice and shuffle of N samples",
    "update": "Update with a batch: rescaled mean, backward, record",
    "loader": "A batch from infobatch.loader, with its update, beside a plain shuffled DataLoader",
    "telemetry": "Telemetry: phases and NVML's sampler on and off, a step; claimed is below 1%",
}


@dataclass(frozen=True)
class Overhead(Options):
    """Measure what pruning adds to training: overhead.jsonl and overhead.png.

    Exit codes: 0 done; 2 a mistake in the input; 130 or 143 stopped by a signal, with what was
    measured kept.

    Attributes:
        sizes: data set sizes N; default 50000 1280000 10000000.
        batch_size: samples a step.
        model: of the whole steps; default small on a CPU, r50 on CUDA.
    """

    sizes: Annotated[tuple[int, ...], shown("N ...")] = ()
    batch_size: int = 200
    model: Annotated[Model | None, shown("{small,r18,r34,r50,r101}")] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {self.batch_size}")
        smallest, least = min(self.sizes or (50_000,)), math.ceil(self.batch_size / (1 - RATIO))
        if smallest < least:  # a whole batch in every epoch
            raise UserError(
                f"sizes must be at least {least} at batch_size {self.batch_size}, got {smallest}"
            )

    def settle(self, cuda: bool) -> Self:
        """With sizes and model."""
        sizes = (50_000,) if self.quick else (50_000, 1_280_000, 10_000_000)
        model = self.model or ("r50" if cuda else "small")
        return replace(self, sizes=tuple(sorted(set(self.sizes or sizes))), model=model)


def measure(bench: Bench, options: Overhead) -> None:
    """All parts, the headline first."""
    samples = 50_000 if 50_000 in options.sizes else options.sizes[0]
    cuda = bench.device.type == "cuda"
    forms = {"eager": FORMS["amp" if cuda else "channels_last"]}  # as the presets train
    forms = {"captured": FORMS["graph"], **forms} if cuda else forms
    trained = {name: measure_step(bench, options, samples, name, forms[name]) for name in forms}
    for n in options.sizes:
        measure_alone(bench, options, n)
    for name, pair in trained.items():
        if pair is not None:
            measure_epoch(bench, options, samples, name, pair.kept)
    measure_loader(bench, options)
    if (pair := next(iter(trained.values()))) is not None:
        measure_telemetry(bench, pair, next(iter(trained)))


def measure_step(
    bench: Bench, options: Overhead, samples: int, name: str, form: Form
) -> WithAndWithout | None:
    """Steps with and without InfoBatch in one form."""
    cuda = bench.device.type == "cuda"
    optimizer = "lars" if cuda else "sgd"
    case = {"form": name, "model": options.model, "batch_size": options.batch_size}
    case |= {"precision": str(form.dtype).removeprefix("torch."), "optimizer": optimizer}
    infobatch = InfoBatch(samples, 1, RATIO, 1.0, options.seed, bench.device)
    infobatch.scores.copy_(torch.from_numpy(pruning.draw_scores(samples, options.seed)))
    model, size = options.model or "", options.batch_size
    try:
        pair = WithAndWithout(model, optimizer, form, infobatch, size, options.seed)
    except Exception as error:  # no compiler, no capture, no memory: its row says what
        bench.add_absent("step", case, why := said(error))
        say(f"{'step':10} {name}: {why}")
        return None
    count = (50 if form.graph else 20) if cuda else 1  # the host runs ahead of a GPU
    sides = {side: partial(pair.side, side, count) for side in ("with", "without")}
    bench.compare_pair("step", case, sides, seconds=(40.0, 1.5), rounds=10)
    return pair


def measure_alone(bench: Bench, options: Overhead, samples: int) -> None:
    """Choosing and updates by each way to prune, shown to do the same work."""
    scores = pruning.draw_scores(samples, options.seed)
    random = torch.Generator(bench.device).manual_seed(options.seed)
    losses = torch.empty(options.batch_size, device=bench.device).log_normal_(generator=random)
    clocks: dict[str, Timer] = {"wall": wall}
    if bench.device.type == "cuda":
        clocks["device"] = on_device

    def checked(name: str) -> pruning.Pruner:
        new = partial(pruning.make_pruner, name, scores, RATIO, options.seed, bench.device)
        pruning.check(new(), scores, RATIO if name != "none" else 0.0, losses)
        return new()

    def choose(name: str) -> Side:
        return pruning.choose_side(checked(name), name, bench.device)

    def update(name: str) -> Side:
        return pruning.update_side(checked(name), losses)

    for clock, timer in clocks.items():
        for part, make, most in (("choose", choose, 6.0), ("update", update, 3.0)):
            case = {"samples": samples, "clock": clock}
            sides = {name: partial(make, name) for name in pruning.SIDES}
            bench.compare(part, case, sides, seconds=(most, 0.3), clock=timer, cold=True)


def measure_epoch(bench: Bench, options: Overhead, samples: int, form: str, kept: int) -> None:
    """What was measured alone, as a share of an epoch's steps without InfoBatch."""
    step = bench.find("step", form=form, side="without")
    clock = "device" if bench.device.type == "cuda" else "wall"
    pruned, full = (math.ceil(n / options.batch_size) for n in (kept, samples))
    for side in pruning.SIDES:
        case = {"form": form, "samples": samples, "batch_size": options.batch_size, "side": side}
        choose = bench.find("choose", samples=samples, side=side, clock="wall")
        update = bench.find("update", samples=samples, side=side, clock=clock)
        if not (step and choose and update):
            bench.add_absent("epoch", case, "its choose, its update or the step is absent")
            continue
        plain, *parts = (line.median or 0.0 for line in (step, choose, update))
        took = parts[0] + pruned * parts[1]
        more = {"pruned_epoch_steps": pruned, "full_epoch_steps": full}
        more |= {
            "pruned_epoch_percent": 100 * took / (pruned * plain),
            "full_epoch_percent": 100 * took / (full * plain),
        }
        bench.add("epoch", case, "s", {"median": took, "count": update.count}, more)


def measure_loader(bench: Bench, options: Overhead) -> None:
    """Whole passes over a data set in memory, by torch's DataLoader with and without InfoBatch.

    Fetching is as cheap as it gets, so that what InfoBatch adds to a batch is seen; losses are
    taken as they are, and nothing is differentiated.
    """
    b = options.batch_size
    samples = b * (10 if bench.quick else 50)
    images = torch.zeros(samples, 3, 32, 32, dtype=torch.uint8)
    dataset = TensorDataset(images, torch.zeros(samples, dtype=torch.int64))
    losses = torch.ones(b, device=bench.device)
    infobatch = InfoBatch(samples, 10**6, delta=0.0, seed=options.seed, device=bench.device)
    for workers in (0, 2):
        how: Any = {"num_workers": workers, "persistent_workers": workers > 0}
        ours = infobatch.loader(dataset, b, **how)
        plain = DataLoader(dataset, b, shuffle=True, **how)

        def with_infobatch(loader: DataLoader = ours) -> None:
            for _, batch in loader:
                infobatch.update(losses, batch)

        def without(loader: DataLoader = plain) -> None:
            for _ in loader:
                losses.mean()

        sides = {
            "with": partial(Side, with_infobatch, repetitions=samples // b),
            "without": partial(Side, without, repetitions=samples // b),
        }
        case = {"workers": workers, "batch_size": b}
        bench.compare_pair("loader", case, sides, seconds=(10.0, 0.5), rounds=10)


def measure_telemetry(bench: Bench, pair: WithAndWithout, form: str) -> None:
    """Steps with the phases and NVML's sampler on, and with both off.

    On a GPU a call is long enough for several samples of the card; on a CPU, which has no sampler,
    short, as its pace changes within seconds. The histogram of scores, one an epoch, is not in it.
    """
    line = bench.find("step", form=form, side="with")
    if line is None:
        return
    cuda = bench.device.type == "cuda"
    count = min(500, math.ceil(0.3 / (line.median or 1))) if cuda else 2

    def sampled(call: Callable[[], object], device: torch.device) -> float:
        with Nvml(device):  # it starts before the clock and ends after it
            return wall(call, device)

    sides = {
        "on": lambda: replace(
            pair.side("with", count, Phases(bench.device, enabled=True)), clock=sampled
        ),
        "off": lambda: pair.side("with", count),
    }
    case = {"form": form, "group_steps": count}
    bench.compare_pair("telemetry", case, sides, seconds=(30.0, 1.0), rounds=6)


run = partial(main, Overhead, "overhead", measure, TITLES)


if __name__ == "__main__":
    sys.exit(run())
