"""The operations of `prune` and `choose` in plain torch: their specification, for any device.

Same arguments, same bits. Dimensions: N samples, n prunable of them, k of those kept, K = N - n + k
kept in all. The threshold's twin is `reference.threshold`, which may differ from the kernel's in
the last place, since the order of the additions does.

The distribution is that of `reference.choose`, which draws it from a generator instead of a key.
"""

import torch
from torch import Tensor

from .bijection import bijection, permute

# Streams of a key: which of the prunable are kept, and the order of the epoch.
CHOICE = 0
ORDER = 1


def partition(source: Tensor, threshold: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The samples' numbers with the prunable ones first, both parts in ascending order.

    Args:
        source: (N,) float32 scores, or (N,) bool, True where a sample is prunable.
        threshold: () float32 with scores, of which those below it are prunable unless they are
            -inf; None with a mask.

    Returns:
        positions (N,) int32, int64 from N = 2**31 on; n, () int64.
    """
    prunable = source
    if threshold is not None:
        prunable = (source < threshold) & source.isfinite()
    positions = torch.cat([prunable.nonzero(), (~prunable).nonzero()]).view(-1)
    return positions.to(position_dtype(source.numel())), prunable.sum()


def choose(
    positions: Tensor,
    n: int,
    k: int,
    weight: float,
    key: int,
    dtype: torch.dtype = torch.int64,
    rounds: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Keep k of the n prunable samples, uniformly without replacement, and all others; shuffle.

    The epoch's place j is drawn by a first bijection, on [0, K): draws from k on are the others, a
    draw below k is led by a second one, on [0, n), to the rank of a prunable sample.

    Args:
        positions: (N,) int32 or int64, from `partition`.
        n: number of prunable samples, in [0, N].
        k: number of those to keep, in [0, n].
        weight: loss weight of the prunable samples kept; all others get 1.
        key: 64 bits.
        dtype: of the indices, int32 or int64.
        rounds: of the bijections; None is as many as they need.

    Returns:
        indices (K,) and weights (K,) float32, in the order of the epoch.
    """
    kept = positions.numel() - n + k
    drawn = shuffle(kept, key, positions.device, rounds=rounds)
    prunable = drawn < k
    ranks = permute(torch.where(prunable, drawn, 0), bijection(n, key, CHOICE, rounds))
    at = torch.where(prunable, ranks, drawn - k + n)
    weights = torch.ones(kept, dtype=torch.float32, device=positions.device)
    return positions[at].to(dtype), weights.masked_fill_(prunable, weight)


def shuffle(
    num_samples: int,
    key: int,
    device: torch.device | str,
    dtype: torch.dtype = torch.int64,
    rounds: int | None = None,
) -> Tensor:
    """All of [0, N) in an order that the key gives: a full epoch.

    Args:
        num_samples: N.
        key: 64 bits.
        device: of the result.
        dtype: int32 or int64.
        rounds: of the bijection; None is as many as it needs.

    Returns:
        (N,) of that dtype.
    """
    every = torch.arange(num_samples, device=device)
    return permute(every, bijection(num_samples, key, ORDER, rounds)).to(dtype)


def position_dtype(num_samples: int) -> torch.dtype:
    """The narrowest dtype that holds every sample's number."""
    return torch.int32 if num_samples < 1 << 31 else torch.int64
