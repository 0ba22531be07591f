"""InfoBatch: the score of every sample, each epoch's plan drawn from it, and the rescaled loss.

Unbiased dynamic data pruning (Qin et al., ICLR 2024, arXiv:2303.04947), its state on the device.
Dimensions: N samples, n prunable, k of those kept, K kept in all, B batch, T loss terms a sample.
"""

import operator
import os
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from infobatch_fast.budget import MOST_WEIGHTED, SCHEDULES, Budget, scheduled_ratio, to_save
from infobatch_fast.drawing import choice_of, draw, draw_all, expect, key_of
from infobatch_fast.errors import reason
from infobatch_fast.kernels import reference
from infobatch_fast.kernels.select import triton_kernels
from infobatch_fast.plan import Batch, Plan, batch_of, check_count, per_sample
from infobatch_fast.policies import SCORES, History, View, find, find_schedule
from infobatch_fast.pruning import Pruning
from infobatch_fast.ranks import Share, compare, merge, place

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.utils.data import DataLoader

STATE_VERSION = 4


class _Past(NamedTuple):
    """What an epoch is drawn from besides the scores."""

    memory: Mapping[str, Tensor]
    history: History | None  # for policies that ask for it
    saved: int  # samples left out so far


class InfoBatch:
    """Scores of N samples, and the epochs drawn from them.

    Args:
        num_samples: N, the size of the data set.
        num_epochs: length of the whole training, which annealing is counted from.
        seed: with the epoch, the one source of randomness; torch's global generators are neither
            read nor seeded.
        device: where the scores live and the plans are drawn; None is CUDA where there is one, of
            torchrun's processes each one's own.
        ratio, delta, policy, rescale, anneal, score, ratio_schedule, target_saving: see `Pruning`.
            A schedule may be a function, too, see `budget.Schedule`. A policy that remembers has
            its epochs drawn in their order. With a target, what an epoch cannot save falls to the
            later ones; see `most_saving`.
        protect: (N,) bool, samples that no epoch leaves out (a rare class, say); not in the state.
        labels: (N,) int64, for a policy of one's own that looks at them; not in the state.
        group: the data-parallel ranks among several processes of torch.distributed's; None is its
            default group, if there is one when an epoch is drawn.

    Of several processes each has an InfoBatch of its own, of equal arguments. All draw the same
    plan and train on a share of it each; `merge` brings the scores together.

    Raises:
        ValueError: an argument is out of range; the message names it.
        TypeError: the policy's entry in `POLICIES` is no `Policy`.

    Example:
        >>> infobatch = InfoBatch(num_samples=8, num_epochs=4, device="cpu")
        >>> plan = infobatch.sample(0)
        >>> for batch in plan.batches(4):
        ...     losses = torch.rand(4, requires_grad=True)
        ...     infobatch.update(losses, batch).backward()
    """

    def __init__(
        self,
        num_samples: int,
        num_epochs: int,
        ratio: float = 0.5,
        delta: float = 0.875,
        seed: int = 0,
        device: torch.device | str | None = None,
        *,
        policy: str = "soft",
        rescale: bool = True,
        anneal: bool = True,
        score: str = "loss",
        ratio_schedule: str | Callable[[float, int, int], float] = "constant",
        target_saving: float | None = None,
        protect: Tensor | None = None,
        labels: Tensor | None = None,
        group: "ProcessGroup | None" = None,
    ) -> None:
        check_count("num_samples", num_samples)
        check_count("num_epochs", num_epochs)
        self._schedule = by = find_schedule(ratio_schedule)
        self.pruning = Pruning(policy, ratio, delta, rescale, anneal, score, by.name, target_saving)
        self.num_samples, self.num_epochs, self.seed = (
            int(num_samples),
            int(num_epochs),
            operator.index(seed),
        )
        self.first_full_epoch = self.pruning.first_full_epoch(self.num_epochs)
        self._tail = Pruning(delta=delta).first_full_epoch(self.num_epochs)  # though not annealed
        self._policy = find(policy)
        self._past = self._after = _Past({}, None, 0)
        if by.name not in SCHEDULES:
            for epoch in range(self.num_epochs if target_saving is None else 2):
                self._budget(epoch)  # a schedule that gives no ratio is refused now
        if device is None:
            device = _default_device()
        if torch.device(device).type == "mps":
            raise ValueError("device must be cpu beside a network on mps, which has no float64")
        self.scores = torch.full((self.num_samples,), torch.nan, dtype=torch.float32, device=device)
        self._protected = self._of_all("protect", protect, torch.bool)
        self._labels = self._of_all("labels", labels, torch.int64)
        triton_kernels(self.scores.device)  # proven now, not in the first epoch
        self._epoch: int | None = None  # the last drawn: from `_past`, and `_after` it
        self.asked = 0.0  # samples that a target asked the last epoch drawn to leave out
        self.plan: Plan | None = None  # the last drawn
        self.recorded = 0  # samples whose losses came since, as the host knows it
        self.resume_at = 0  # of these, how many a loaded state had
        self.ended: Plan | None = None  # the last that a loader gave to its end
        self._told = False  # that one plan served several passes
        self.group = group
        self._share = Share()  # this process's, of an epoch
        self._mine: Tensor | None = None  # (N,) bool, of several processes: recorded here
        self._unmerged = False  # whether any was since the last merge
        self._compared: Plan | None = None  # the last that all ranks are known to have

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings().items())
        return f"InfoBatch({settings}, device={str(self.scores.device)!r})"

    def sample(self, epoch: int, batch_size: int | None = None) -> Plan:
        """Draw an epoch from the scores as they are now; the same call gives the same plan.

        An epoch that is under way, some of its losses being recorded, is not drawn anew.

        Costs one host sync in an epoch that may prune (to learn n, hence K), the first included,
        and none in the full ones at the end.

        Args:
            epoch: in [0, num_epochs).
            batch_size: B. Given, k is the count nearest to (1 - ratio) n that makes K a multiple of
                B, where there is one; None keeps exactly max(1, round((1 - ratio) n)). The weight
                n/k is exact either way. Of several processes it is each one's: K is a multiple of
                B times their number, and the next epoch's plan is drawn by all (collective).

        Raises:
            TypeError, ValueError: epoch or batch_size is out of range, or the policy gave something
                else than a `Choice` of (N,) tensors.
            RuntimeError: several processes were started, and have no group yet.
        """
        epoch = operator.index(epoch)
        if not 0 <= epoch < self.num_epochs:
            raise ValueError(f"epoch must be in [0, {self.num_epochs}), got {epoch}")
        world = self.share(batch_size).world
        whole = None if batch_size is None else batch_size * world
        if epoch == self._epoch and self.plan is not None and self.recorded:
            return self.plan
        if epoch != self._epoch:
            self.merge()
            self._past, self._epoch = self._after, epoch
        budget = self._budget(epoch)
        self.asked = budget.number or 0.0
        if budget.prunes and self.pruning.policy != "none":
            plan, memory = self._draw(epoch, budget, whole)
            last = None if self.recorded else self.plan
            if not plan.num_prunable and last is not None and last.epoch < epoch:
                warnings.warn(
                    f"epoch {epoch} leaves out nothing: update() was not called since epoch "
                    f"{last.epoch} was drawn, and no sample has a score",
                    stacklevel=2,
                )
        else:
            view, memory = self._view(epoch, budget), self._past.memory
            plan = draw_all(view, triton_kernels(self.scores.device))
            if self._policy.memory:
                memory = choice_of(view, self.pruning.policy, self._policy).memory
        saved = self._past.saved + self.num_samples - len(plan)
        self._after = _Past(memory, self._history_with(plan), saved)
        self.plan, self.recorded, self.resume_at = plan, 0, 0
        return plan

    @property
    def next_epoch(self) -> int:
        """The epoch under way, or the one to be drawn next."""
        if self._epoch is None:
            return 0
        under_way = self.plan is not None and self.recorded < len(self.plan)
        return self._epoch if under_way else self._epoch + 1

    @property
    def progress(self) -> float:
        """How far the run is, in [0, 1], by epochs and the samples recorded within one."""
        if self.plan is None:
            return self.next_epoch / self.num_epochs
        return (self.plan.epoch + min(1.0, self.recorded / len(self.plan))) / self.num_epochs

    @property
    def most_saving(self) -> float:
        """An upper bound of the share that a target can save: all epochs but the full ones.

        The first is full, having no scores. Where kept samples are weighted by n/k, nine in ten
        are left out at most. How near a run comes depends on the policy, too: soft can leave out
        samples below the mean alone.
        """
        return self.most_ratio * max(0, self.first_full_epoch - 1) / self.num_epochs

    @property
    def most_ratio(self) -> float:
        """The most that a target leaves out of an epoch's prunable samples."""
        return MOST_WEIGHTED if self.pruning.rescale and self._policy.unbiased else 1.0

    def _budget(self, epoch: int) -> Budget:
        if epoch >= self.first_full_epoch:
            return Budget(0.0)
        pruning = self.pruning
        schedule = self._schedule, epoch, self.first_full_epoch
        if pruning.target_saving is None:
            return Budget(scheduled_ratio(pruning.ratio, *schedule))
        left = pruning.target_saving * self.num_samples * self.num_epochs - self._past.saved
        return Budget(0.0, to_save(left, self.num_samples, *schedule), self.most_ratio)

    def _view(self, epoch: int, budget: Budget) -> View:
        past, key = self._past, key_of(self.seed, epoch)
        return View(
            self.scores, epoch, self._tail, budget, key, past.history, self._labels, past.memory
        )

    def _history_with(self, plan: Plan) -> History | None:
        if not self._policy.history:
            return None
        if self._past.history is None:
            times = torch.zeros_like(self.scores, dtype=torch.int32)
            latest = times - 1
        else:
            times, latest = self._past.history.times, self._past.history.latest
        order = plan.indices
        once = torch.ones_like(order, dtype=torch.int32)
        return History(
            order, times.index_add(0, order, once), latest.index_fill(0, order, plan.epoch)
        )

    def _draw(
        self, epoch: int, budget: Budget, batch_size: int | None
    ) -> tuple[Plan, Mapping[str, Tensor]]:
        view, kernels = self._view(epoch, budget), triton_kernels(self.scores.device)
        return draw(view, self.pruning, self._policy, kernels, self._protected, batch_size)

    def _of_all(self, name: str, given: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if given is not None:
            given = torch.as_tensor(given, device=self.scores.device)
            expect(name, given, dtype, self.num_samples)
        return given

    def update(
        self,
        losses: Tensor,
        batch: Batch,
        scores: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Record a batch's losses as scores and return the loss to differentiate. No host sync.

        Args:
            losses: one loss a sample, before any reduction: (B,), (B, 1), or (B, T), which is
                averaged over T; any floating dtype. Where scores are of batches (bls) it may be
                the batch's mean, ().
            batch: the batch that came with the samples.
            scores: (B,), what the samples are judged by, where that is not the loss.
            mask: (B, T), what counts of the T losses of a sample: real tokens, no padding.

        Returns:
            () mean of weight * loss; float64 for float64 losses, float32 otherwise.

        Raises:
            TypeError: the losses are no floating tensor, or the batch is none.
            ValueError: the losses are not one a sample.
        """
        if is_dynamo_compiling():
            return _outside(self.update, losses, batch, scores, mask)
        batch = batch_of(batch)
        size = batch.indices.numel()
        if self.pruning.score != "loss" and isinstance(losses, Tensor) and losses.dim() == 0:
            losses = losses.expand(size)
        losses = per_sample(losses, size, mask)
        if self.plan is not None and self.recorded >= 1.5 * len(self.plan) and not self._told:
            self._told = True
            warnings.warn(
                f"losses of two passes came since epoch {self.plan.epoch} was drawn: call update "
                "once for each batch, and sample(epoch), if you call it, before each epoch",
                stacklevel=2,
            )
        self.record(losses if scores is None else per_sample(scores, size, name="scores"), batch)
        return reference.rescaled_mean(losses, _onto(batch.weights, losses.device))

    def record(self, losses: Tensor, batch: Batch, found_inf: Tensor | None = None) -> None:
        """The half of `update` that writes the scores; where found_inf (1,) is not 0 they stay."""
        if is_dynamo_compiling():
            return _outside(self.record, losses, batch, found_inf)
        scores, size = self.scores, batch.indices.numel()
        device = scores.device
        losses, indices = _onto(per_sample(losses, size), device), _onto(batch.indices, device)
        if self.pruning.score != "loss":
            before = scores.index_select(0, indices)
            losses = SCORES[self.pruning.score](before, losses.detach())
        if (kernels := triton_kernels(device)) is None:
            reference.record(scores, indices, losses, found_inf)
        else:
            kernels.record(scores, indices.contiguous(), losses.contiguous(), found_inf)
        if self._mine is not None:
            self._mine.index_fill_(0, indices, True)
        self.count(size)

    def count(self, new: int) -> None:
        """The host's half of `record`, for new samples of which a CUDA graph replays the rest."""
        world = self._share.world
        self._unmerged = world > 1
        if self.plan is None or world == 1:
            self.recorded += new
            return
        own = (self.recorded - self.resume_at) // world + new
        reached = self._share.reached(len(self.plan) - self.resume_at, own)
        self.recorded = self.resume_at + reached

    def share(self, batch_size: int | None) -> Share:
        """What is this process's of an epoch in batches of B: all of it where there is one.

        Raises:
            ValueError: there are several, and batch_size is None.
            RuntimeError: they have no group yet.
        """
        if batch_size is not None:
            check_count("batch_size", batch_size)
        rank, world = place(self.group)
        if world > 1 and batch_size is None:
            raise ValueError(f"batch_size must be given where {world} processes share an epoch")
        if world > 1 and self._mine is None:
            self._mine = torch.zeros_like(self.scores, dtype=torch.bool)
        self._share = Share(rank, world, batch_size or 1)
        return self._share

    def merge(self) -> None:
        """Bring the scores of several processes together: each then has what any recorded.

        Collective: call it on every rank. A `loader` calls it at its end, and drawing the next
        epoch does; before a `state_dict()` in the middle of one it is yours to call. Nothing is
        sent where nothing was recorded since the last.
        """
        if self._mine is not None and self._unmerged:
            merge(self.scores, self._mine, self.group)
            self._mine.zero_()
            self._unmerged = False

    def compare(self) -> None:
        """Whether all processes have drawn the same plan. Collective, once a plan.

        Raises:
            Unlike: they have not, a RuntimeError; the message names the epoch and the ranks.
        """
        if self.plan is not None and self.plan is not self._compared and self._share.world > 1:
            compare(self.plan, self._share.batch_size, self.group)
            self._compared = self.plan

    def loader(
        self,
        dataset: Any,
        batch_size: int,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        *,
        shard: bool = True,
        **arguments: Any,
    ) -> "DataLoader":
        """A torch DataLoader of the epochs, one after the other: `for data, batch in loader`.

        Args:
            dataset: any map-style one, of N samples.
            batch_size: B, of each process; pruned epochs are of whole batches.
            collate_fn: the user's, of a list of samples; None is torch's.
            shard: whether each of several processes gets its own batches alone; False for what
                shares them out itself, as accelerate's `prepare` does.
            arguments: further ones of the DataLoader (num_workers, pin_memory, ...).

        Raises:
            TypeError, ValueError: the data set has no length or another one, or an argument is
                given that the InfoBatch decides (shuffle, sampler, batch_sampler).
        """
        return _adapter().loader(self, dataset, batch_size, collate_fn, shard, **arguments)

    def wrap(self, dataset: Any) -> Any:
        """The data set for a DataLoader built by hand: it takes picks of `sampler()`."""
        return _adapter().wrap(self, dataset)

    def sampler(
        self, batch_size: int | None = None, drop_last: bool = False, shard: bool = True
    ) -> Any:
        """The sampler for a DataLoader built by hand, see `adapters.sampler.Sampler`."""
        return _adapter().Sampler(self, batch_size, drop_last, shard)

    def collate(self, collate_fn: Callable[[list[Any]], Any] | None = None) -> Any:
        """The collate function for a DataLoader built by hand: gives `(data, Batch)`."""
        return _adapter().Collate(collate_fn or _adapter().default_collate)

    def check(self, loader: Any) -> str:
        """One dry pass over a loader: indices once each, weights of the plan, lengths that fit.

        Of several processes it says whether they agree, too: call it on all.

        Returns what was found, in a line; raises ValueError with what does not hold.
        """
        return _adapter().check(self, loader)

    def _settings(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("num_samples", "num_epochs", "seed")}
        return {**own, **self.pruning.settings()}

    def state_dict(self) -> dict[str, Any]:
        """The scores (a copy), the epoch under way, what the policy remembers, and the settings.

        It is loadable with weights_only. A loader goes on behind as many samples as were recorded,
        so that none is trained on twice where batches were updated in its order.

        Raises:
            RuntimeError: of several processes, this one has recorded since the last merge.
        """
        if self._unmerged:
            raise RuntimeError(
                "merge() must be called on every rank before state_dict(), got scores of "
                f"{self._share.world} ranks that are not merged"
            )
        plan = self.plan if self.plan is not None and self.next_epoch == self._epoch else None
        return {
            "version": STATE_VERSION,
            "scores": self.scores.clone(),
            "epoch": self._epoch,
            "plan": None if plan is None else vars(plan).copy(),
            "recorded": self.recorded,
            "past": _saved(self._past),
            "after": _saved(self._after),
            **self._settings(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of `state_dict()`, onto this object's device.

        Raises:
            TypeError, ValueError: no state, or of another version or setting; nothing is changed.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"state must be from state_dict(), got {type(state).__name__}")
        for name, value in {"version": STATE_VERSION, **self._settings()}.items():
            if state.get(name) != value:
                raise ValueError(f"{name} of the state must be {value}, got {state.get(name)}")
        device = self.scores.device
        try:
            past, after = (_past_of(state[name], device) for name in ("past", "after"))
            epoch, plan, recorded = state["epoch"], state["plan"], int(state["recorded"])
            if plan is not None:
                tensors = {name: plan[name].to(device) for name in ("indices", "weights")}
                plan = Plan(**{**plan, **tensors})
            self.scores.copy_(state["scores"])
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"state must be from state_dict(): {reason(error)}") from None
        self._epoch, self._past, self._after = epoch, past, after
        self.plan, self.recorded = plan, recorded
        self.resume_at = 0 if plan is None else recorded
        if self._mine is not None:
            self._mine.zero_()
        self._unmerged = False


@torch.compiler.disable(reason="InfoBatch counts samples on the host: update it outside of this")
def _outside(function: Callable[..., Any], *arguments: Any) -> Any:
    """A call that no torch.compile traces: with other counts it would compile each step anew."""
    return function(*arguments)


def _adapter() -> Any:
    from infobatch_fast.adapters import sampler  # torch's loaders, where they are asked for

    return sampler


def _default_device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    local = int(os.environ.get("LOCAL_RANK", -1))  # the current device may be set only later
    return f"cuda:{local}" if 0 <= local < torch.cuda.device_count() else "cuda"


def _saved(past: _Past) -> dict[str, Any]:
    history = None if past.history is None else vars(past.history).copy()
    return {"memory": dict(past.memory), "history": history, "saved": past.saved}


def _past_of(saved: Mapping[str, Any], device: torch.device) -> _Past:
    memory = {name: value.to(device) for name, value in saved["memory"].items()}
    history = saved["history"]
    if history is not None:
        history = History(**{name: value.to(device) for name, value in history.items()})
    return _Past(memory, history, saved["saved"])


def _onto(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device == device:  # a fifth of the time that to() takes to see it
        return tensor
    # Towards the host a copy must have landed before it is read: that one waits.
    return tensor.to(device, non_blocking=device.type != "cpu")
