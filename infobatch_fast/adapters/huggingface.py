"""Hugging Face: its Trainer, and those made of it, on epochs that leave samples out."""

import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.optimization import GreedyLR
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import seed_worker

from infobatch_fast.adapters.progress import ProgressLR
from infobatch_fast.adapters.sampler import Collate
from infobatch_fast.infobatch import InfoBatch
from infobatch_fast.plan import Batch, per_sample

INDICES, WEIGHTS = "infobatch_indices", "infobatch_weights"
STATE = "infobatch.pt"  # in each of the Trainer's checkpoints
IGNORED = -100  # the label of what is not trained on: padding, a prompt


_Base = Trainer if TYPE_CHECKING else object


class InfoBatchMixin(_Base):
    """In front of a Trainer: `class PrunedTrainer(InfoBatchMixin, Trainer)`.

    Every epoch is drawn anew, and evaluated, logged and saved as the arguments say. The learning
    rate follows the progress through the epochs to its end. Epochs that prune are of whole global
    batches times accumulation steps, so that no gradient is left for the next one. A checkpoint
    holds the scores; `train(resume_from_checkpoint=...)` goes on with the samples that the epoch
    still had.

    A sample's score is the mean loss of its real tokens, cross-entropy as the Trainer has it, with
    its label smoothing. The gradient is the Trainer's, with each sample's losses times its weight:
    divided by the number of real tokens of the whole batch, accumulation steps and ranks included.
    For another loss override `losses`.

    Args:
        pruning: further arguments of the `InfoBatch`: ratio, policy, target_saving, ... Its data
            set, epochs, seed and device are the Trainer's.

    Attributes:
        infobatch: the one of the training under way, or of the last.

    Raises:
        ValueError: the arguments have max_steps, a part of an epoch, a compute_loss_func, or an
            order of the samples.
    """

    infobatch: InfoBatch

    def __init__(self, *args: Any, pruning: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.pruning = dict(pruning or {})
        epochs, steps = self.args.num_train_epochs, self.args.max_steps
        if steps > 0:
            raise ValueError(f"max_steps must be left to num_train_epochs, got {steps}")
        if epochs != math.floor(epochs):
            raise ValueError(f"num_train_epochs must be whole, got {epochs}")
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func must be None, got one: override `losses` instead")
        if (order := self.args.train_sampling_strategy) != "random":
            raise ValueError(f"train_sampling_strategy must be random, got {order}")
        self.add_callback(_Saver(self))

    def losses(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of every label, and which of them count.

        Args:
            outputs: the model's.
            labels: (B,) or (B, T) int64, -100 where nothing is to be learned.

        Returns:
            (B,) or (B, T) losses, with their graph, and as many that are 1 where they count.

        Raises:
            TypeError: the labels are no numbers of classes.
        """
        if labels.is_floating_point():
            raise TypeError(f"labels must be int64, got {labels.dtype}: override `losses`")
        logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
        if self._loss_shifts_labels:  # what a causal language model says of the token to come
            logits, labels = logits[..., :-1, :], labels[..., 1:]
        losses = F.cross_entropy(
            logits.flatten(0, -2).float(),
            labels.flatten(),
            reduction="none",
            ignore_index=IGNORED,
            label_smoothing=self.args.label_smoothing_factor,
        )
        return losses.view_as(labels), labels.ne(IGNORED).float()

    def get_train_dataloader(self) -> DataLoader:
        """Of a new `InfoBatch`; the Trainer asks once a training."""
        dataset: Any = self.train_dataset
        if dataset is None:
            raise ValueError("train_dataset must be given, got None")
        collate, args = self.data_collator, self.args
        if hasattr(dataset, "remove_columns"):  # of datasets, which is optional
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        self.infobatch = InfoBatch(
            len(dataset),
            int(args.num_train_epochs),
            seed=args.seed if args.data_seed is None else args.data_seed,
            device=args.device,
            **self.pruning,
        )
        size, workers = self._train_batch_size, args.dataloader_num_workers
        whole = size * args.gradient_accumulation_steps
        loader = DataLoader(
            self.infobatch.wrap(dataset),
            size,
            sampler=self.infobatch.sampler(whole, args.dataloader_drop_last, shard=False),
            collate_fn=_Flat(collate),
            drop_last=args.dataloader_drop_last,
            num_workers=workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=args.process_index),
        )
        return self.accelerator.prepare(loader)

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """The one of the arguments, driven by progress: epochs that prune have fewer steps."""
        scheduler = super().create_scheduler(num_training_steps, *args, **kwargs)
        if not isinstance(scheduler, (ReduceLROnPlateau, GreedyLR)):  # they go by the evaluations
            scheduler = ProgressLR(scheduler, self.infobatch, num_training_steps)
            self.lr_scheduler = scheduler
        return scheduler

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The rescaled loss of a training batch, whose scores it records; else the Trainer's."""
        if INDICES not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = Batch(inputs.pop(INDICES), inputs.pop(WEIGHTS))
        if "labels" not in inputs:
            raise ValueError(f"a batch must have labels, got {', '.join(inputs)}")
        labels = inputs["labels"]
        if not getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            # (That kind makes its inputs of the labels.) The model would compute its loss, too.
            inputs = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**inputs)
        losses, real = self.losses(outputs, labels)
        self.infobatch.record(per_sample(losses, labels.shape[0], real), batch)
        summed = (losses * real).flatten(1).sum(1) if losses.dim() > 1 else losses * real
        items = real.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        loss = (summed * batch.weights).sum() / items
        # Of this batch alone it is the Trainer that divides by the accumulation steps.
        self.loss_is_scaled_for_ga = num_items_in_batch is not None
        if self.loss_is_scaled_for_ga and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # of which DDP takes the mean
        return (loss, outputs) if return_outputs else loss

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: Any,
        trial: Any,
    ) -> tuple[int, int]:
        # The Trainer would divide its steps by those of the first epoch. The sampler itself goes on
        # behind what a loaded state has had, so that there are no batches to skip.
        super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None:
            return 0, 0
        path = Path(resume_from_checkpoint, STATE)
        if not path.is_file():
            raise ValueError(f"resume_from_checkpoint must hold {STATE}, got {path.parent}")
        self.infobatch.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return self.infobatch.next_epoch, 0

    def _run_epoch(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *, epoch: int, train_dataloader: Any, **kwargs: Any
    ) -> None:
        train_dataloader.set_epoch(epoch)
        share = self.infobatch.share(self._train_batch_size)
        steps = len(train_dataloader) - self.infobatch.resume_at // (
            self._train_batch_size * share.world
        )
        updates = math.ceil(steps / self.args.gradient_accumulation_steps)
        left = self.infobatch.num_epochs - epoch - 1
        self.state.max_steps = self.state.global_step + updates * (1 + left)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.total = self.state.max_steps
        kwargs |= {"steps_in_epoch": steps, "num_update_steps_per_epoch": updates}
        super()._run_epoch(epoch=epoch, train_dataloader=train_dataloader, **kwargs)

    def _finalize_training(self, trial: Any, num_train_samples: float, start_time: float) -> Any:
        # The Trainer would tell the pace of all samples, those left out among them.
        trained = self.state.max_steps * self.get_total_train_batch_size(self.args)
        return super()._finalize_training(trial, trained, start_time)


class InfoBatchTrainer(InfoBatchMixin, Trainer):  # pyright: ignore
    """Hugging Face's Trainer with `pruning`, see `InfoBatchMixin`."""


class _Saver(TrainerCallback):
    """Puts the scores into the checkpoint that was just saved."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        infobatch = self.trainer.infobatch
        infobatch.merge()
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and folder.is_dir():
            torch.save(infobatch.state_dict(), folder / f".{STATE}")
            os.replace(folder / f".{STATE}", folder / STATE)


class _Flat(Collate):
    """The user's batch with two more tensors: the Trainer rebuilds containers of other kinds."""

    def __call__(self, picked: Any) -> Any:
        data, batch = super().__call__(picked)
        return data | {INDICES: batch.indices, WEIGHTS: batch.weights}
