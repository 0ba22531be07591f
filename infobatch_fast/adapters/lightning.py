"""Lightning: a callback that has each epoch's length read anew, and saves the scores."""

import warnings
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader

from infobatch_fast.adapters.sampler import Sampler, sampler_of
from infobatch_fast.infobatch import InfoBatch


class InfoBatchCallback(Callback):
    """What Lightning must be told of epochs that differ in length.

    Lightning reads a loader's length once, and validates at the batch of that number: a shorter
    epoch would never be validated. The callback has the loader asked for in each epoch
    (`reload_dataloaders_every_n_epochs=1`), so that validation, progress bar and
    `trainer.num_training_batches` are right. Its state, which Lightning saves and loads with its
    checkpoints, is that of the InfoBatch, in the middle of an epoch too.

    Args:
        infobatch: the one whose `loader` is trained from, by `training_step`:

            (x, y), batch = batch
            return infobatch.update(F.cross_entropy(self(x), y, reduction="none"), batch)
    """

    def __init__(self, infobatch: InfoBatch) -> None:
        self.infobatch = infobatch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raises ValueError where the trainer has more epochs, or draws the samples itself."""
        if stage != "fit":
            return
        if trainer.max_epochs not in range(self.infobatch.num_epochs + 1):
            raise ValueError(
                f"max_epochs of the Trainer must be at most the InfoBatch's num_epochs, "
                f"{self.infobatch.num_epochs}, got {trainer.max_epochs}"
            )
        if some := trainer.overfit_batches:  # type: ignore[attr-defined]
            raise ValueError(
                f"overfit_batches of the Trainer must be 0, got {some}: it replaces the sampler, "
                "which limit_train_batches does not"
            )
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        # Lightning takes the last epoch's end for the middle of one, as if all were equally long.
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resumed after a validation, Lightning takes an epoch up that has no batches left.

        Raises:
            ValueError: the loader is another InfoBatch's, or this one has trained without the
                Trainer.
        """
        owners = [sampler.infobatch for sampler in _samplers(trainer)]
        if owners and self.infobatch not in owners:
            raise ValueError("a train_dataloader must be of the callback's InfoBatch, got none")
        loop, epoch = trainer.fit_loop, self.infobatch.next_epoch
        if epoch > trainer.current_epoch:
            loop.max_batches = loop.epoch_loop.batch_progress.current.ready
            if not loop.max_batches:
                raise ValueError(
                    f"the InfoBatch must be at the Trainer's epoch, {trainer.current_epoch}, got "
                    f"one at epoch {epoch}: make a new one, or go on by ckpt_path"
                )
            trainer.val_check_batch = loop.max_batches

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The loader's length is asked for before the next epoch is set: it is that one's."""
        following = trainer.current_epoch + 1
        if following < self.infobatch.num_epochs:
            for sampler in _samplers(trainer):
                if sampler.infobatch is self.infobatch:
                    sampler.set_epoch(following)

    def state_dict(self) -> dict[str, Any]:
        """The InfoBatch's; Lightning asks for it on every rank."""
        self.infobatch.merge()
        return self.infobatch.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning calls it before the first loader is asked for."""
        self.infobatch.load_state_dict(state_dict)


def _samplers(trainer: Trainer) -> list[Sampler]:
    samplers = map(sampler_of, CombinedLoader(trainer.train_dataloader).flattened)
    return [sampler for sampler in samplers if sampler is not None]
