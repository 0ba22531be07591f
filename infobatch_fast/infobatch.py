"""InfoBatch: the score of every sample, each epoch's plan drawn from it, and the rescaled loss.

Unbiased dynamic data pruning (Qin et al., ICLR 2024, arXiv:2303.04947), its state on the device.
Dimensions: N samples, n prunable, k of those kept, K kept in all, B batch, T loss terms a sample.
"""

import math
import operator
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infobatch_fast.budget import MOST_WEIGHTED, Budget, scheduled_ratio, to_save
from infobatch_fast.kernels import reference
from infobatch_fast.kernels.select import triton_kernels
from infobatch_fast.plan import Batch, Plan, check_count, per_sample
from infobatch_fast.policies import SCORES, Choice, View, find, soft
from infobatch_fast.pruning import Pruning

STATE_VERSION = 2


class _Past(NamedTuple):
    """What an epoch is drawn from besides the scores."""

    memory: Mapping[str, Tensor]
    last: Tensor | None  # (K,) int64, the epoch before, for policies that remember
    saved: int  # samples left out so far


class InfoBatch:
    """Scores of N samples, and the epochs drawn from them.

    Args:
        num_samples: N, the size of the data set.
        num_epochs: length of the whole training, which annealing is counted from.
        seed: with the epoch, the one source of randomness; torch's global generators are neither
            read nor seeded.
        device: where the scores live and the plans are drawn; None is CUDA where there is one.
        ratio, delta, policy, rescale, anneal, score, ratio_schedule, target_saving: see `Pruning`.
            A policy that remembers has its epochs drawn in their order. With a target, what an
            epoch cannot save falls to the later ones; see `most_saving`.

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
        ratio_schedule: str = "constant",
        target_saving: float | None = None,
    ) -> None:
        check_count("num_samples", num_samples)
        check_count("num_epochs", num_epochs)
        self.pruning = Pruning(
            policy, ratio, delta, rescale, anneal, score, ratio_schedule, target_saving
        )
        if (world := os.environ.get("WORLD_SIZE", "1")) != "1":
            # Copies side by side would each prune by the losses of their own samples.
            raise ValueError(f"WORLD_SIZE must be 1: several processes are not served, got {world}")
        self.num_samples, self.num_epochs, self.seed = int(num_samples), int(num_epochs), int(seed)
        self.first_full_epoch = self.pruning.first_full_epoch(self.num_epochs)
        self._policy = find(policy)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.scores = torch.full((self.num_samples,), torch.nan, dtype=torch.float32, device=device)
        triton_kernels(self.scores.device)  # proven now, not in the first epoch
        self._epoch: int | None = None  # the last drawn: from `_past`, and `_after` it
        self._past = self._after = _Past({}, None, 0)
        self.asked = 0.0  # samples that a target asked the last epoch drawn to leave out

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self._settings().items())
        return f"InfoBatch({settings}, device={str(self.scores.device)!r})"

    def sample(self, epoch: int, batch_size: int | None = None) -> Plan:
        """Draw an epoch from the scores as they are now; the same call gives the same plan.

        Costs one host sync in an epoch that prunes (to learn n, hence K), none in a full one.

        Args:
            epoch: in [0, num_epochs).
            batch_size: B. Given, k is the count nearest to (1 - ratio) n that makes K a multiple of
                B, where there is one; None keeps exactly max(1, round((1 - ratio) n)). The weight
                n/k is exact either way.

        Raises:
            TypeError, ValueError: epoch or batch_size is out of range, or the policy gave something
                else than a `Choice` of (N,) tensors.
        """
        epoch = operator.index(epoch)
        if not 0 <= epoch < self.num_epochs:
            raise ValueError(f"epoch must be in [0, {self.num_epochs}), got {epoch}")
        if batch_size is not None:
            check_count("batch_size", batch_size)
        if epoch != self._epoch:
            self._past, self._epoch = self._after, epoch
        budget = self._budget(epoch)
        self.asked = budget.number or 0.0
        if budget.prunes and self.pruning.policy != "none":
            plan, memory = self._draw(epoch, budget, batch_size)
        else:
            plan, memory = self._draw_all(epoch), self._past.memory
        last = plan.indices if self._policy.memory else None
        self._after = _Past(memory, last, self._past.saved + self.num_samples - len(plan))
        return plan

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
        schedule = pruning.ratio_schedule, epoch, self.first_full_epoch
        if pruning.target_saving is None:
            return Budget(scheduled_ratio(pruning.ratio, *schedule))
        left = pruning.target_saving * self.num_samples * self.num_epochs - self._past.saved
        return Budget(0.0, to_save(left, self.num_samples, *schedule), self.most_ratio)

    def _draw_all(self, epoch: int) -> Plan:
        device, key = self.scores.device, _mix(self.seed, epoch)
        kernels = triton_kernels(device)
        if kernels is not None:
            order = kernels.shuffle(self.num_samples, key, device)
        else:
            generator = torch.Generator(device).manual_seed(key)
            order = torch.randperm(self.num_samples, generator=generator, device=device)
        return Plan(epoch, self.num_samples, 0, order, torch.ones_like(self.scores))

    def _draw(
        self, epoch: int, budget: Budget, batch_size: int | None
    ) -> tuple[Plan, Mapping[str, Tensor]]:
        scores, key, policy = self.scores, _mix(self.seed, epoch), self._policy
        kernels = triton_kernels(scores.device)
        tail = Pruning(delta=self.pruning.delta).first_full_epoch(self.num_epochs)
        view = View(scores, epoch, tail, budget, key, self._past.last, self._past.memory)
        by_scores = kernels is not None and policy.choose is soft
        # Of soft the kernel needs no mask: it compares as it goes.
        choice = Choice(scores) if by_scores else self._choice(view)
        by_kernels = kernels is not None and choice.priority is None
        positions = choice.prunable
        if by_kernels:
            limit = kernels.threshold(scores) if by_scores else None
            positions, count = kernels.partition(choice.prunable, limit)
        else:
            count = choice.prunable.sum()
        n = int(count)  # the epoch's one host sync: K sizes the plan and the loader
        if n == 0:
            return self._draw_all(epoch), choice.memory
        k = self._keep(n, budget.kept(n), batch_size)
        weight = n / k if self.pruning.rescale and policy.unbiased else 1.0
        if by_kernels:
            indices, weights = kernels.choose(positions, n, k, weight, key)
        else:
            indices, weights = reference.choose(
                positions, n, k, weight, view.generator, choice.priority
            )
        if choice.weights is not None and self.pruning.rescale:
            weights = choice.weights.index_select(0, indices)
        ratio = 1 - budget.kept(n) / n
        return Plan(epoch, self.num_samples, n, indices, weights, ratio), choice.memory

    def _choice(self, view: View) -> Choice:
        """What the policy gives, which may be the user's own."""
        name, choice = self.pruning.policy, self._policy.choose(view)
        if not isinstance(choice, Choice):
            raise TypeError(f"policy {name} must give a Choice, got {type(choice).__name__}")
        for part in ("prunable", "priority", "weights"):
            given, dtype = (
                getattr(choice, part),
                torch.bool if part == "prunable" else torch.float32,
            )
            if given is not None and (given.shape != view.scores.shape or given.dtype != dtype):
                raise ValueError(
                    f"{part} of policy {name} must be {dtype} of shape ({self.num_samples},), "
                    f"got {given.dtype} of shape {tuple(given.shape)}"
                )
        return choice

    def _keep(self, n: int, target: float, batch_size: int | None) -> int:
        exact = max(1, round(target))
        if batch_size is None:
            return exact
        remainder = (n - self.num_samples) % batch_size  # K % B == 0 iff k % B == remainder
        below = remainder + (math.floor(target) - remainder) // batch_size * batch_size
        whole = [k for k in (below, below + batch_size) if 1 <= k <= n]
        return min(whole, key=lambda k: abs(k - target), default=exact)

    def update(self, losses: Tensor, batch: Batch) -> Tensor:
        """Record a batch's losses as scores and return the loss to differentiate. No host sync.

        Args:
            losses: one loss a sample, before any reduction: (B,), (B, 1), or (B, T), which is
                averaged over T; any floating dtype.
            batch: the batch that came with the samples.

        Returns:
            () mean of weight * loss; float64 for float64 losses, float32 otherwise.

        Raises:
            TypeError: the losses are no floating tensor, or the batch is none.
            ValueError: the losses are not one a sample.
        """
        if not isinstance(batch, Batch):
            kind = type(batch).__name__
            raise TypeError(f"batch must be the Batch that came with the samples, got {kind}")
        losses = per_sample(losses, batch.indices.numel())
        self.record(losses, batch)
        return reference.rescaled_mean(losses, _onto(batch.weights, losses.device))

    @torch.no_grad()
    def record(self, losses: Tensor, batch: Batch, found_inf: Tensor | None = None) -> None:
        """The half of `update` that writes the scores, for a step that decides later.

        Args:
            losses: as in `update`.
            batch: of `update`.
            found_inf: () or (1,); where it is not 0 the scores stay as they are.
        """
        device = self.scores.device
        losses = _onto(per_sample(losses, batch.indices.numel()).detach(), device)
        kernels = triton_kernels(device)
        operation = reference.record if kernels is None else kernels.record
        indices = _onto(batch.indices, device).contiguous()
        if self.pruning.score != "loss":
            before = self.scores.index_select(0, indices)
            losses = SCORES[self.pruning.score](before, losses)
        operation(self.scores, indices, losses.contiguous(), found_inf)

    def _settings(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("num_samples", "num_epochs", "seed")}
        return {**own, **self.pruning.settings()}

    def state_dict(self) -> dict[str, Any]:
        """The scores (a copy), what the policy remembers, and the settings that they belong to.

        It is loadable with weights_only.
        """
        return {
            "version": STATE_VERSION,
            "scores": self.scores.clone(),
            "epoch": self._epoch,
            "past": {**self._past._asdict(), "memory": dict(self._past.memory)},
            "after": {**self._after._asdict(), "memory": dict(self._after.memory)},
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
        past, after = (_past_of(state[name], self.scores.device) for name in ("past", "after"))
        self.scores.copy_(state["scores"])
        self._epoch, self._past, self._after = state["epoch"], past, after


def _past_of(saved: Mapping[str, Any], device: torch.device) -> _Past:
    memory = {name: value.to(device) for name, value in saved["memory"].items()}
    last = saved["last"]
    return _Past(memory, None if last is None else last.to(device), saved["saved"])


def _onto(tensor: Tensor, device: torch.device) -> Tensor:
    # Towards the host a copy must have landed before it is read: that one waits.
    return tensor.to(device, non_blocking=device.type != "cpu")


def _mix(seed: int, epoch: int) -> int:
    """A 64-bit generator seed that either argument changes wholly (SplitMix64 twice)."""
    mask = (1 << 64) - 1
    value = 0
    for part in (seed, epoch):
        value = (value ^ (part & mask)) + 0x9E3779B97F4A7C15 & mask
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & mask
        value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
        value ^= value >> 31
    return value
