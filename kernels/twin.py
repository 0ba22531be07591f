"""The operations of `prune` and `choose` in plain torch: their specification, for any device.

Same arguments, which are told there, and same bits. Dimensions: N samples, n prunable of them, k of
those kept, K = N - n + k kept in all. The threshold's twin is `reference.threshold`, which may
differ from the kernel's in the last place, since the order of the additions does. The distribution
is that of `reference.choose`, which draws it from a generator instead of a key.

A shuffle is read through a keyed bijection on [0, size), an element at a time: a Feistel network
over a grid of `rows` x 2**shift cells, of which the first `size` are used. A round adds to the row,
modulo `rows`, a hash of the column, the next one flips bits of the column by a hash of the row.
Where it leaves [0, size) it is applied again (cycle-walking), which ends, since the network's cycle
leads back to where it began. Of many sizes all such networks are even permutations: a bit of the
key says whether 0 and 1 are exchanged before.

The grid is the smallest of whole rows, not the smallest power of two: fewer than 2**shift of its
cells, about sqrt(size), are unused, so a block of a kernel seldom walks. Of a power of two up to
half would be, and a block of 1,024 would walk until its last element is home, some eleven times.

All arithmetic is of unsigned 32-bit words that wrap, so kernels, interpreter and this module agree
bit for bit.
"""

from typing import NamedTuple

import torch
from torch import Tensor

# Streams of a key: which of the prunable are kept, and the order of the epoch.
CHOICE = 0
ORDER = 1

# The digits after the point of sqrt(3), sqrt(2) and the golden ratio, which are odd.
FIRST = 0xBB67AE85
SECOND = 0x6A09E667
STEP = 0x9E3779B9

# What a network of few rounds shows is in how often two neighbours stay two neighbours: measured,
# it is sqrt(size) times too often with 2 or 3 rounds, 2 times with 4 or 5, and by a share of about
# 1/sqrt(size) with 6 or 7. At that pace the share is 1/size with 8, too little to be measured, and
# size**-2 with 12. Of a few elements some orders are too frequent all the same: of 5 and 6 elements
# with 12 rounds, not with 16.
ROUNDS = ((1000, 24), (1 << 20, 12), (1 << 60, 8))

_WORD = (1 << 32) - 1


class Bijection(NamedTuple):
    """The numbers that define one.

    Attributes:
        size: of the range that is permuted.
        rows: of the grid.
        shift: base-2 logarithm of its columns.
        row_key: 32 bits that the rows' hashes are keyed with.
        column_key: 32 bits for the columns'.
        pairs: half the rounds, one of a row and one of a column each.
        swap: 1 where 0 and 1 are exchanged before, else 0.
    """

    size: int
    rows: int
    shift: int
    row_key: int
    column_key: int
    pairs: int
    swap: int


def bijection(size: int, key: int, stream: int) -> Bijection:
    """The bijection on [0, size) that belongs to a key.

    Args:
        size: in [0, 2**60); 0 is taken as 1, so that a kernel may evaluate what it does not use.
        key: 64 bits. They are mixed here: keys that are near each other give unlike bijections.
        stream: another stream of the same key is independent of it.

    Raises:
        ValueError: an argument is out of range.
    """
    if not isinstance(key, int) or not 0 <= key < 1 << 64:
        raise ValueError(f"key must be a whole number in [0, 2**64), got {key}")
    if not 0 <= size < 1 << 60:
        raise ValueError(f"size must be in [0, 2**60), got {size}")
    size = max(size, 1)
    pairs = next(rounds for below, rounds in ROUNDS if size < below) // 2
    # At least two columns: a single one would leave nothing but rotations of the rows.
    shift = max(1, (size - 1).bit_length() // 2)
    words = _mix(_mix(key) + stream)
    swap = _mix(words) >> 63 if size > 1 else 0
    rows = -(-size >> shift)
    return Bijection(size, rows, shift, words & _WORD, words >> 32, pairs, swap)


def permute(positions: Tensor, through: Bijection) -> Tensor:
    """Where a bijection leads positions in [0, size), int64 of any shape; waits for the device."""
    led = _network(positions ^ ((positions < 2) * through.swap), through)
    while True:
        outside = (led >= through.size).nonzero(as_tuple=True)
        if not outside[0].numel():
            return led
        led[outside] = _network(led[outside], through)


def partition(source: Tensor, threshold: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The samples' numbers with the prunable ones first, both parts in ascending order; and n."""
    prunable = source if threshold is None else (source < threshold) & source.isfinite()
    positions = torch.cat([prunable.nonzero(), (~prunable).nonzero()]).view(-1)
    return positions.to(position_dtype(source.numel())), prunable.sum()


def choose(positions: Tensor, n: int, k: int, weight: float, key: int) -> tuple[Tensor, Tensor]:
    """Keep k of the n prunable samples, uniformly without replacement, and all others; shuffle.

    The epoch's place j is drawn by a first bijection, on [0, K): draws from k on are the others, a
    draw below k is led by a second one, on [0, n), to the rank of a prunable sample.
    """
    kept = positions.numel() - n + k
    drawn = shuffle(kept, key, positions.device)
    prunable = drawn < k
    ranks = permute(torch.where(prunable, drawn, 0), bijection(n, key, CHOICE))
    at = torch.where(prunable, ranks, drawn - k + n)
    weights = torch.ones(kept, dtype=torch.float32, device=positions.device)
    return positions[at].long(), weights.masked_fill_(prunable, weight)


def shuffle(num_samples: int, key: int, device: torch.device | str) -> Tensor:
    """All of [0, N) in an order that a key of 64 bits gives: a full epoch, (N,) int64."""
    every = torch.arange(num_samples, device=device)
    return permute(every, bijection(num_samples, key, ORDER))


def position_dtype(num_samples: int) -> torch.dtype:
    """The narrowest dtype that holds every sample's number."""
    return torch.int32 if num_samples < 1 << 31 else torch.int64


def _network(positions: Tensor, through: Bijection) -> Tensor:
    row = positions >> through.shift
    column = positions & (1 << through.shift) - 1
    for pair in range(through.pairs):
        drawn = _scramble(column, through.row_key + pair * STEP)
        row = (row + (drawn * through.rows >> 32)) % through.rows
        drawn = _scramble(row, through.column_key + pair * STEP)
        column = column ^ drawn >> 32 - through.shift
    return row << through.shift | column


def _scramble(word: Tensor, key: int) -> Tensor:
    """A hash of 32 bits, whose high bits are the good ones; int64 that wraps keeps the low 32."""
    word = (word + key & _WORD) * FIRST & _WORD
    return (word ^ word >> 15) * SECOND & _WORD


def _mix(value: int) -> int:
    """64 bits of which each depends on each bit of the value."""
    mask = (1 << 64) - 1
    value = value + 0x9E3779B97F4A7C15 & mask
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
    return value ^ value >> 31
