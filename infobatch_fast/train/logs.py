"""The epochs' figures in TensorBoard."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from infobatch_fast.errors import UserError
from infobatch_fast.train.config import Config
from infobatch_fast.train.records import EpochLine


def make_log(settings: Config, folder: Path | None) -> Callable[[EpochLine], None]:
    """What takes each epoch's line: nothing, or a TensorBoard log in the run's folder, if any."""
    if settings.log == "off" or folder is None:
        return lambda line: None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("log tensorboard needs it: pip install tensorboard") from None
    writer = SummaryWriter(folder)

    def log(line: EpochLine) -> None:
        for name, value in asdict(line).items():
            if isinstance(value, int | float):
                writer.add_scalar(name, value, line.epoch)
        writer.flush()

    return log
