"""`python -m infobatch_fast.train`: train, resume or evaluate."""

import signal

if __name__ == "__main__":
    # Ctrl-C during two seconds of imports: no traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infobatch_fast.data.cifar import DataMissing, default_data_dir, load_cifar
from infobatch_fast.data.dataset import Dataset
from infobatch_fast.data.folder import load_folder
from infobatch_fast.data.synthetic import make_synthetic
from infobatch_fast.errors import UserError, reason
from infobatch_fast.telemetry.syncs import HostSync
from infobatch_fast.train import config, console, records
from infobatch_fast.train import folder as record
from infobatch_fast.train.cli import Interrupts, command, complain, say
from infobatch_fast.train.compare import compare
from infobatch_fast.train.config import Config
from infobatch_fast.train.distributed import Ranks
from infobatch_fast.train.ledger import Diverged
from infobatch_fast.train.loop import available_cores, evaluate, find_device, for_testing, train
from infobatch_fast.train.models import make_model
from infobatch_fast.train.own import own_dataset
from infobatch_fast.train.queue import Failed, look

OUT_OF_MEMORY = (
    "lower --batch-size, --synthetic-samples or --synthetic-classes, "
    "or take a smaller --model or --amp bf16"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    words = sys.argv[1:] if arguments is None else arguments
    ranks, code = Ranks(), 1

    def body(interrupts: Interrupts) -> None:
        ranks.interrupts = interrupts
        with ranks:
            run(words, ranks)

    try:
        code = command(body, OUT_OF_MEMORY, ranks.tells)
    except (Diverged, HostSync, Failed) as error:
        if ranks.tells():
            complain(f"error: {error}", 1)
    except Exception:
        if ranks.world == 1:
            raise
        if ranks.tells():
            traceback.print_exc()
    return ranks.end(code)


def run(arguments: Sequence[str], ranks: Ranks) -> None:
    """Train, resume or evaluate, as the command line says."""
    ranks.agree([*arguments], "arguments must be the same")
    evaluated, resumed = config.peek(arguments, "evaluate"), config.peek(arguments, "resume")
    if evaluated is not None and resumed is not None:
        raise UserError(f"resume and evaluate exclude each other, got {resumed} and {evaluated}")
    if evaluated is not None:
        if ranks.first:
            evaluate_file(Path(evaluated).expanduser(), arguments)
    elif resumed is not None:
        resume(Path(resumed).expanduser(), arguments, ranks)
    else:
        start(arguments, ranks)


def start(arguments: Sequence[str], ranks: Ranks) -> None:
    """Train a run of its own; where torchrun has restarted the processes, go on with it."""
    settings = config.parse(arguments, cuda=torch.cuda.is_available())
    say(console.preset_line(settings, config.peek(arguments, "preset") is not None))
    asked, settings = settings, config.spent(settings)
    if asked.budget is not None:
        say(console.budget_line(asked, settings))
    if settings.compare:
        if ranks.world > 1:
            raise UserError(f"compare must be asked of one process, got {ranks.world}")
        compare(asked, settings)
        return
    if settings.out is None and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        raise UserError("out must be given where torchrun has --max-restarts, got none")
    data = _prepared(settings, ranks)
    settings = config.settle(settings, data.name, data.images.device.type, ranks.world)
    _check(settings, data, ranks)
    folder = settings.out.expanduser() if settings.out else Path("runs") / _name(settings)
    folder, begun = ranks.from_first(
        lambda: (folder, ranks.restarts > 0 and _begun(folder, settings))
    )
    if begun:
        _go_on(settings, data, folder, ranks)
        return
    with record.begun(folder) if ranks.first else nullcontext():
        if ranks.first:
            _record(settings, data, folder, ranks.world)
        train(settings, data, folder, None, ranks)


def _record(settings: Config, data: Dataset, folder: Path, processes: int) -> None:
    about = records.RunRecord(
        config=settings.recorded(),
        data=data.source,
        data_hash=None if data.source == "synthetic" else data.fingerprint(),
        samples={"train": data.labels.numel(), "test": data.test_labels.numel()},
        classes=None if data.classes is None else list(data.classes),
        **record.provenance(data.images.device, processes),
    )
    records.write_json(folder / records.CONFIG, about)


def _begun(folder: Path, settings: Config) -> bool:
    """Whether a folder holds this very run; another's is a mistake that a restart repeats."""
    path = folder / records.CONFIG
    return path.exists() and records.read(records.RunRecord, path).config == settings.recorded()


def resume(folder: Path, arguments: Sequence[str], ranks: Ranks) -> None:
    """Continue a run from its checkpoint, or start it over if it has none yet."""
    if ranks.first and not (folder / records.CONFIG).exists():
        raise UserError(f"resume must be a run's folder, with config.json in it, got {folder}")
    recorded = ranks.from_first(lambda: _recorded(folder))
    settings = config.of_run(arguments, recorded, "resume")
    _go_on(settings, None, folder, ranks)


def _go_on(settings: Config, data: Dataset | None, folder: Path, ranks: Ranks) -> None:
    with record.locked(folder) if ranks.first else nullcontext():
        if ranks.from_first((folder / records.SUMMARY).exists):
            say(f"resume     nothing to do: {folder} is complete")
            if ranks.first:
                summary = records.read(records.Summary, folder / records.SUMMARY)
                console.tell(summary, settings, folder)
            return
        saved = ranks.from_first(lambda: _saved(folder))
        if data is None:
            data = _prepared(settings, ranks)
            _check(settings, data, ranks)
        if ranks.first:
            known = records.read(records.RunRecord, folder / records.CONFIG).data_hash
            if known is not None and data.fingerprint() != known:
                raise UserError(f"data_dir must hold the data of the run {folder}, got others")
        train(settings, data, folder, saved, ranks)


def _saved(folder: Path) -> dict[str, Any] | None:
    if (folder / records.CHECKPOINT).exists():
        return record.load(folder / records.CHECKPOINT)
    _, epochs, _ = look(folder)
    if epochs > 1:  # the first leaves a checkpoint: it was taken away, and they would be lost
        rule = f"must be a run with its {records.CHECKPOINT}"
        raise UserError(f"resume {rule}, got {folder} with {epochs} epochs and none")
    say("resume     from the start, as no checkpoint was written yet")
    records.write_epochs(folder / records.EPOCHS, [], "w")
    return None


def _prepared(settings: Config, ranks: Ranks) -> Dataset:
    device = ranks.form(find_device(settings.device))
    with ranks.first_here():
        data = load_data(settings, device, ranks.local_world)
    if ranks.world > 1:
        ranks.agree(data.fingerprint(), "data_dir must hold the same data")
    return data


def evaluate_file(path: Path, arguments: Sequence[str]) -> None:
    """Print the test accuracy of a checkpoint, a weights file or a run's folder."""
    if path.is_dir():
        path = path / records.CHECKPOINT
    state = record.load_tensors(path)
    if isinstance(state.get("step"), dict):
        weights = state["step"].get("average") or state["step"].get("model", {})
        settings = config.of_run(arguments, config.from_record(state["config"]), "evaluate")
    elif (path.parent / records.CONFIG).exists():
        weights, settings = state, config.of_run(arguments, _recorded(path.parent), "evaluate")
    else:  # weights from elsewhere: the command line says of which model
        weights, settings = state, config.parse(arguments, cuda=torch.cuda.is_available())
    if not weights or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"evaluate must be a checkpoint or a model's weights, got {path} of others")
    # A run of another machine is evaluated on what this one has; but synthetic data are its own.
    here = config.peek(arguments, "device") or "auto"
    device = find_device(settings.device if settings.dataset == "synthetic" else here)
    data = load_data(settings, device)
    model = make_model(settings.model, data.num_classes, data.sides, data.test_sides)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit {settings.model}: {reason(error)}") from None
    model = model.to(device=device, memory_format=torch.channels_last)  # pyright: ignore
    alone = Ranks()
    accuracy = evaluate(model, for_testing(data, settings.loader, alone), settings.amp, alone)
    kind = console.judges(settings)
    say(
        f"{kind} accuracy {accuracy:.2%}: {path}, {settings.model} on the "
        f"{data.test_labels.numel():,} {kind} images of {data.name} ({data.source})"
    )


def load_data(settings: Config, device: torch.device, processes: int = 1) -> Dataset:
    """The data set, on the device; processes share this machine's cores and memory."""
    data = _found(settings, device, processes).part(settings.data_fraction)
    if settings.validation >= (samples := data.labels.numel()):
        raise UserError(
            f"validation must be below the {samples} training images, got {settings.validation}"
        )
    data = data.with_validation(settings.validation)
    return data.with_label_noise(settings.label_noise, settings.seed).to(device)


def _found(settings: Config, device: torch.device, processes: int) -> Dataset:
    name = settings.dataset or "cifar10"
    if ":" in name or name == "folder":
        return _of_files(name, settings, processes)
    if name != "synthetic":
        try:
            return load_cifar(name, settings.data_dir or default_data_dir())
        except DataMissing as missing:
            named = settings.dataset or settings.data_dir or os.environ.get("INFOBATCH_DATA")
            if settings.evaluate or settings.preset != "quick" or named:
                raise
            say(f"WARNING: {missing}")
            say("WARNING: taking SYNTHETIC data instead; the accuracy will say nothing of CIFAR-10")
    samples, classes = settings.synthetic_samples, settings.synthetic_classes
    tests = max(1, samples // 5)
    return make_synthetic(samples, tests, classes, seed=settings.seed, device=device)


def _of_files(name: str, settings: Config, processes: int) -> Dataset:
    if settings.data_dir is None:
        raise UserError(f"data_dir must be given with --dataset {name}, got none")
    folder, workers = settings.data_dir.expanduser(), settings.workers
    workers = workers or max(1, available_cores() // processes)
    if name != "folder":
        return own_dataset(name, folder, workers)
    return load_folder(
        folder,
        side=settings.train_size,
        test_side=settings.test_size,
        workers=workers,
        cache=settings.cache,
        processes=processes,
        max_bad_files=settings.max_bad_files,
        say=say,
    )


def _recorded(folder: Path) -> Config:
    return config.from_record(records.read(records.RunRecord, folder / records.CONFIG).config)


def _check(settings: Config, data: Dataset, ranks: Ranks) -> None:
    if settings.batch_size > (samples := data.labels.numel()):
        raise UserError(
            f"batch_size must be at most the {samples} training images that data_fraction "
            f"{settings.data_fraction:g} and validation {settings.validation} leave, "
            f"got {settings.batch_size}"
        )
    if settings.batch_size % ranks.world:
        raise UserError(
            f"batch_size must be a multiple of the {ranks.world} processes, "
            f"got {settings.batch_size}"
        )
    if ranks.world > 1 and not settings.whole_batches:
        raise UserError("whole_batches must be on where several processes train, got off")
    if settings.compile and settings.host_syncs != "off" and data.images.device.type == "cpu":
        # What watches the reads would silently keep torch.compile from compiling.
        raise UserError(
            f"host_syncs must be off with --compile on a CPU, got {settings.host_syncs}"
        )
    if settings.host_syncs == "forbid" and not isinstance(data.images, Tensor):
        raise UserError("host_syncs must not be forbid where images are read by the host")


def _name(settings: Config) -> str:
    run = f"{settings.dataset}-{settings.model}-{settings.pruning.slug}-s{settings.seed}"
    return f"{run}-{datetime.now():%Y%m%d-%H%M%S}-{os.getpid()}"


if __name__ == "__main__":
    sys.exit(main())
