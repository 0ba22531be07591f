"""InfoBatch: the score of every sample, each epoch's plan drawn from it, and the rescaled loss.

Unbiased dynamic data pruning (Qin et al., ICLR 2024, arXiv:2303.04947), its state on the device.
Dimensions: N samples, n prunable, k of those kept, K kept in all, B batch, T loss terms a sample.
"""

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infobatch_fast.errors import unknown_name
from infobatch_fast.kernels import reference
from infobatch_fast.kernels.select import Kernels, triton_kernels
from infobatch_fast.policies import POLICIES

STATE_VERSION = 1


class Batch(NamedTuple):
    """What `InfoBatch.update` must know of a batch: it travels with the batch's images.

    Attributes:
        indices: (B,) int64, the samples' numbers in the data set.
        weights: (B,) float32, the samples' loss weights.
    """

    indices: Tensor
    weights: Tensor


@dataclass(frozen=True)
class Plan:
    """One epoch: which samples, in which order, with which weights; `len(plan)` is K.

    Attributes:
        epoch: the epoch it was drawn for, from 0.
        num_samples: N.
        num_prunable: n, the samples that the policy allowed to be left out; 0 in a full epoch.
        indices: (K,) int64.
        weights: (K,) float32.
    """

    epoch: int
    num_samples: int
    num_prunable: int
    indices: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return self.indices.numel()

    def batch(self, start: int, stop: int) -> Batch:
        """The samples at positions start to stop of the epoch, as views."""
        return Batch(self.indices[start:stop], self.weights[start:stop])

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The epoch in batches of B, the last one partial: to go beside a loader of one's own.

        Raises:
            ValueError: batch_size is below 1.
        """
        _check_count("batch_size", batch_size)
        for start in range(0, len(self), batch_size):
            yield self.batch(start, start + batch_size)


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
        policy: soft (InfoBatch), random or none.
        rescale: weight the prunable samples that were kept by n/k. False is an ablation.
        anneal: False prunes to the last epoch, an ablation (delta = 0 stays full-data).

    Raises:
        ValueError: an argument is out of range; the message names it.

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
    ) -> None:
        _check_count("num_samples", num_samples)
        _check_count("num_epochs", num_epochs)
        check_ratio(ratio)
        check_delta(delta)
        if policy not in POLICIES:
            raise ValueError(unknown_name("policy", policy, POLICIES))
        self.num_samples = int(num_samples)
        self.num_epochs = int(num_epochs)
        self.ratio = float(ratio)
        self.delta = float(delta)
        self.seed = int(seed)
        self.policy = policy
        self.rescale = bool(rescale)
        self.anneal = bool(anneal)
        self.first_full_epoch = first_full_epoch(self.num_epochs, self.delta)
        if not anneal and delta > 0:
            self.first_full_epoch = self.num_epochs
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.scores = torch.full((self.num_samples,), torch.nan, dtype=torch.float32, device=device)
        triton_kernels(self.scores.device)  # proven now, not in the first epoch

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
            ValueError: epoch or batch_size is out of range.
        """
        epoch = operator.index(epoch)
        if not 0 <= epoch < self.num_epochs:
            raise ValueError(f"epoch must be in [0, {self.num_epochs}), got {epoch}")
        if batch_size is not None:
            _check_count("batch_size", batch_size)
        prunes = epoch < self.first_full_epoch and self.ratio > 0 and self.policy != "none"
        kernels = triton_kernels(self.scores.device)
        draw = self._draw if kernels is None else partial(self._draw_by_kernels, kernels)
        n, indices, weights = draw(_mix(self.seed, epoch), prunes, batch_size)
        return Plan(epoch, self.num_samples, n, indices, weights)

    def _draw(self, key: int, prunes: bool, batch_size: int | None) -> tuple[int, Tensor, Tensor]:
        scores = self.scores
        generator = torch.Generator(scores.device).manual_seed(key)
        n = 0
        prunable = scores
        if prunes:
            prunable = POLICIES[self.policy](scores)
            n = int(prunable.sum())  # the epoch's one host sync: K sizes the plan and the loader
        if n == 0:
            order = torch.randperm(self.num_samples, generator=generator, device=scores.device)
            return 0, order, torch.ones_like(scores)
        k = self._keep(n, batch_size)
        return n, *reference.choose(prunable, n, k, self._weight(n, k), generator)

    def _draw_by_kernels(
        self, kernels: Kernels, key: int, prunes: bool, batch_size: int | None
    ) -> tuple[int, Tensor, Tensor]:
        scores = self.scores
        n = 0
        positions = scores
        if prunes:
            if self.policy == "soft":  # which needs no mask: the kernel compares as it goes
                positions, count = kernels.partition(scores, kernels.threshold(scores))
            else:
                positions, count = kernels.partition(POLICIES[self.policy](scores))
            n = int(count)  # the epoch's one host sync, as above
        if n == 0:
            order = kernels.shuffle(self.num_samples, key, scores.device)
            return 0, order, torch.ones_like(scores)
        k = self._keep(n, batch_size)
        return n, *kernels.choose(positions, n, k, self._weight(n, k), key)

    def _weight(self, n: int, k: int) -> float:
        return n / k if self.rescale else 1.0

    def _keep(self, n: int, batch_size: int | None) -> int:
        target = (1 - self.ratio) * n
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
            TypeError: the losses are no floating tensor.
            ValueError: the losses are not one a sample.
        """
        losses = per_sample(losses, batch.indices.numel())
        kernels = triton_kernels(self.scores.device)
        tensors = [tensor.contiguous() for tensor in (losses, batch.weights, batch.indices)]
        here = all(tensor.device == self.scores.device for tensor in tensors)
        if kernels is not None and here and batch.weights.dtype == torch.float32:
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
        }

    def state_dict(self) -> dict[str, Any]:
        """The scores (a copy) and the settings they belong to, loadable with weights_only."""
        return {"version": STATE_VERSION, "scores": self.scores.clone(), **self._settings()}

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> None:
        """Take over the scores of `state_dict()`, onto this object's device.

        Args:
            state: from `state_dict()`.
            strict: refuse a state of other settings (ratio, seed, ...); False takes its scores.

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
        self.scores.copy_(scores)


def per_sample(losses: Tensor, batch_size: int) -> Tensor:
    """Losses of any accepted shape and dtype as (B,) float32 (float64 stays), differentiably."""
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        kind = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
        raise TypeError(f"losses must be a floating tensor, got {kind}")
    if losses.dim() == 0 and batch_size == 1:
        losses = losses.view(1)
    if losses.dim() == 0 or losses.shape[0] != batch_size or 0 in losses.shape[1:]:
        raise ValueError(
            f"losses must hold one loss per sample of the batch of {batch_size} "
            f'(reduction="none"), got shape {tuple(losses.shape)}'
        )
    if losses.dtype != torch.float64:
        losses = losses.float()
    return losses if losses.dim() == 1 else losses.flatten(1).mean(1)


def _onto(tensor: Tensor, device: torch.device) -> Tensor:
    # Towards the host a copy must have landed before it is read: that one waits.
    return tensor.to(device, non_blocking=device.type != "cpu")


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value}")


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
