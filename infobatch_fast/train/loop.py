"""The trainer: `python -m infobatch_fast.train --ratio 0.5`."""

import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from infobatch_fast.data.cifar import (
    DataMissing,
    Dataset,
    default_data_dir,
    load_cifar,
    make_synthetic,
)
from infobatch_fast.data.loader import make_loader
from infobatch_fast.errors import UserError, reason
from infobatch_fast.infobatch import InfoBatch
from infobatch_fast.telemetry.phases import (
    HostSync,
    HostSyncs,
    Nvml,
    Phases,
    host_syncs,
    score_histogram,
)
from infobatch_fast.train import checkpoint, config, console
from infobatch_fast.train import folder as record
from infobatch_fast.train.cli import Interrupted, Interrupts, command, complain
from infobatch_fast.train.config import Config
from infobatch_fast.train.graph import GraphStep, obstacle
from infobatch_fast.train.ledger import Diverged, Progress
from infobatch_fast.train.models import make_model
from infobatch_fast.train.optim import make_optimizer
from infobatch_fast.train.schedule import one_cycle
from infobatch_fast.train.step import AUTOCAST, TrainStep

EVALUATION_BATCH = 1000  # on a CPU
EVALUATION_BYTES = 2**24  # of GPU memory left free for each image, four times what r101 needs
OUT_OF_MEMORY = (
    "lower --batch-size, --synthetic-samples or --synthetic-classes, "
    "or take a smaller --model or --amp bf16"
)


def train(
    settings: Config,
    data: Dataset,
    folder: Path,
    saved: dict[str, Any] | None,
    interrupts: Interrupts,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Train, keeping the run's folder up to date, and return the summary.

    Args:
        settings: of the run.
        data: on its device.
        folder: the run's, with config.json in it.
        saved: the checkpoint to continue from.
        interrupts: looked at after every step.
        say: shows a line to the user.

    Raises:
        Diverged: too many steps in a row were not finite.
        Interrupted: by a signal, with a checkpoint written.
        UserError: the checkpoint does not fit, or the disk is full.
    """
    device, samples, epochs = data.images.device, data.labels.numel(), settings.epochs
    if settings.compile and settings.host_syncs != "off" and device.type == "cpu":
        # What watches the reads would silently keep torch.compile from compiling.
        raise UserError(
            f"host_syncs must be off with --compile on a CPU, got {settings.host_syncs}"
        )
    torch.manual_seed(settings.seed)  # nothing here draws from it; a model with dropout would
    torch.backends.cudnn.benchmark = True
    model = make_model(settings.model, data.num_classes, seed=settings.seed)
    model = model.to(device=device, memory_format=torch.channels_last)  # pyright: ignore
    infobatch = InfoBatch(
        samples,
        epochs,
        settings.ratio,
        settings.delta,
        settings.seed,
        device,
        policy=settings.policy,
        rescale=settings.rescale,
        anneal=settings.anneal,
        score=settings.score,
        ratio_schedule=settings.ratio_schedule,
        target_saving=settings.target_saving,
    )
    step = TrainStep(
        model,
        make_optimizer(
            settings.optimizer, model, lr=settings.max_lr, weight_decay=settings.weight_decay
        ),
        infobatch,
        amp=settings.amp,
        label_smoothing=settings.label_smoothing,
        compile=settings.compile,
        phases=Phases(device, enabled=settings.telemetry),
        say=say,
    )
    loader, note = make_loader(
        settings.loader,
        data.images,
        data.labels,
        settings.batch_size,
        mean=data.mean,
        std=data.std,
        seed=settings.seed,
    )
    parameters = sum(p.numel() for p in model.parameters())
    about = record.describe(device), parameters, type(loader).__name__
    for line in [*console.header(settings, data, *about), *([note] if note else [])]:
        say(line)
    if settings.target_saving is not None:
        for line in console.target_lines(infobatch):
            say(line)

    phases, meter = step.phases, Nvml(device, enabled=settings.telemetry)
    advance: TrainStep | GraphStep = step
    if settings.graph:
        why = obstacle(step)
        if why is None:
            advance = GraphStep(step, say)
        else:
            say(f"WARNING: no CUDA graph, every step runs eagerly: {why}")
    progress = Progress(step, folder / record.CHECKPOINT, settings, meter)
    test_batch = evaluation_batch(data.test_labels.numel(), device)
    plan, start = None, 0
    if saved is not None:
        plan, start = progress.restore(saved)
        if saved.get("kernels") != step.by_kernels:
            say("WARNING: Triton kernels draw other epochs than torch: the rest will differ")
        say(f"resume     from step {start} of epoch {progress.epoch + 1}")
    record.write_epochs(folder / record.EPOCHS, progress.history)
    whole = settings.batch_size if settings.whole_batches else None
    plain = not sys.stdout.isatty()
    varies = settings.target_saving is not None or settings.ratio_schedule != "constant"
    warned = False

    def stop_if_asked() -> None:
        if interrupts.received:
            raise Interrupted(interrupts.received, f"stopped; continue with --resume {folder}")

    interrupts.deferred = True
    with meter, tqdm(disable=plain, file=sys.stdout, leave=False, unit="step") as bar:
        progress.begin()
        for epoch in range(progress.epoch, epochs):
            progress.start_clock()
            if isinstance(advance, GraphStep):
                advance.capture()  # of the epochs before; it counts as training
            # Of an epoch that is resumed midway the first part is not known.
            counted, syncs = settings.host_syncs != "off" and plan is None, 0
            if plan is None:
                step.begin_epoch()
                with phases("choose"), _watch(settings, device, "count") as watch:
                    plan = infobatch.sample(epoch, whole)
                syncs = watch.count
            warning = console.strained(plan, infobatch)
            if warning is not None and not warned:
                say(warning)
                warned = True
            steps = math.ceil(len(plan) / settings.batch_size)
            bar.reset(total=steps)
            bar.update(start)
            bar.set_description(f"epoch {epoch + 1}/{epochs}")

            step.forward.train()
            with _watch(settings, device, settings.host_syncs) as watch:
                batches = phases.each("wait", loader.epoch(plan, start))
                for number, (images, labels, batch) in enumerate(batches, start + 1):
                    with phases("step"):
                        advance(images, labels, batch, *_schedule(settings, epoch, number, steps))
                    bar.update()
                    asked = settings.checkpoint_every and number % settings.checkpoint_every == 0
                    if asked or interrupts.received:
                        with watch.allowed():
                            progress.save(plan, number)
                        stop_if_asked()
            syncs += watch.count
            counts = step.read_counts()
            progress.stop_clock()
            progress.check_finite(counts.longest)

            accuracy = None
            if (epoch + 1) % settings.eval_every == 0 or epoch + 1 == epochs:
                bar.set_description(f"epoch {epoch + 1}/{epochs} evaluating")
                with phases("evaluation"), progress.spending("evaluation_seconds"):
                    accuracy = evaluate(step.forward, data, settings.amp, test_batch, interrupts)
            if interrupts.received:
                progress.save(plan, steps)  # trained, and perhaps not evaluated: that is left to do
                stop_if_asked()
            line = progress.close_epoch(
                plan,
                counts,
                lr=_schedule(settings, epoch, steps, steps)[0],
                accuracy=accuracy,
                host_syncs=syncs if counted else None,
                histogram=score_histogram(infobatch.scores) if settings.telemetry else None,
            )
            record.write_epochs(folder / record.EPOCHS, progress.history)
            say(console.epoch_line(line, epochs, samples, ratio=varies))
            plan, start = None, 0
            if progress.due() or epoch + 1 == epochs or interrupts.received:
                progress.save()
                if epoch + 1 < epochs:
                    stop_if_asked()
    interrupts.deferred = False

    progress.samples.write(folder, data, infobatch.scores)
    weights = {name: value.cpu().contiguous() for name, value in model.state_dict().items()}
    checkpoint.save_tensors(folder / record.WEIGHTS, weights)
    summary = progress.summary(samples, data.source)
    record.write_json(folder / record.SUMMARY, summary)
    return summary


def _watch(
    settings: Config, device: torch.device, action: str
) -> AbstractContextManager[HostSyncs]:
    """`host_syncs`, if --host-syncs asks for it."""
    return host_syncs(device, "off" if settings.host_syncs == "off" else action)


def _schedule(settings: Config, epoch: int, number: int, steps: int) -> tuple[float, float]:
    """Learning rate and momentum of step `number` (from 1) of the `steps` of an epoch."""
    done = (epoch + (number - 1) / steps) / settings.epochs
    return one_cycle(done, max_lr=settings.max_lr)


def evaluation_batch(tests: int, device: torch.device) -> int:
    """Images evaluated at once: as many as memory likes, in batches of nearly equal size.

    Args:
        tests: test images.
        device: whose memory it is.
    """
    most = EVALUATION_BATCH
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        most = max(250, free // EVALUATION_BYTES)
    return math.ceil(tests / math.ceil(tests / most))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Dataset,
    amp: str,
    batch_size: int,
    interrupts: Interrupts | None = None,
) -> float | None:
    """The share of the test set that the model gets right; None if a signal came first.

    Args:
        model: on the data's device, compiled or not; left in evaluation mode.
        data: whose test images are taken.
        amp: bf16, fp16 or off.
        batch_size: images at once.
        interrupts: looked at after every batch.
    """
    device = data.test_images.device
    mean = torch.tensor(data.mean, device=device) * 255
    scale = 1 / (torch.tensor(data.std, device=device) * 255)
    right = torch.zeros((), dtype=torch.int64, device=device)
    model.eval()
    batches = zip(
        data.test_images.split(batch_size),
        data.test_labels.split(batch_size),
        strict=True,
    )
    with torch.autocast(device.type, AUTOCAST.get(amp), enabled=amp != "off"):
        for pixels, labels in batches:
            images = ((pixels - mean) * scale).permute(0, 3, 1, 2)  # channels_last as it lies
            right += (model(images).argmax(1) == labels).sum()
            if interrupts is not None and interrupts.received:
                return None
    return right.item() / data.test_labels.numel()  # waits for the evaluation


def load_data(
    settings: Config, device: torch.device, say: Callable[[str], None], *, stand_in: bool = False
) -> Dataset:
    """The data set, on the device.

    Args:
        settings: which one, and where it lies.
        device: where its tensors go.
        say: shows a line to the user.
        stand_in: whether `quick`, if no data set was named, may take a synthetic one, loudly.

    Raises:
        UserError: there is none, or a file of it is broken.
    """
    name = settings.dataset or "cifar10"
    if name != "synthetic":
        try:
            data = load_cifar(name, settings.data_dir or default_data_dir())
            return data.part(settings.data_fraction).to(device)
        except DataMissing as missing:
            named = settings.dataset is not None or settings.data_dir is not None
            if not stand_in or settings.preset != "quick" or named:
                raise
            say(f"WARNING: {missing}")
            say("WARNING: taking SYNTHETIC data instead; the accuracy will say nothing of CIFAR-10")
    return make_synthetic(
        settings.synthetic_samples,
        max(1, settings.synthetic_samples // 5),
        settings.synthetic_classes,
        easy=settings.synthetic_easy,
        hard=settings.synthetic_hard,
        seed=settings.seed,
        device=device,
    ).part(settings.data_fraction)


def find_device(name: str) -> torch.device:
    """The device of --device; on a CPU torch leaves one core to the loader and the system.

    Raises:
        UserError: CUDA was asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device must be cpu or auto, as torch finds no CUDA device, got cuda")
    if name == "cpu" or not torch.cuda.is_available():
        # OpenMP's threads wait for each other spinning: with all cores taken, another process on
        # one of them slowed training 2 to 12 times; with one core left, by a third at most.
        if "OMP_NUM_THREADS" not in os.environ:
            known = hasattr(os, "sched_getaffinity")
            cores = len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1
            torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - 1)))
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def run(arguments: Sequence[str], interrupts: Interrupts, say: Callable[[str], None]) -> None:
    """The command line: train, resume or evaluate.

    Raises:
        Diverged, Interrupted, UserError: as they say.
    """
    evaluated, resumed = config.peek(arguments, "evaluate"), config.peek(arguments, "resume")
    if evaluated is not None and resumed is not None:
        raise UserError(f"resume and evaluate exclude each other, got {resumed} and {evaluated}")
    if evaluated is not None:
        return evaluate_file(Path(evaluated).expanduser(), arguments, say)
    if resumed is not None:
        return resume(Path(resumed).expanduser(), arguments, interrupts, say)
    settings = config.parse(arguments, cuda=torch.cuda.is_available())
    say(console.preset_line(settings, config.peek(arguments, "preset") is not None))
    device = find_device(settings.device)
    data = load_data(settings, device, say, stand_in=True)
    _check_batch(settings, data)
    settings = config.settle(settings, data.name, device.type)
    folder = settings.out.expanduser() if settings.out else Path("runs") / _name(settings)
    made = record.make_folder(folder)
    with record.locked(folder):
        record.check_empty(folder)
        try:
            samples = {"train": data.labels.numel(), "test": data.test_labels.numel()}
            about = {
                "config": settings.recorded(),
                "data": data.source,
                "samples": samples,
                "classes": data.classes,
            }
            record.write_json(folder / record.CONFIG, {**about, **record.provenance(device)})
            summary = train(settings, data, folder, None, interrupts, say)
        except (UserError, MemoryError, RuntimeError):
            if not (folder / record.CHECKPOINT).exists():
                record.discard(folder, made)  # the mended command may name the same folder
            raise
    for line in console.summary_lines(summary, folder):
        say(line)


def resume(
    folder: Path, arguments: Sequence[str], interrupts: Interrupts, say: Callable[[str], None]
) -> None:
    """Continue a run from its checkpoint, or start it over if it has none.

    Raises:
        Diverged, Interrupted, UserError: as they say.
    """
    if not (folder / record.CONFIG).exists():
        raise UserError(f"resume must be a run's folder, with config.json in it, got {folder}")
    with record.locked(folder):
        recorded = config.from_record(record.read_json(folder / record.CONFIG).get("config"))
        settings = config.of_run(arguments, recorded, "resume")
        if (folder / record.SUMMARY).exists():
            say(f"resume     nothing to do: {folder} is complete")
            summary = record.read_json(folder / record.SUMMARY)
        else:
            saved = None
            if (folder / record.CHECKPOINT).exists():
                saved = checkpoint.load(folder / record.CHECKPOINT)
            else:
                say("resume     from the start, as no checkpoint was written yet")
            data = load_data(settings, find_device(settings.device), say)
            _check_batch(settings, data)
            summary = train(settings, data, folder, saved, interrupts, say)
    try:
        lines = console.summary_lines(summary, folder)
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / record.SUMMARY} is no run's summary: {error!r}") from None
    for line in lines:
        say(line)


def evaluate_file(path: Path, arguments: Sequence[str], say: Callable[[str], None]) -> None:
    """Print the test accuracy of a checkpoint, a weights file or a run's folder.

    Raises:
        UserError: it cannot be loaded, or is of another model than the settings beside it say.
    """
    if path.is_dir():
        path = path / record.CHECKPOINT
    state = checkpoint.load_tensors(path)
    about = path.parent / record.CONFIG
    if isinstance(state.get("step"), dict):
        weights = state["step"].get("model")
        settings = config.of_run(arguments, config.from_record(state.get("config")), "evaluate")
    elif about.exists():
        weights, recorded = state, config.from_record(record.read_json(about).get("config"))
        settings = config.of_run(arguments, recorded, "evaluate")
    else:  # weights from elsewhere: the command line says of which model
        weights, settings = state, config.parse(arguments, cuda=torch.cuda.is_available())
    # A run of another machine is evaluated on what this one has; but synthetic data are its own.
    here = config.peek(arguments, "device") or "auto"
    device = find_device(settings.device if settings.dataset == "synthetic" else here)
    data = load_data(settings, device, say)
    model = make_model(settings.model, data.num_classes)
    try:
        model.load_state_dict(weights)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise UserError(
            f"checkpoint {path} does not fit {settings.model}: {reason(error)}"
        ) from None
    model = model.to(device=device, memory_format=torch.channels_last)  # pyright: ignore
    batch_size = evaluation_batch(data.test_labels.numel(), device)
    accuracy = evaluate(model, data, settings.amp, batch_size)
    say(
        f"test accuracy {accuracy:.2%}: {path}, {settings.model} on the "
        f"{data.test_labels.numel():,} test images of {data.name} ({data.source})"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    try:
        return command(lambda interrupts, say: run(words, interrupts, say), OUT_OF_MEMORY)
    except (Diverged, HostSync) as error:
        return complain(f"error: {error}", 1)


def _check_batch(settings: Config, data: Dataset) -> None:
    if settings.batch_size > data.labels.numel():
        raise UserError(
            f"batch_size must be at most the {data.labels.numel()} training samples, "
            f"got {settings.batch_size}"
        )


def _name(settings: Config) -> str:
    aim = settings.target_saving
    share = f"r{settings.ratio:g}" if aim is None else f"t{aim:g}"
    pruning = f"{settings.policy}-{share}-d{settings.delta:g}"
    when = datetime.now().strftime("%Y%m%d-%H%M%S")
    return f"{settings.dataset}-{settings.model}-{pruning}-s{settings.seed}-{when}-{os.getpid()}"
