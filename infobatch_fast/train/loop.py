"""The training loop: draw an epoch, train on it, evaluate, record, save."""

import os
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from infobatch_fast.data.dataset import Dataset
from infobatch_fast.data.loader import Batches, Epoch, Loader, make_loader
from infobatch_fast.errors import UserError
from infobatch_fast.infobatch import InfoBatch
from infobatch_fast.plan import Batch, Plan
from infobatch_fast.telemetry.nvml import Nvml
from infobatch_fast.telemetry.phases import Phases, score_histogram
from infobatch_fast.train import console
from infobatch_fast.train import folder as record
from infobatch_fast.train.cli import say
from infobatch_fast.train.config import Config
from infobatch_fast.train.distributed import Ranks
from infobatch_fast.train.graph import GraphStep, obstacle
from infobatch_fast.train.ledger import Ledger
from infobatch_fast.train.logs import make_log
from infobatch_fast.train.models import make_model
from infobatch_fast.train.optim import make_optimizer
from infobatch_fast.train.own import failed
from infobatch_fast.train.schedule import mixup_share, one_cycle
from infobatch_fast.train.step import AUTOCAST, TrainStep

# Fixed: a size that followed free memory would be tuned anew from run to run.
TEST_BATCH, FILES_BATCH = 1000, 256  # tested at once, of 32 x 32 and of larger ones


def train(
    settings: Config,
    data: Dataset,
    folder: Path,
    saved: dict[str, Any] | None,
    ranks: Ranks,
) -> None:
    """Train from `saved` on, keep the run's folder up to date, and tell the results.

    Raises:
        Diverged: too many steps were not finite.
        Interrupted: by a signal, with a checkpoint written.
        UserError: the checkpoint does not fit, or the disk is full.
    """
    step, advance, loader = _made(settings, data, ranks)
    infobatch, phases, device = step.infobatch, step.phases, data.images.device
    assert infobatch is not None
    ledger = Ledger(settings, step, folder, Nvml(device, enabled=settings.telemetry))
    tests = for_testing(data, settings.loader, ranks)
    log = make_log(settings, folder if ranks.first else None)
    samples, epochs, batch_size = data.labels.numel(), settings.epochs, loader.batch_size
    whole = batch_size if settings.whole_batches else None
    plan, start, warned = None, 0, False
    if saved is not None:
        plan, start = ledger.restore(saved)
        if saved.get("kernels") != step.by_kernels:
            say("WARNING: Triton kernels draw other epochs than torch: the rest will differ")
        say(f"resume     from step {start} of epoch {ledger.epoch + 1}")
    # Batch sizes that come again and again. The first steps of each, and captures, are start-up.
    lasting = batch_size, infobatch.share(batch_size).own(samples) % batch_size
    ledger.tell_bad(data.bad)
    ranks.interrupts.deferred = True
    plain = not sys.stdout.isatty()
    with ledger.meter, tqdm(disable=plain, file=sys.stdout, leave=False, unit="step") as bar:
        ledger.begin()
        for epoch in range(ledger.epoch, epochs):
            with ledger.spending("train"):
                step.model.train()  # evaluation left it otherwise, and a capture would keep that
                with phases("choose"), ledger.watching(choosing=True):
                    if plan is None:
                        step.begin_epoch()
                        plan = _draw(infobatch, epoch, whole)
                    position = min(start * settings.batch_size, len(plan))
                    part = ranks.part(infobatch, plan, position, batch_size)
                if (warning := console.strained(plan, infobatch)) and not warned:
                    say(warning)
                    warned = True
                steps = start + len(loader.epoch(part))
                bar.reset(total=steps)
                bar.update(start)
                bar.set_description(f"epoch {epoch + 1}/{epochs}")

                with ledger.watching() as watch:
                    starting = partial(ledger.starting, watch)
                    batches = _batches(loader, part, advance, phases, starting)
                    for number, (images, labels, batch) in enumerate(batches, start + 1):
                        new = labels.numel() in lasting and step.is_new(images.shape)
                        with starting(labels.numel()) if new else nullcontext(), phases("step"):
                            if settings.mixup:
                                share = mixup_share(settings.mixup, settings.seed, epoch, number)
                                step.share.fill_(share)
                            advance(images, labels, batch, *_rate(settings, epoch, number, steps))
                        signal, every = ranks.stopping(), settings.checkpoint_every
                        if (every and number % every == 0) or signal:
                            with watch.allowed():
                                ledger.save(plan, number)
                            ledger.stop(signal)
                        bar.update()
                with phases("merge"):
                    infobatch.merge()
                counts = step.read_counts()  # the host waits for the epoch's steps
            ledger.check(counts, steps)

            accuracy = None
            if (epoch + 1) % settings.eval_every == 0 or epoch + 1 == epochs:
                bar.set_description(f"epoch {epoch + 1}/{epochs} evaluating")
                with ledger.spending("evaluation"):
                    step.spread_buffers()
                    accuracy = evaluate(step.result, tests, settings.amp, ranks)
            (signal,) = ranks.most(ranks.interrupts.received)
            if signal:
                ledger.save(plan, steps)  # trained, and perhaps not evaluated: that is left to do
                ledger.stop(signal)
            line = ledger.close_epoch(
                plan,
                counts,
                lr=_rate(settings, epoch, steps, steps)[0],
                accuracy=accuracy,
                score_histogram=score_histogram(infobatch.scores) if settings.telemetry else None,
            )
            say(console.epoch_line(line, settings, samples))
            log(line)
            ledger.tell_bad(data.bad)
            plan, start = None, 0
            signal, due = ranks.most(ranks.interrupts.received, ledger.due())
            if due or epoch + 1 == epochs or signal:
                ledger.save()
                ledger.stop(signal if epoch + 1 < epochs else 0)
    ranks.interrupts.deferred = False
    captured = isinstance(advance, GraphStep) and advance.captured
    forms = {"compiled": step.compiled, "captured": captured, "loader": type(loader).__name__}
    console.tell(ledger.finish(data, **forms), settings, folder)


def _made(
    settings: Config, data: Dataset, ranks: Ranks
) -> tuple[TrainStep, TrainStep | GraphStep, Loader]:
    """The training step, what runs it, by graphs or not, and the loader; the user is told."""
    device, labels = data.images.device, data.labels
    # Nothing here draws from it; a model with dropout would, on each rank its own.
    torch.manual_seed((settings.seed + (ranks.rank << 32)) % 2**63)
    torch.backends.cudnn.benchmark = True
    sides = data.sides, data.test_sides
    model = make_model(settings.model, data.num_classes, *sides, seed=settings.seed)
    if settings.sync_batch_norm and ranks.world > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model, ranks.group)
    model = model.to(device=device, memory_format=torch.channels_last)  # pyright: ignore
    infobatch = InfoBatch(
        labels.numel(),
        settings.epochs,
        seed=settings.seed,
        device=device,
        labels=labels,
        group=ranks.group,
        **settings.pruning.settings(),
    )
    rates: Any = {"lr": settings.max_lr, "weight_decay": settings.weight_decay}
    step = TrainStep(
        model,
        make_optimizer(settings.optimizer, model, **rates),
        infobatch,
        amp=settings.amp,
        label_smoothing=settings.label_smoothing,
        compile=settings.compile,
        phases=Phases(device, enabled=settings.telemetry),
        say=say,
        ranks=ranks,
        ema=settings.ema,
        mixup=settings.mixup > 0,
    )
    how = {"mean": data.mean, "std": data.std, "seed": settings.seed}
    batch_size = settings.batch_size // ranks.world
    loader, note = make_loader(settings.loader, data.images, labels, batch_size, **how)
    fed, parameters = type(loader).__name__, sum(p.numel() for p in model.parameters())
    about = record.describe(device, ranks.world), parameters, infobatch, fed
    for line in console.header(settings, data, *about):
        say(line)
    advance: TrainStep | GraphStep = step
    if settings.graph:
        if why := obstacle(step):
            note = f"WARNING: no CUDA graph, every step runs eagerly: {why}"
        else:
            advance = GraphStep(step, say)
    if note:
        say(note)
    return step, advance, loader


def _draw(infobatch: InfoBatch, epoch: int, batch_size: int | None) -> Plan:
    try:
        return infobatch.sample(epoch, batch_size)
    except (Exception, SystemExit) as error:
        if ":" not in (policy := infobatch.pruning.policy):
            raise
        raise failed("policy", policy, error) from error


def _batches(
    loader: Loader,
    part: Plan,
    advance: TrainStep | GraphStep,
    phases: Phases,
    starting: Callable[[int], AbstractContextManager[None]],
) -> Batches:
    """The epoch's batches; the loader begins anew behind the one after which a step is captured."""
    graph, done = advance if isinstance(advance, GraphStep) else None, 0
    while done < len(loader.epoch(part)):
        for batch in phases.each("wait", loader.epoch(part, done)):
            yield batch
            done += 1
            if graph and graph.pending:
                break
        if graph and graph.pending:
            with starting(0):
                graph.capture()


def _rate(settings: Config, epoch: int, number: int, steps: int) -> tuple[float, float]:
    """Learning rate and momentum of step `number` (from 1) of the `steps` of an epoch."""
    done = (epoch + (number - 1) / steps) / settings.epochs
    return one_cycle(done, max_lr=settings.max_lr)


def for_testing(data: Dataset, kind: str, ranks: Ranks) -> Epoch:
    """Each test image once, every W-th of them, with weight 0 for what could not be decoded.

    Args:
        kind: of loader, where the images are in files.
    """
    images, labels = data.test_images, data.test_labels
    kind, size = ("torch", TEST_BATCH) if isinstance(images, Tensor) else (kind, FILES_BATCH)
    how = {"mean": data.mean, "std": data.std, "augment": False}
    loader, _ = make_loader(kind, images, labels, size, **how)
    mine = torch.arange(ranks.rank, len(labels), ranks.world, device=labels.device)
    weights = torch.ones(len(mine), device=labels.device)
    return loader.epoch(Plan(0, len(labels), 0, mine, weights))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    tests: Iterable[tuple[Tensor, Tensor, Batch]],
    amp: str,
    ranks: Ranks,
) -> float | None:
    """The share of all ranks' `for_testing` that the model gets right; None if a signal came first.

    The model is not compiled: in evaluation mode, in which it is left, it would be compiled once
    more, which takes longer than a training's evaluations gain by it.
    """
    right, number, stopped = torch.zeros(()), torch.zeros(()), False
    model.eval()
    for images, labels, (_, weights) in tests:
        with torch.autocast(images.device.type, AUTOCAST.get(amp), enabled=amp != "off"):
            hits = model(images).argmax(1) == labels
        right, number = right + (hits * weights).sum(), number + weights.sum()
        if stopped := bool(ranks.interrupts.received):
            break
    counts = right.item(), number.item(), stopped  # the host waits for the evaluation
    all_right, all_number, any_stopped = ranks.total(*counts)
    return None if any_stopped else all_right / all_number


def find_device(name: str) -> torch.device:
    """The device of --device; on a CPU torch leaves one core to the loader and the system."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device must be cpu or auto, as torch finds no CUDA device, got cuda")
    if name != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    # OpenMP's threads wait for each other spinning: with all cores taken, another process on
    # one of them slowed training 2 to 12 times; with one core left, by a third at most.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), available_cores() - 1)))
    return torch.device("cpu")


def available_cores() -> int:
    """Those that this process may run on."""
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
