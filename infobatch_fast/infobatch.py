"""InfoBatch: the score of every sample, each epoch's plan drawn from it, and the rescaled loss.

Unbiased dynamic data pruning (Qin et al., ICLR 2024, arXiv:2303.04947), its state on the device.
Dimensions: N samples, n prunable, k of those kept, K kept in all, B batch, T loss terms a sample.
"""

import math
import operator
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infobatch_fast.budget import (
    MOST_WEIGHTED,
    RATIO_SCHEDULES,
    Budget,
    scheduled_ratio,
    to_save,
)
from infobatch_fast.errors import unknown_name
from infobatch_fast.kernels import reference
from infobatch_fast.kernels.select import triton_kernels
from infobatch_fast.plan import Batch, Plan, check_count, per_sample
from infobatch_fast.policies import POLICIES, SCORES, Choice, Policy, View, soft

STATE_VERSION = 2


def first_full_epoch(num_epochs: int, delta: float) -> int:
    """The first annealing epoch: ceil(num_epochs * delta) with delta as it was written.

    Floats get products such as 200 * 0.07 wrong (14.000000000000002), hence the fraction.
    """
    return math.ceil(num_epochs * Fraction(str(float(delta))))


def check_ratio(ratio: float) -> None:
    """Raise ValueError unless ratio is in [0, 1)."""
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio must be in [0, 1), got {ratio}")


def check_delta(delta: float) -> None:
    """Raise ValueError unless delta is in [0, 1]."""
    if not 0 <= delta <= 1:
        raise ValueError(f"delta must be in [0, 1], got {delta}")


def check_target(target: float | None) -> None:
    """Raise ValueError unless target is None or in (0, 1)."""
    if target is not None and not 0 < target < 1:
        raise ValueError(f"target_saving must be in (0, 1), got {target}")


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
        ratio: r, the share of the prunable samples that an epoch leaves out, in [0, 1).
        delta: share of the epochs that prune, in [0, 1]; the rest train on all samples. 0 is the
            full-data baseline.
        seed: with the epoch, the one source of randomness; torch's global generators are neither
            read nor seeded.
        device: where the scores live and the plans are drawn; None is CUDA where there is one.
        policy: soft (InfoBatch) or another of `policies.POLICIES`. One that remembers has its
            epochs drawn in their order.
        rescale: weight the prunable samples that were kept by n/k (repb has weights of its own;
            biased policies have none). False is an ablation.
        anneal: False prunes to the last epoch, an ablation (delta = 0 stays full-data).
        score: loss, the sample's last; or bls, of `policies.SCORES`.
        ratio_schedule: constant, or pods, which swings the ratio around its mean.
        target_saving: share of the samples of all epochs that the run shall leave out, in (0, 1).
            Each epoch's ratio is then solved from its scores, and `ratio` is not used. Where kept
            samples are weighted by n/k it goes to 0.9 at most. What an epoch cannot save falls to
            the later ones; see `most_saving`.

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
        check_ratio(ratio)
        check_delta(delta)
        check_target(target_saving)
        for argument, value, known in (
            ("policy", policy, POLICIES),
            ("score", score, SCORES),
            ("ratio_schedule", ratio_schedule, RATIO_SCHEDULES),
        ):
            if value not in known:
                raise ValueError(unknown_name(argument, value, known))
        if not isinstance(POLICIES[policy], Policy):
            kind = type(POLICIES[policy]).__name__
            raise TypeError(f"POLICIES[{policy!r}] must be a Policy, got {kind}")
        self.num_samples = int(num_samples)
        self.num_epochs = int(num_epochs)
        self.ratio = float(ratio)
        self.delta = float(delta)
        self.seed = int(seed)
        self.policy = policy
        self.rescale = bool(rescale)
        self.anneal = bool(anneal)
        self.score = score
        self.ratio_schedule = ratio_schedule
        self.target_saving = None if target_saving is None else float(target_saving)
        self.first_full_epoch = first_full_epoch(self.num_epochs, self.delta)
        if not anneal and delta > 0:
            self.first_full_epoch = self.num_epochs
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
        policy = POLICIES[self.policy]
        if epoch < self.first_full_epoch and budget.prunes and self.policy != "none":
            plan, memory = self._draw(epoch, budget, batch_size)
        else:
            plan, memory = self._draw_all(epoch), self._past.memory
        last = plan.indices if policy.memory else None
        saved = self._past.saved + self.num_samples - len(plan)
        self._after = _Past(memory, last, saved)
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
        weighted = self.rescale and POLICIES[self.policy].unbiased
        return MOST_WEIGHTED if weighted else 1.0

    def _budget(self, epoch: int) -> Budget:
        schedule = self.ratio_schedule, epoch, self.first_full_epoch
        if epoch >= self.first_full_epoch:
            return Budget(0.0)
        if self.target_saving is None:
            return Budget(scheduled_ratio(self.ratio, *schedule))
        left = self.target_saving * self.num_samples * self.num_epochs - self._past.saved
        return Budget(0.0, to_save(left, self.num_samples, *schedule), self.most_ratio)

    def _draw_all(self, epoch: int) -> Plan:
        device = self.scores.device
        kernels = triton_kernels(device)
        key = _mix(self.seed, epoch)
        if kernels is not None:
            order = kernels.shuffle(self.num_samples, key, device)
        else:
            generator = torch.Generator(device).manual_seed(key)
            order = torch.randperm(self.num_samples, generator=generator, device=device)
        return Plan(epoch, self.num_samples, 0, order, torch.ones_like(self.scores))

    def _draw(
        self, epoch: int, budget: Budget, batch_size: int | None
    ) -> tuple[Plan, Mapping[str, Tensor]]:
        scores, key = self.scores, _mix(self.seed, epoch)
        kernels = triton_kernels(scores.device)
        policy = POLICIES[self.policy]
        generator = torch.Generator(scores.device).manual_seed(key)
        by_scores = kernels is not None and policy.choose is soft
        if by_scores:  # it needs no mask: the kernel compares as it goes
            choice = Choice(scores)
        else:
            tail = first_full_epoch(self.num_epochs, self.delta)
            last, memory = self._past.last, self._past.memory
            choice = policy.choose(View(scores, epoch, tail, budget, generator, last, memory))
            self._check_choice(choice)
        positions = scores
        if kernels is not None and choice.priority is None:
            limit = kernels.threshold(scores) if by_scores else None
            positions, count = kernels.partition(choice.prunable, limit)
        else:
            count = choice.prunable.sum()
        n = int(count)  # the epoch's one host sync: K sizes the plan and the loader
        if n == 0:
            return self._draw_all(epoch), choice.memory
        k = self._keep(n, budget.kept(n), batch_size)
        own = choice.weights if self.rescale else None
        weight = n / k if self.rescale and policy.unbiased else 1.0
        if kernels is not None and choice.priority is None:
            indices, weights = kernels.choose(positions, n, k, weight, key)
        else:
            indices, weights = reference.choose(
                choice.prunable, n, k, weight, generator, choice.priority
            )
        if own is not None:
            weights = own.index_select(0, indices)
        ratio = 1 - budget.kept(n) / n
        return Plan(epoch, self.num_samples, n, indices, weights, ratio), choice.memory

    def _check_choice(self, choice: Choice) -> None:
        if not isinstance(choice, Choice):
            kind = type(choice).__name__
            raise TypeError(f"policy {self.policy} must give a Choice, got {kind}")
        shape = self.scores.shape
        for name, dtype in (
            ("prunable", torch.bool),
            ("priority", torch.float32),
            ("weights", torch.float32),
        ):
            given = getattr(choice, name)
            if given is not None and (given.shape != shape or given.dtype != dtype):
                raise ValueError(
                    f"{name} of policy {self.policy} must be {dtype} of shape {tuple(shape)}, "
                    f"got {given.dtype} of shape {tuple(given.shape)}"
                )

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
        if isinstance(batch, Tensor):
            raise TypeError("batch must be what came with the samples, got a tensor")
        losses = per_sample(losses, batch.indices.numel())
        kernels = triton_kernels(self.scores.device)
        tensors = [tensor.contiguous() for tensor in (losses, batch.weights, batch.indices)]
        here = all(tensor.device == self.scores.device for tensor in tensors)
        plain = self.score == "loss"
        if kernels is not None and plain and here and batch.weights.dtype == torch.float32:
            return kernels.update(*tensors, self.scores)
        self.record(losses, batch)
        return reference.rescaled_mean(losses, _onto(batch.weights, losses.device))

    @torch.no_grad()
    def record(self, losses: Tensor, batch: Batch, found_inf: Tensor | None = None) -> None:
        """The half of `update` that writes the scores, for a step that decides later.

        Args:
            losses: as in `update`.
            batch: as in `update`.
            found_inf: () or (1,); where it is not 0 the scores stay as they are.
        """
        device = self.scores.device
        losses = _onto(per_sample(losses, batch.indices.numel()).detach(), device)
        kernels = triton_kernels(device)
        operation = reference.record if kernels is None else kernels.record
        indices = _onto(batch.indices, device).contiguous()
        if self.score != "loss":
            losses = SCORES[self.score](self.scores.index_select(0, indices), losses)
        operation(self.scores, indices, losses.contiguous(), found_inf)

    def _settings(self) -> dict[str, Any]:
        return {
            "num_samples": self.num_samples,
            "num_epochs": self.num_epochs,
            "ratio": self.ratio,
            "delta": self.delta,
            "seed": self.seed,
            "policy": self.policy,
            "rescale": self.rescale,
            "anneal": self.anneal,
            "score": self.score,
            "ratio_schedule": self.ratio_schedule,
            "target_saving": self.target_saving,
        }

    def state_dict(self) -> dict[str, Any]:
        """The scores (a copy), what the policy remembers, and the settings that they belong to.

        It is loadable with weights_only.
        """
        return {
            "version": STATE_VERSION,
            "scores": self.scores.clone(),
            "epoch": self._epoch,
            "past": _as_dict(self._past),
            "after": _as_dict(self._after),
            **self._settings(),
        }

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Take over the scores of `state_dict()`, onto this object's device.

        Args:
            state: from `state_dict()`.
            strict: refuse a state of other settings (ratio, seed, ...); False takes its scores
                alone.

        Raises:
            ValueError: another version, shape or (strict) setting; nothing is changed then.
        """
        if state.get("version") != STATE_VERSION:
            raise ValueError(f"state version must be {STATE_VERSION}, got {state.get('version')}")
        scores = state.get("scores")
        if not isinstance(scores, Tensor) or scores.shape != self.scores.shape:
            shape = tuple(scores.shape) if isinstance(scores, Tensor) else scores
            raise ValueError(f"scores must have shape ({self.num_samples},), got {shape}")
        if scores.dtype != torch.float32:
            raise ValueError(f"scores must be float32, got {scores.dtype}")
        for name, value in self._settings().items() if strict else ():
            if state.get(name) != value:
                raise ValueError(f"{name} of the state must be {value}, got {state.get(name)}")
        epoch, past, after = None, _Past({}, None, 0), _Past({}, None, 0)
        if strict:
            epoch = state.get("epoch")
            if epoch is not None and (type(epoch) is not int or not 0 <= epoch < self.num_epochs):
                raise ValueError(
                    f"epoch of the state must be in [0, {self.num_epochs}), got {epoch}"
                )
            past, after = (self._past_of(state, name) for name in ("past", "after"))
        self.scores.copy_(scores)
        self._epoch, self._past, self._after = epoch, past, after

    def _past_of(self, state: dict[str, Any], name: str) -> _Past:
        given: Any = state.get(name)
        device = self.scores.device
        try:
            saved = operator.index(given["saved"])
            last = given["last"]
            fits = saved >= 0 and (last is None or self._is_plan(last))
            names = set(POLICIES[self.policy].memory)
            fits = fits and set(given["memory"]) in (set(), names)
            for value in given["memory"].values():
                fits = fits and value.shape in (self.scores.shape, ())
            memory = {key: value.to(device) for key, value in given["memory"].items()}
            if fits:
                return _Past(memory, None if last is None else last.to(device), saved)
        except (AttributeError, KeyError, TypeError, ValueError):
            pass
        raise ValueError(f"{name} of the state must be what {self.policy} left in state_dict()")

    def _is_plan(self, indices: Tensor) -> bool:
        if indices.dtype != torch.int64 or indices.dim() != 1:
            return False
        if not 0 < indices.numel() <= self.num_samples:
            return False
        low, high = indices.aminmax()
        return bool(low >= 0) and bool(high < self.num_samples)


def _as_dict(past: _Past) -> dict[str, Any]:
    return {"memory": dict(past.memory), "last": past.last, "saved": past.saved}


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
