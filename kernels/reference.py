"""Every operation of InfoBatch in torch: the specification, which runs on any device.

Dimensions: N samples, n prunable of them, k of those kept, K = N - n + k kept in all, B batch.
A score is a sample's last training loss, float32; NaN stands for "not seen yet, or not finite".
None of these functions waits for the device: the sizes they need are arguments.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor


def threshold(scores: Tensor) -> Tensor:
    """The mean of the scores seen, rounded up to float32; NaN where none was seen.

    Args:
        scores: (N,) float32.

    Returns:
        () float32. Accumulated in float64. Rounding up makes `score < threshold` in float32 the
        same as comparing with the float64 mean itself, without a float64 copy of the scores.
    """
    mean = scores.mean(dtype=torch.float64)
    if scores.is_cuda or not np.isfinite(mean.numpy()):  # a CPU may look, and spare four passes
        seen = scores.abs() < torch.inf
        finite = scores.nan_to_num(0.0, posinf=0.0, neginf=0.0)
        mean = finite.sum(dtype=torch.float64) / seen.sum()
    nearest = mean.float()
    return torch.where(
        nearest < mean, nearest.nextafter(torch.full_like(nearest, torch.inf)), nearest
    )


def well_learned(scores: Tensor) -> Tensor:
    """Samples whose score is below the mean of the scores seen (InfoBatch, section 3.2).

    Args:
        scores: (N,) float32.

    Returns:
        (N,) bool; False for a sample not seen.
    """
    if scores.is_cpu and scores.numel():  # a third of the time, where every score is finite
        values = scores.numpy()
        with np.errstate(invalid="ignore"):
            mean = np.add.reduce(values, dtype=np.float64) / len(values)
        if math.isfinite(mean):
            return torch.from_numpy(values < mean)
    return scores.nan_to_num(torch.inf, neginf=torch.inf) < threshold(scores)


def choose(
    prunable: Tensor,
    n: int,
    k: int,
    weight: float,
    generator: torch.Generator,
    priority: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep k of the n prunable samples, uniformly without replacement, and all others; shuffle.

    The shuffle is drawn apart from the choice: one permutation for both would put the prunable
    samples that were kept at the front of the epoch.

    Args:
        prunable: (N,) bool with n True.
        n: number of prunable samples, in [0, N].
        k: number of those to keep, in [0, n].
        weight: loss weight of the prunable samples kept; all others get 1.
        generator: of the same device as `prunable`.
        priority: (N,) float32 without NaN where prunable: the k of highest priority are kept in
            the place of uniform ones, among equals by lot.

    Returns:
        indices (K,) int64 and weights (K,) float32, in the order of the epoch.
    """
    # 32 bits where they do: half the memory to shuffle.
    dtype = torch.int32 if prunable.numel() < 1 << 31 else torch.int64
    how: Any = {"generator": generator, "device": prunable.device, "dtype": dtype}
    if prunable.is_cpu:
        mask = prunable.numpy()
        if priority is None:
            chosen = _thinned(mask, n, k, generator)
        else:
            chosen = _highest(mask, n, k, priority.detach().numpy(), generator)
        rest = np.flatnonzero(~mask)
        places = torch.randperm(len(rest) + k, **how).numpy()
        indices = np.concatenate([rest, chosen]).take(places)
        weighted = places >= len(rest)
        scaled = weighted.astype(np.float32)  # and no branch by what was drawn
        scaled *= np.float32(weight)
        scaled += ~weighted
        return torch.from_numpy(indices), torch.from_numpy(scaled)
    # nonzero() would wait for the device to learn the counts, which the caller knows.
    others = torch.nonzero_static(~prunable, size=prunable.numel() - n).view(-1)
    drawn = torch.nonzero_static(prunable, size=n).view(-1)
    drawn = drawn.index_select(0, torch.randperm(n, **how))
    if priority is not None:
        drawn = drawn[priority.index_select(0, drawn).topk(k, sorted=False).indices]
    order = torch.randperm(others.numel() + k, **how)
    weights = torch.where(order < others.numel(), 1.0, weight).float()
    return torch.cat([others, drawn[:k]]).index_select(0, order), weights


def _highest(
    prunable: np.ndarray, n: int, k: int, priority: np.ndarray, generator: torch.Generator
) -> np.ndarray:
    """(k,) int64: of the n that are True (N,) those of highest priority, among equals by lot."""
    if k in (0, n):
        return np.flatnonzero(prunable)[:k]
    least = np.partition(priority[prunable], n - k)[n - k]
    kept, equal = prunable & (priority > least), prunable & (priority == least)
    number, missing = int(equal.sum()), k - int(kept.sum())
    kept[_thinned(equal, number, missing, generator)] = True
    return np.flatnonzero(kept)


def _thinned(prunable: np.ndarray, n: int, k: int, generator: torch.Generator) -> np.ndarray:
    """(k,) int64: uniform ones of the n that are True (N,), in ascending order.

    Each is drawn by itself with a chance (of 8 bits) that seldom gives fewer than k, and of those
    drawn the surplus is taken out by lot. Of a given number all subsets are equally likely in both
    steps, and so are they of k. At 50,000 it takes half the time of a permutation, at 1e7 a ninth.
    """
    how: Any = {"generator": generator, "device": "cpu"}  # whatever torch's default is
    chance, drawn = math.ceil(256 * (k + 2 * math.sqrt(n)) / max(n, 1)), np.empty(0, np.int64)
    while len(drawn) < k:
        size = (len(prunable) // 8 + 1,)
        words = torch.randint(-(1 << 63), (1 << 63) - 1, size, **how)
        bits = words.numpy().view(np.uint8)[: len(prunable)]
        drawn = np.flatnonzero(prunable & (bits < chance))
    lots, surplus = np.zeros(len(drawn), bool), len(drawn) - k
    while missing := min(k, surplus) - int(lots.sum()):  # as one may be drawn twice
        lots[torch.randint(len(drawn), (missing,), **how).numpy()] = True
    return drawn[lots if k < surplus else ~lots]


def rescaled_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """The batch's loss, mean of weight * loss, differentiable in `losses` and not in place.

    Args:
        losses: (B,) float32 or float64.
        weights: (B,) float32.

    Returns:
        () of the dtype of `losses`.
    """
    return (losses * weights).mean()


def record(
    scores: Tensor, indices: Tensor, losses: Tensor, found_inf: Tensor | None = None
) -> None:
    """Write a batch's losses into the scores, in place; a non-finite loss becomes NaN.

    Args:
        scores: (N,) float32, written at `indices`.
        indices: (B,) int64 without duplicates.
        losses: (B,) floating.
        found_inf: () or (1,) float; where it is not 0 the scores stay as they are.
    """
    new = losses.detach()
    if new.dtype != torch.float32:
        new = new.float()
    # A CPU may look, and numpy's way takes half the time there.
    if scores.is_cpu:
        if found_inf is not None and found_inf.numpy().any():
            return
        values = new.numpy()
        if not np.isfinite(values).all():  # seldom
            values = new.nan_to_num(torch.nan, torch.nan, torch.nan).numpy()
        scores.numpy()[indices.numpy()] = values
        return
    new = new.nan_to_num(torch.nan, torch.nan, torch.nan)
    if found_inf is not None:
        new = torch.where(found_inf != 0, scores.index_select(0, indices), new)
    scores.scatter_(0, indices, new)
