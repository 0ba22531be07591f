"""The cases over the N samples of an epoch, and torch's way to each of them.

Dimensions: N samples, n well-learned, k of those kept, K = N - n + k kept in all, R repetitions.
None of torch's ways waits for the host but that of "sample": n is known, as it is to our kernels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from kernels_checks import check_epoch, check_partition, check_permutation
from kernels_work import (
    Call,
    GetKernels,
    Outputs,
    Work,
    bytes_moved,
    check_all,
    copies_of,
    each,
    pair,
)
from torch import Tensor

from infobatch_fast.infobatch import InfoBatch
from infobatch_fast.kernels import reference
from infobatch_fast.kernels.prune_torch import position_dtype
from infobatch_fast.kernels.select import Kernels

RATIO = 0.5
KEY = 0x9E3779B97F4A7C15  # of our shuffles
# torch.compile takes no generator as an argument, and a CUDA graph none that it was not told of.
TORCHS_OWN: Any = None


def epoch_work(
    kernel: str, samples: int, kernels: GetKernels, device: torch.device, seed: int
) -> Work:
    """The kernels over N samples, whose scores lie as losses do in the middle of a training."""
    random = torch.Generator(device).manual_seed(seed)
    scores = torch.empty(samples, device=device).log_normal_(-1.0, 1.0, generator=random)
    scores[::1000] = torch.nan  # not seen
    limit = reference.threshold(scores)
    prunable = reference.well_learned(scores)
    n = int(prunable.sum())
    k = max(1, round((1 - RATIO) * n))
    kept = samples - n + k
    weight = n / k if n else 1.0
    moved = bytes_moved(kernel, n_all=samples, kept=kept)
    copies = copies_of(moved) if kernel != "sample" else 1

    def of(tensor: Tensor) -> list[Tensor]:
        return [tensor, *(tensor.clone() for _ in range(copies - 1))]

    more = {}
    whole: Callable[[Outputs], None] = partial(check_epoch, prunable=prunable, n=n, k=k)
    if kernel == "threshold":
        sources = of(scores)
        ours = each(lambda: kernels().threshold, sources)
        torchs, compileds = pair(reference.threshold, sources)
        exact = scores[scores.isfinite()].mean(dtype=torch.float64)
        check = partial(check_all, [("threshold", exact, 1e-6)])
    elif kernel == "partition":
        sources = of(scores)
        ours = each(lambda: kernels().partition, sources, limit)
        torchs, compileds = pair(partition_by_torch, sources, limit, n)
        check = partial(check_partition, prunable=prunable, n=n)
    elif kernel == "choose":
        sources = of(partition_by_torch(scores, limit, n)[0])
        ours = each(lambda: kernels().choose, sources, n, k, weight, KEY)
        torchs, compileds = pair(choose_by_torch, sources, n, k, weight)
        check, more = whole, {"moved_sectors_bytes": moved + (32 - 4) * kept}
    elif kernel == "shuffle":
        sources = [samples] * copies
        ours = each(lambda: kernels().shuffle, sources, KEY, device)
        torchs, compileds = pair(partial(shuffle_by_torch, device), sources)
        check = partial(check_permutation, samples)
    elif kernel == "choosing":
        sources = of(scores)
        ours = each(lambda: partial(choose_epoch, kernels()), sources, n, k, weight)
        torchs, compileds = pair(choose_epoch_by_torch, sources, n, k, weight)
        check = whole
    else:
        sources = [scores]
        infobatch = InfoBatch(samples, 1, RATIO, 1.0, seed, device)
        infobatch.scores.copy_(scores)

        def ours() -> Call:
            kernels()  # or InfoBatch would take torch's operations
            return lambda i: _plan(infobatch)

        torchs, compileds = pair(sample_by_torch, sources)
        check = whole
    sides = {"ours": ours, "torch": torchs, "compiled": compileds}
    if kernel not in ("threshold", "shuffle"):
        more |= {"kept_samples": kept}
    return Work(sides, check, moved, copies, more)


def partition_by_torch(scores: Tensor, limit: Tensor, n: int) -> Outputs:
    """What `prune.partition` gives, without a wait for the host."""
    prunable = (scores < limit) & (scores > -torch.inf)
    first = torch.nonzero_static(prunable, size=n)
    rest = torch.nonzero_static(~prunable, size=scores.numel() - n)
    positions = torch.cat([first, rest]).view(-1).to(position_dtype(scores.numel()))
    return positions, prunable.sum()


def choose_by_torch(positions: Tensor, n: int, k: int, weight: float) -> Outputs:
    """What `choose.choose` gives, in the way of `reference.choose`."""
    device = positions.device
    chosen = torch.randperm(n, device=device)[:k]
    indices = torch.cat([positions[n:], positions.index_select(0, chosen)]).long()
    order = torch.randperm(indices.numel(), device=device)
    weights = torch.ones(indices.numel(), device=device)
    weights[positions.numel() - n :] = weight
    return indices.index_select(0, order), weights.index_select(0, order)


def shuffle_by_torch(device: torch.device, samples: int) -> Tensor:
    """What `choose.shuffle` gives."""
    return torch.randperm(samples, device=device)


def choose_epoch(kernels: Kernels, scores: Tensor, n: int, k: int, weight: float) -> Outputs:
    """An epoch by the kernels, once n is known."""
    positions, _ = kernels.partition(scores, kernels.threshold(scores))
    return kernels.choose(positions, n, k, weight, KEY)


def choose_epoch_by_torch(scores: Tensor, n: int, k: int, weight: float) -> Outputs:
    """An epoch by torch's operations, once n is known."""
    return reference.choose(reference.well_learned(scores), n, k, weight, TORCHS_OWN)


def sample_by_torch(scores: Tensor) -> Outputs:
    """What `InfoBatch.sample` does without the kernels."""
    prunable = reference.well_learned(scores)
    n = int(prunable.sum())  # the host waits, as it does in `sample`
    k = max(1, round((1 - RATIO) * n))
    return reference.choose(prunable, n, k, n / k, TORCHS_OWN)


def _plan(infobatch: InfoBatch) -> Outputs:
    plan = infobatch.sample(0)
    return plan.indices, plan.weights
