"""A torch DataLoader of any map-style data set, whose batches carry their indices and weights.

The sampler yields picks, (index, weight); the outermost data set unpacks them; the collate gives
`(the user's batch, Batch)`. Workers hold no state, so that no look-ahead, sharding or reordering
can mispair a sample and its weight.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    default_collate,
)

from infobatch_fast.infobatch import InfoBatch
from infobatch_fast.plan import Batch, Plan, check_count
from infobatch_fast.ranks import Share, gathered, summed

CHUNK = 65_536  # picks brought to the host at once: the whole list of 1e9 would not fit


Pick = tuple[int, float]


@dataclass
class Picked:
    """A batch of the user's samples with the picks that they were fetched by, taken apart."""

    samples: Sequence[Any]
    numbers: Sequence[int]
    weights: Sequence[float]

    def __getitem__(self, index: int) -> Any:  # which any other collate function begins with
        raise TypeError(
            "collate_fn of the DataLoader must be infobatch.collate(), or .collate(your function)"
        )


class PickedDataset(Dataset):
    """The outermost data set: takes picks, fetches by their indices, and hands both on.

    It is asked for a whole batch at once, and asks the wrapped one so if that can (as Arrow tables
    do). Everything else is the wrapped data set's own (`dataset.classes`, `dataset[0]`, ...).
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, pick: Any) -> Any:
        return self.__getitems__([pick]) if isinstance(pick, tuple) else self.dataset[pick]

    def __getitems__(self, picks: Sequence[Pick]) -> Picked:
        if not isinstance(picks[0], tuple):
            raise TypeError(
                f"a pick of infobatch.sampler() must come to the wrapped data set, got {picks[0]}: "
                "wrap it last, and give the DataLoader that sampler"
            )
        dataset = self.dataset
        numbers, weights = [number for number, _ in picks], [weight for _, weight in picks]
        if hasattr(dataset, "__getitems__"):
            samples = dataset.__getitems__(numbers)
        else:
            samples = [dataset[number] for number in numbers]
        return Picked(samples, numbers, weights)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":  # while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "dataset":
            super().__setattr__(name, value)
        else:  # `loader.dataset.transform = ...`, which would be lost on this one
            setattr(self.dataset, name, value)


class Collate:
    """Turns picked samples into `(collate(samples), Batch)`; the batch's tensors are on the CPU."""

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, picked: Any) -> tuple[Any, Batch]:
        """The user's batch of a `Picked`, and what `InfoBatch.update` must know of it."""
        # By way of numpy, which takes a third of the time.
        numbers = torch.from_numpy(np.array(picked.numbers, np.int64))
        weights = torch.from_numpy(np.array(picked.weights, np.float32))
        return self.collate(list(picked.samples)), Batch(numbers, weights)


class Sampler(DistributedSampler):
    """The epochs of an `InfoBatch`, one after the other, as picks.

    A plan is drawn at the first `len()` or `iter()` of its epoch, and stays. Which epoch that is
    `set_epoch` says, unless that one is over, as for what counts from 0 again after a resumption.
    Without it an `iter()` begins the next one where `update` was called since the last, and gives
    the same one again where it was not, as after a peek. A loaded state's epoch
    goes on with what was not trained on yet. `len()` is of the next epoch once a `Loader` has ended
    one; in a DataLoader built by hand, once the next has begun. (A `DistributedSampler`, because
    Lightning and Ray put one of their own in the place of others.)

    Of several processes each gets its own share, equally many batches of it: go through it on all.
    Before an epoch's first batch they compare their plans.

    Args:
        infobatch: whose plans they are.
        batch_size: B, of the DataLoader: pruned epochs are then of whole batches.
        drop_last: of the DataLoader: an epoch's plan is then cut to whole batches of all ranks.
        shard: False gives every process the whole epoch, for what shares batches out by itself,
            the r-th of every W to rank r.
    """

    def __init__(
        self,
        infobatch: InfoBatch,
        batch_size: int | None = None,
        drop_last: bool = False,
        shard: bool = True,
    ) -> None:
        numbers: Any = range(infobatch.num_samples)
        super().__init__(numbers, num_replicas=1, rank=0)
        self.infobatch, self.batch_size, self.drop_last = infobatch, batch_size, drop_last
        self.shard = shard
        self._set: int | None = None  # the epoch that was asked for, until it is iterated over
        self._last: _Picks | None = None
        self._recorded = 0  # samples recorded when that began
        self._told = False

    def set_epoch(self, epoch: int) -> None:
        """Make `epoch` the one that is given next."""
        self._set = self.epoch = epoch

    def __len__(self) -> int:
        plan = self.plan()
        # A loop that looks ahead sees the loader's end before the last batch has its losses.
        ended = self.infobatch.ended is plan or self._last is None
        over = ended and self._done(plan) and self._asked() is None
        if over and plan.epoch + 1 < self.infobatch.num_epochs:
            plan = self._draw(plan.epoch + 1)
        return self.share().own(len(plan))

    def __iter__(self) -> Iterator[Pick]:
        plan, last = self.plan(), self._last
        again = last is not None and last.plan is plan
        # A new sampler goes on with a loaded state's epoch, not with one that another had begun.
        begun = self._recorded if again else self.infobatch.resume_at
        if self._asked() is None and (self._done(plan) or self.infobatch.recorded > begun):
            if not self._done(plan) and self.infobatch.ended is not plan and not self._told:
                self._told = True
                warnings.warn(
                    f"epoch {plan.epoch} is left after {self.infobatch.recorded} of {len(plan)} "
                    "samples, and the next begins; to look at a batch in between, go to the data "
                    "set, or call sampler.set_epoch first",
                    stacklevel=2,
                )
            plan = self._draw(plan.epoch + 1)
        elif again and last is not None and last.given == len(last.part) and not plan.epoch:
            warnings.warn(
                "the first epoch is given again, as update() was not called since it was drawn: "
                "without it no sample gets a score, and nothing is pruned",
                stacklevel=2,
            )
        self._set, self.epoch, self._recorded = None, plan.epoch, self.infobatch.recorded
        share = self.share()
        if share.world > 1:
            _shared_once()
        self.infobatch.compare()
        self._last = _Picks(plan, share, self.infobatch.resume_at)
        return self._last

    def share(self) -> Share:
        """What the sampler gives of a plan."""
        share = self.infobatch.share(self.batch_size)
        return share if self.shard else Share()

    def plan(self) -> Plan:
        """The epoch under way, or the one to come before any was drawn."""
        plan, epoch = self.infobatch.plan, self._asked()
        if epoch is None:
            # Of a run that was loaded complete it is the last, which is not to be trained on.
            coming = min(self.infobatch.next_epoch, self.infobatch.num_epochs - 1)
            epoch = coming if plan is None else plan.epoch
        if plan is None or plan.epoch != epoch:
            return self._draw(epoch)
        return self._whole(plan)

    def _asked(self) -> int | None:
        """The epoch that was set, if it is not over."""
        plan = self.infobatch.plan
        least = self.infobatch.next_epoch if plan is None else plan.epoch + self._done(plan)
        return self._set if self._set is not None and self._set >= least else None

    def _draw(self, epoch: int) -> Plan:
        if epoch == (passes := self.infobatch.num_epochs):
            raise ValueError(
                f"num_epochs must be the number of passes over the loader, got {passes} and one "
                "pass more; what counts an epoch's batches must ask for len(loader) in each"
            )
        return self._whole(self.infobatch.sample(epoch, self.batch_size))

    def _whole(self, plan: Plan) -> Plan:
        """The InfoBatch's plan, from now on without the samples that `drop_last` drops."""
        if not (self.drop_last and self.batch_size):
            return plan
        step = self.batch_size * self.infobatch.share(self.batch_size).world
        if len(plan) < step:
            raise ValueError(
                f"batch_size of all ranks must be at most the {len(plan)} samples of epoch "
                f"{plan.epoch} where drop_last is True, got {step}"
            )
        if rest := (len(plan) - self.infobatch.resume_at) % step:
            kept = plan.batch(0, len(plan) - rest)
            plan = replace(plan, indices=kept.indices, weights=kept.weights)
            self.infobatch.plan = plan
        return plan

    def _done(self, plan: Plan) -> bool:
        return self.infobatch.recorded >= len(plan)


def _shared_once() -> None:
    """Raise ValueError where accelerate shares out what is a share: half would go untrained."""
    frame = sys._getframe(2)
    while frame is not None:
        asking: Any = frame.f_locals.get("self")
        if isinstance(asking, BatchSampler) and getattr(asking, "num_processes", 1) > 1:
            raise ValueError("shard must be False where accelerate shares batches out, got True")
        frame = frame.f_back


class _Picks(Iterator[Pick]):
    """A plan's picks from a position on; what it says of itself resumes a stateful loader."""

    def __init__(self, plan: Plan, share: Share, start: int) -> None:
        self.plan, self.share, self.start = plan, share, start
        self.part = share.of(plan, start)
        self.given = 0  # of the part
        self._chunk: list[Pick] = []
        self._ends = 0  # of the chunk

    def __next__(self) -> Pick:
        if self.given >= self._ends:
            if self.given >= len(self.part):
                raise StopIteration
            self._ends = min(self.given + CHUNK, len(self.part))
            batch = self.part.batch(self.given, self._ends)
            # The host needs the indices to fetch by: it waits for them, once a chunk.
            picks = zip(batch.indices.tolist(), batch.weights.tolist(), strict=True)
            self._chunk = [*picks][::-1]
        self.given += 1
        return self._chunk.pop()

    def state_dict(self) -> dict[str, int]:
        reached = self.start + self.share.reached(len(self.plan) - self.start, self.given)
        if reached == len(self.plan):  # the InfoBatch's, of the same moment, is of the next epoch
            return {"epoch": self.plan.epoch + 1, "position": 0}
        return {"epoch": self.plan.epoch, "position": reached}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        if state["epoch"] != self.plan.epoch:
            raise ValueError(
                f"epoch of the loader's state must be that of the InfoBatch's, {self.plan.epoch}, "
                f"got {state['epoch']}: load the InfoBatch's first"
            )
        self.given = self._ends = (state["position"] - self.start) // self.share.world


class Loader(DataLoader):
    """A DataLoader that tells its `Sampler` when an epoch was given to its end."""

    def __iter__(self) -> Any:
        sampler: Any = self.sampler
        check_data(sampler.infobatch, self.dataset)  # it may have grown
        return self._until_the_end(super().__iter__())

    def _until_the_end(self, batches: Any) -> Iterator[Any]:
        yield from batches
        sampler: Any = self.sampler
        sampler.infobatch.ended = sampler._last.plan
        sampler.infobatch.merge()


def wrap(infobatch: InfoBatch, dataset: Any) -> PickedDataset:
    """See `InfoBatch.wrap`."""
    map_style = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    if not map_style or isinstance(dataset, IterableDataset):
        kind = type(dataset).__name__
        raise TypeError(f"dataset must be map-style, with __getitem__ and __len__, got {kind}")
    check_data(infobatch, dataset)
    return PickedDataset(dataset)


def check_data(infobatch: InfoBatch, dataset: Any) -> None:
    """Raise ValueError unless the data set has the samples of the InfoBatch."""
    if len(dataset) != infobatch.num_samples:
        raise ValueError(
            f"dataset must have the {infobatch.num_samples} samples of the InfoBatch, "
            f"got {len(dataset)}"
        )


def loader(
    infobatch: InfoBatch,
    dataset: Any,
    batch_size: int,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    shard: bool = True,
    **arguments: Any,
) -> DataLoader:
    """See `InfoBatch.loader`."""
    check_count("batch_size", batch_size)
    taken = {"sampler", "batch_sampler", "shuffle"} & arguments.keys()
    if taken:
        raise ValueError(f"{min(taken)} must be left to the InfoBatch, which draws the order")
    return Loader(
        wrap(infobatch, dataset),
        batch_size,
        sampler=Sampler(infobatch, batch_size, arguments.get("drop_last", False), shard),
        collate_fn=Collate(collate_fn or default_collate),
        **arguments,
    )


def sampler_of(loader: Any) -> Sampler | None:
    """The `Sampler` of a DataLoader, its own or its batch sampler's; None where there is none."""
    for each in (loader, getattr(loader, "batch_sampler", None)):
        if isinstance(sampler := getattr(each, "sampler", None), Sampler):
            return sampler
    return None


def check(infobatch: InfoBatch, loader: Any) -> str:
    """See `InfoBatch.check`."""
    sampler = sampler_of(loader)
    if sampler is None:
        got = getattr(loader, "sampler", None)
        raise ValueError(f"sampler of the loader must be infobatch.sampler(), got {got!r}")
    if sampler.infobatch is not infobatch:
        raise ValueError("loader must be of this InfoBatch, got another's")
    if not isinstance(data := getattr(loader, "dataset", None), PickedDataset):
        kind = type(data).__name__
        raise ValueError(f"dataset of the loader must be infobatch.wrap(dataset), got {kind}")
    # The user's default dtype and device may be others.
    weights, count = torch.zeros(infobatch.num_samples, dtype=torch.float32, device="cpu"), 0
    times = torch.zeros_like(weights, dtype=torch.int64)
    for item in loader:
        if not (isinstance(item, Sequence) and len(item) == 2 and isinstance(item[1], Batch)):
            raise ValueError(
                "collate_fn must give (the user's batch, Batch): use infobatch.collate(fn), "
                f"got {type(item).__name__}"
            )
        if not count:  # an epoch that was over is followed by the next
            plan = sampler.plan()
            weights[plan.indices.cpu()] = plan.weights.cpu()
        indices, given = (tensor.cpu() for tensor in item[1])
        times.index_add_(0, indices, torch.ones_like(indices))
        if not torch.equal(given, weights[indices]):
            raise ValueError(f"weights of batch {count} are not those of the plan")
        count += 1
    sampler._last = infobatch.ended = None  # nothing was trained on, and nothing is missed
    share = sampler.share()
    if share.world > 1:
        times = summed(times, infobatch.group)
        counts = gathered(torch.tensor(count), infobatch.group)
        if len(set(counts)) > 1:
            raise ValueError(f"batches of all ranks must be equally many, got {counts}")
    if times.max() > 1:
        raise ValueError(f"sample {int(times.argmax())} must come once, got {int(times.max())}")
    size = sampler.batch_size or getattr(loader, "batch_size", None) or 1
    # Less what was trained on before a state was saved.
    length = len(loader) - infobatch.resume_at // (size * share.world)
    if count != length:
        raise ValueError(f"len of the loader must be the {count} batches that came, got {length}")
    where = f" on each of {share.world} ranks, of one plan" if share.world > 1 else ""
    number = int(times.sum())
    return f"{number} of {infobatch.num_samples} samples, each once, in {count} batches{where}"
