"""The original package's three calls, on today's PyTorch: `InfoBatch`, `.sampler`, `.update`."""

import sys
import weakref
from collections.abc import Iterator, Mapping
from multiprocessing.context import get_spawning_popen
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset

from infobatch_fast import infobatch
from infobatch_fast.adapters import sampler
from infobatch_fast.budget import Budget
from infobatch_fast.kernels import reference
from infobatch_fast.plan import Batch, Plan

HINT = (
    "every batch must be updated once, in the order of the loader; where that cannot be, take "
    "`for data, batch in dataset.loader(batch_size, ...)` and `dataset.update(loss, batch)`"
)


class InfoBatch(Dataset):
    """A data set whose `sampler` prunes: the original package's class, as a drop-in.

    Three lines change in a training loop, as they do with the original:

        dataset = InfoBatch(dataset, num_epochs, prune_ratio, delta)
        loader = DataLoader(dataset, batch_size, sampler=dataset.sampler, num_workers=8)
        loss = dataset.update(criterion(model(x), y))  # with reduction="none"

    Batches queue as the loader hands them out, however far it looks ahead, and a loss belongs to
    the oldest without one. So every batch must be updated once, in the loader's order. A batch that
    was left out or given twice is an error, at the next epoch's beginning at the latest, and so is
    a loader with `in_order=False`. (Two batches of one size that the loop itself exchanges go
    unseen: nothing tells their losses apart.) `loader` and `update(loss, batch)` need no order.

    From the same scores it leaves out the samples that the original leaves out in that epoch, and
    orders the rest alike. What differs:

    - PyTorch's DataLoader is not patched, and numpy's global generator neither read nor seeded.
      `seed` gives other lots; with 0 they are the original's.
    - `dataset[i]` is the sample, not a pair with its number. Samples of any type will do.
    - An epoch is a pass with updates: a peek, or a pass without, does not count as one. The
      original counts calls of `iter`, of which today's PyTorch makes one a batch.
    - `len(loader)` before an epoch is that epoch's, and after it the next one's; with persistent
      workers it is an epoch's once that has begun.
    - A kept well-learned sample weighs n/k, the exact ratio, not 1/(1 - prune_ratio), and at least
      one is kept. All weights are 1 once annealing begins, whatever num_epochs * delta is.
    - A sample not seen yet, or whose loss was not finite, has the score NaN, is kept, and takes no
      part in the mean, which is of float64. The original begins at 3, and adds up in float32.
    - A prune_ratio of more than 0.9 is taken as it is, one outside [0, 1) refused.
    - `update` leaves its argument as it is, takes all that the library's `update` takes (half and
      double precision, (B, 1), (B, T)), and records where the scores live, on `device`.
    - `state_dict` and `load_state_dict` are new; `prune`, `no_prune`, `reset_weights`,
      `set_active_indices`, `get_weights` and `mean_score` are gone.

    Everything else is the wrapped data set's own (`dataset.classes`, ...).

    Args:
        dataset: any map-style one, of N samples.
        num_epochs: length of the whole training, which annealing is counted from.
        prune_ratio: the share of the well-learned samples that an epoch leaves out.
        delta: the share of the epochs that prune.
        seed: of the lots.
        device: where the scores live; None is CUDA where there is one.

    Raises:
        TypeError, ValueError: dataset has no length, or another argument is out of range.
    """

    def __init__(
        self,
        dataset: Any,
        num_epochs: int,
        prune_ratio: float = 0.5,
        delta: float = 0.875,
        *,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        self.dataset = dataset
        self.infobatch = _Drawn(len(dataset), num_epochs, prune_ratio, delta, seed, device)
        self.sampler = Sampler(self.infobatch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]

    def __getattr__(self, name: str) -> Any:
        own = name in ("dataset", "infobatch", "sampler")  # while it is copied or unpickled
        if own or (name.startswith("__") and name != "__getitems__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getstate__(self) -> dict[str, Any]:
        # A spawned worker fetches samples: the scores stay, which may be on a GPU.
        return self.__dict__ if get_spawning_popen() is None else {"dataset": self.dataset}

    @property
    def scores(self) -> Tensor:
        """(N,) float32, the last loss of each sample; NaN where there is none."""
        return self.infobatch.scores

    @property
    def weights(self) -> Tensor:
        """(N,) float32, by which the losses of the last epoch drawn are weighted."""
        weights, plan = torch.ones_like(self.scores), self.infobatch.plan
        return weights if plan is None else weights.index_copy_(0, plan.indices, plan.weights)

    def get_pruned_count(self) -> int:
        """How many samples the epochs drawn so far left out, in all."""
        return self.infobatch.pruned

    def update(self, loss: Tensor, batch: Batch | None = None) -> Tensor:
        """Record a batch's losses as scores and return the loss to differentiate, ().

        Args:
            loss: (B,), one value a sample, before any reduction; see the library's `update`.
            batch: the one that came with the samples from `loader`; None is the oldest batch of
                the sampler's that has no loss yet.

        Raises:
            TypeError, ValueError: no losses one a sample, or not those of the oldest batch.
        """
        if batch is not None:
            return self.infobatch.update(loss, batch)
        batch = self.sampler.oldest(loss)
        rescaled = self.infobatch.update(loss, batch)
        self.sampler.updated += len(batch.indices)
        return rescaled

    def loader(self, batch_size: int, **arguments: Any) -> DataLoader:
        """A DataLoader whose batches bring their numbers and weights: `(data, batch)`.

        Takes the arguments of a DataLoader; see the library's `InfoBatch.loader`.
        """
        return self.infobatch.loader(self.dataset, batch_size, **arguments)

    def state_dict(self) -> dict[str, Any]:
        """The scores and the epoch under way, see the library's `InfoBatch.state_dict`."""
        return self.infobatch.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of `state_dict()`."""
        self.infobatch.load_state_dict(state)


class _Drawn(infobatch.InfoBatch):
    """Epochs drawn by the lots of numpy's that the original draws."""

    @property
    def pruned(self) -> int:
        return self._after.saved

    def _draw(
        self, epoch: int, budget: Budget, batch_size: int | None
    ) -> tuple[Plan, Mapping[str, Tensor]]:
        well = reference.well_learned(self.scores).cpu().numpy()  # the epoch's one host sync
        n = int(well.sum())
        if n == 0:
            return super()._draw(epoch, budget, batch_size)
        k = max(1, int(budget.kept(n)))
        lots = np.random.RandomState((self.seed * 1_000_003 + epoch + 1) % (1 << 32))
        kept = lots.choice(np.flatnonzero(well), k, replace=False)
        order = np.concatenate([np.flatnonzero(~well), kept])
        lots.shuffle(order)
        weights = np.where(well[order], n / k, 1).astype(np.float32)
        indices, loss_weights = (
            torch.from_numpy(each).to(self.scores.device) for each in (order, weights)
        )
        return Plan(epoch, self.num_samples, n, indices, loss_weights, budget.ratio), {}


class Sampler(sampler.Sampler):
    """The epochs as plain numbers, and a queue of the batches that were handed out."""

    def __init__(self, infobatch: infobatch.InfoBatch) -> None:
        super().__init__(infobatch)
        self.updated = 0  # samples of the pass under way
        self._least = 0  # samples waiting at an update, at the fewest
        self._late: int | None = None  # the batch from which on more were always waiting
        self._ahead = 0  # the batch at whose update the loader had come to the epoch's end

    def __iter__(self) -> Iterator[Any]:
        self._check()
        asking = self._look_up()
        picks: Any = super().__iter__()
        if asking is not None:
            weakref.finalize(asking, self._let_go, picks).atexit = False
        self.updated = 0
        self._least, self._late, self._ahead = len(picks.plan), None, 0
        return (number for number, _ in picks)

    def __len__(self) -> int:
        self._look_up()
        return super().__len__()

    def oldest(self, loss: Tensor) -> Batch:
        """The batch handed out longest ago of those without a loss."""
        picks, size = self._last, self.batch_size
        waiting = 0 if picks is None else picks.given - self.updated
        if picks is None or size is None or waiting <= 0:
            raise ValueError(
                "loss must be of a batch that a DataLoader with dataset.sampler gave, "
                f"got one more than it gave: {HINT}"
            )
        plan, number = picks.part, self.updated // size
        due = min(size, len(plan) - self.updated)
        if isinstance(loss, Tensor) and loss.dim() and len(loss) != due:
            raise ValueError(
                f"loss must hold the {due} values of batch {number} of epoch {plan.epoch}, the "
                f"oldest without a loss, got {len(loss)}; {self._where(plan, size)}"
            )
        if picks.given < len(plan):
            self._ahead = number + 1
            if waiting <= self._least:
                self._least, self._late = waiting, None
            elif self._late is None:
                self._late = number
        return plan.batch(self.updated, self.updated + due)

    def _let_go(self, picks: Any) -> None:
        """A loop that lets go of its loader's iterator is over, if that had come to the end."""
        if picks.given == len(picks.part):
            self.infobatch.ended = picks.plan

    def _check(self) -> None:
        """Whether all batches that the pass before handed out have got their losses."""
        picks, size = self._last, self.batch_size
        if picks is None or size is None or not self.updated:
            return  # nothing was, or it was a look
        if picks.plan is not self.infobatch.plan:
            return  # a state was loaded since
        plan = picks.part
        if self.updated < picks.given == len(plan):  # else told by `super().__iter__`
            raise ValueError(
                f"loss of epoch {plan.epoch} must come for its {len(plan)} samples, "
                f"got {self.updated}; {self._where(plan, size)}"
            )

    def _where(self, plan: Plan, size: int) -> str:
        """Which batch has no loss, as far as it can be known, and what to do."""
        where = (
            f"the first left out is batch 0 or one of {self._ahead} to {(len(plan) - 1) // size}"
        )
        if self._late is not None:
            where = f"from batch {self._late} on they were taken for other samples'"
        return f"{where}: {HINT}"

    def _look_up(self) -> Any:
        """The loader's iterator that asks for an epoch, of which torch tells a sampler nothing."""
        frame = sys._getframe(2)
        while frame is not None:
            asking = frame.f_locals.get("self")
            if isinstance(asking, BatchSampler) and asking.sampler is self:
                self.batch_size, self.drop_last = asking.batch_size, asking.drop_last
            elif hasattr(asking, "_sampler_iter"):
                if getattr(asking, "_in_order", True):
                    return asking
                raise ValueError(f"in_order of the DataLoader must be True, got False: {HINT}")
            frame = frame.f_back
        return None
