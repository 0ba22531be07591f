"""The epochs' figures in TensorBoard or Weights & Biases."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from infobatch_fast.errors import UserError
from infobatch_fast.train.config import Config
from infobatch_fast.train.records import EpochLine


def make_log(settings: Config, folder: Path | None) -> Callable[[EpochLine], None]:
    """What takes each epoch's line: nothing, or a log in the run's folder, if any."""
    if settings.log == "off" or folder is None:
        return lambda line: None
    try:
        write = (_tensorboard if settings.log == "tensorboard" else _wandb)(settings, folder)
    except ImportError:
        raise UserError(f"log {settings.log} needs it: pip install {settings.log}") from None

    def log(line: EpochLine) -> None:
        numbers = asdict(line).items()
        write({name: n for name, n in numbers if isinstance(n, int | float)}, line.epoch)

    return log


def _tensorboard(settings: Config, folder: Path) -> Callable[[dict[str, float], int], None]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(folder)

    def write(numbers: dict[str, float], epoch: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, epoch)
        writer.flush()

    return write


def _wandb(settings: Config, folder: Path) -> Callable[[dict[str, float], int], None]:
    """A run of the folder's name, whose id lies in the folder for a resumption to go on with."""
    import wandb  # pyright: ignore[reportMissingImports]

    recorded = settings.recorded()
    run = wandb.init(dir=folder, name=folder.name, resume="auto", config=recorded)
    return lambda numbers, epoch: run.log(numbers, step=epoch)
