"""Every operation of InfoBatch in torch: the specification, which runs on any device.

Dimensions: N samples, n prunable of them, k of those kept, K = N - n + k kept in all, B batch.
A score is a sample's last training loss, float32; NaN stands for "not seen yet, or not finite".
None of these functions waits for the device: the sizes they need are arguments.
"""

import math

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
    if scores.is_cpu:  # half the time, where every score is finite
        mean = scores.mean(dtype=torch.float64).numpy()
        if np.isfinite(mean):
            return torch.from_numpy(scores.numpy() < mean)
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
    device = prunable.device
    # 32 bits where they do: half the memory to shuffle, and the same order on a CPU.
    dtype = torch.int32 if prunable.numel() < 1 << 31 else torch.int64
    others = _positions(~prunable, prunable.numel() - n)
    lot = torch.randperm(n, generator=generator, device=device, dtype=dtype)
    if priority is None:
        kept = _positions(prunable, n).index_select(0, lot[:k])
    else:
        drawn = _positions(prunable, n).index_select(0, lot)
        kept = drawn[priority.index_select(0, drawn).topk(k, sorted=False).indices]
    kept_in_all = others.numel() + k
    order = torch.randperm(kept_in_all, generator=generator, device=device, dtype=dtype)
    weights = torch.ones(order.numel(), dtype=torch.float32, device=device)
    weights[others.numel() :].fill_(weight)
    indices = torch.cat([others, kept])
    return indices.index_select(0, order), weights.index_select(0, order)


def _positions(mask: Tensor, count: int) -> Tensor:
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))  # twelve times as fast as torch's
    # nonzero() would wait for the device to learn `count`, which the caller knows.
    return torch.nonzero_static(mask, size=count).view(-1)


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
    new = losses.detach().float()
    # A CPU may look, and numpy's way takes half the time there.
    if scores.is_cpu and not torch.compiler.is_compiling():
        if found_inf is not None and found_inf.numpy().any():
            return
        values = new.numpy()
        if not math.isfinite(values.dot(values)):  # seldom, and it may be that it overflowed
            values = new.nan_to_num(torch.nan, torch.nan, torch.nan).numpy()
        scores.numpy()[indices.numpy()] = values
        return
    new = new.nan_to_num(torch.nan, torch.nan, torch.nan)
    if found_inf is not None:
        new = torch.where(found_inf != 0, scores.index_select(0, indices), new)
    scores.scatter_(0, indices, new)
