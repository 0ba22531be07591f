"""How long the runs of a plan take, about: from finished runs, or from a few steps timed now."""

import json
import signal
import sys
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports: no traceback
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import harness as measure
import torch
from reproduce_child import run_child
from reproduce_plan import Planned, Setting

from infobatch_fast.infobatch import InfoBatch
from infobatch_fast.report.groups import counted, device_of
from infobatch_fast.report.records import Run
from infobatch_fast.telemetry.phases import Phases
from infobatch_fast.train import config
from infobatch_fast.train.cli import Interrupts
from infobatch_fast.train.config import Config
from infobatch_fast.train.loop import find_device
from infobatch_fast.train.models import make_model
from infobatch_fast.train.optim import make_optimizer
from infobatch_fast.train.step import TrainStep

CALIBRATION_SECONDS = 6.0
_STEPS = 3


class Pace(NamedTuple):
    """Seconds that a sample takes to be trained on, and what they are from."""

    seconds: float
    source: str


def pace_of_runs(runs: Iterable[Run], model: str, device: dict[str, Any]) -> Pace | None:
    """The pace of the finished runs of a model on a device; None where there are none.

    Args:
        runs: finished or not.
        model: its name.
        device: from `record.describe`.
    """
    alike = [
        run
        for run in runs
        if run.complete
        and run.config["model"] == model
        and device_of(run.about) == device_of({"device": device})
    ]
    if not alike:
        return None
    seconds = 3600 * sum(run.device_hours for run in alike)
    trained = sum(run.trained for run in alike)
    return Pace(seconds / trained, f"{counted(len(alike), 'finished run')} of {model} here")


def measured_pace(setting: Setting, interrupts: Interrupts) -> Pace | None:
    """The pace of a few steps of the model, in a process of its own; None where that failed.

    Raises:
        Interrupted: by a signal.
    """
    settings = setting.defaults
    words = ["--preset", setting.preset, "--device", setting.device, *setting.extra]
    ended = run_child([sys.executable, __file__, *words], interrupts, lambda line: None)
    try:
        seconds, batch = json.loads(ended.output[-1])
    except (IndexError, ValueError, TypeError):
        return None
    how = " that are not compiled" if settings.compile or settings.graph else ""
    steps = f"{_STEPS} training steps of {settings.model} with batch {batch}{how}"
    return Pace(seconds, f"{steps}, without evaluation")


def seconds_left(
    setting: Setting, planned: Planned, pace: float, saved_share: float, done: float
) -> float:
    """Seconds that a run still takes.

    Args:
        setting: the plan's.
        planned: epochs None are those of as many samples as the run it depends on.
        pace: seconds a sample.
        saved_share: of the samples that the run leaves out, about.
        done: share of its epochs that is done.
    """
    return samples_of(setting, planned, saved_share) * pace * (1 - done)


def samples_of(setting: Setting, planned: Planned, saved_share: float) -> int:
    """Samples that a run trains on, about."""
    epochs = planned.epochs or setting.epochs
    return round(setting.samples * epochs * (1 - saved_share))


def words_of(seconds: float) -> str:
    """A time as one reads it: 40 s, 12 min, 3 h 5 min."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def time_steps(settings: Config, device: torch.device, seconds: float) -> tuple[float, int]:
    """Seconds a sample of a few eager training steps, and their batch.

    The batch is that of the settings, or what the time allows after a step of two samples.

    Args:
        settings: of model and recipe.
        device: trained on.
        seconds: for all of it but that first step, about.
    """
    model = make_model(settings.model, 10, seed=0)
    model = model.to(device=device, memory_format=torch.channels_last)  # pyright: ignore
    most = max(2, settings.batch_size)
    step = TrainStep(
        model.train(),
        make_optimizer(settings.optimizer, model, lr=0.01, weight_decay=settings.weight_decay),
        infobatch := InfoBatch(most, 1, device=device),
        amp=settings.amp,
        label_smoothing=settings.label_smoothing,
        compile=False,
        phases=Phases(device, enabled=False),
    )
    images = torch.randn(most, 3, 32, 32, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(most, device=device) % 10
    plan = infobatch.sample(0)

    def timed(batch: int) -> float:
        part = images[:batch], labels[:batch], plan.batch(0, batch)
        return measure.wall(lambda: step(*part, 0.01, 0.9), device) / batch

    first = timed(2)
    first = min(first, timed(2)) if first * 2 < seconds / 4 else first
    batch = max(2, min(most, int(seconds / (_STEPS + 1) / first)))
    timed(batch)
    return statistics.median(timed(batch) for _ in range(_STEPS)), batch


def main(words: Sequence[str]) -> None:
    """Print seconds a sample and the batch, of the settings that the words ask the trainer for."""
    settings = config.parse(words, cuda=torch.cuda.is_available())
    print(json.dumps(time_steps(settings, find_device(settings.device), CALIBRATION_SECONDS)))


if __name__ == "__main__":
    main(sys.argv[1:])
