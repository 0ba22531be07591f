"""An epoch's samples, chosen and shuffled without a sort; `twin` says what each part does.

Dimensions: N samples, n prunable of them, k of those kept, K = N - n + k kept in all. Bytes moved:
choose reads K random positions of 4, a sector of 32 each, and writes 4 K of weights and 4 K or 8 K
of indices; shuffle writes the indices alone. One launch each.

Of the prunable samples, those of rank g(0), ..., g(k - 1) are kept, where g is a bijection on
[0, n). That is why no pass marks and compacts the survivors: the positions, parted before k is
known, serve as they are, and g is evaluated once for each sample kept, not for each of N.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import twin
from .launch import check, launch
from .twin import CHOICE, ORDER, Bijection, bijection, position_dtype

BLOCK = 1024  # samples a program draws
_FIRST: tl.constexpr = tl.constexpr(twin.FIRST)
_SECOND: tl.constexpr = tl.constexpr(twin.SECOND)
_STEP: tl.constexpr = tl.constexpr(twin.STEP)
_CHECK: tl.constexpr = tl.constexpr(False)  # for overflow: the hashes are meant to wrap


@triton.jit
def _scramble(word, key):  # uint32 -> uint32, of which the high bits are the good ones
    word = tl.mul(tl.add(word, key, sanitize_overflow=_CHECK), _FIRST, sanitize_overflow=_CHECK)
    return tl.mul(word ^ (word >> 15), _SECOND, sanitize_overflow=_CHECK)


@triton.jit
def _network(x, rows, shift, row_key, column_key, pairs):  # (BLOCK,) uint32 or uint64, as x
    # Not unrolled: the rounds of two bijections would crowd the instruction cache, and a size with
    # other rounds would be compiled anew.
    spare = 32 - shift
    row = (x >> shift.to(x.dtype)).to(tl.uint32)
    column = x.to(tl.uint32) & ((tl.full([], 1, tl.uint32) << shift) - 1)
    while pairs > 0:
        row += tl.umulhi(_scramble(column, row_key), rows)
        # Where the row is below `rows` the difference wraps, and is the greater.
        row = tl.minimum(row, tl.sub(row, rows, sanitize_overflow=_CHECK))
        column ^= _scramble(row, column_key) >> spare
        row_key = tl.add(row_key, _STEP, sanitize_overflow=_CHECK)
        column_key = tl.add(column_key, _STEP, sanitize_overflow=_CHECK)
        pairs -= 1
    return (row.to(x.dtype) << shift.to(x.dtype)) | column.to(x.dtype)


@triton.jit
def _permute(x, size, rows, shift, row_key, column_key, pairs, swap):  # (BLOCK,) as x, unsigned
    # Every x must be below size, or its walk need not end.
    size = size.to(x.dtype)
    rows = rows.to(tl.uint32)
    shift = shift.to(tl.uint32)
    row_key = row_key.to(tl.uint32)
    column_key = column_key.to(tl.uint32)
    x ^= tl.where(x < 2, swap, 0).to(x.dtype)
    x = _network(x, rows, shift, row_key, column_key, pairs)
    outside = x >= size
    while tl.max(outside.to(tl.int32), axis=0) != 0:
        x = tl.where(outside, _network(x, rows, shift, row_key, column_key, pairs), x)
        outside = x >= size
    return x


_ORDER_ARGUMENTS = list(Bijection._fields)


@triton.jit(do_not_specialize=_ORDER_ARGUMENTS)
def _shuffle_kernel(
    indices,  # (size,) int64
    size,
    rows,
    shift,
    row_key,
    column_key,
    pairs,
    swap,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    places = first + tl.arange(0, BLOCK)
    place = tl.where(places < size, places, 0).to(tl.uint64 if WIDE else tl.uint32)
    index = _permute(place, size, rows, shift, row_key, column_key, pairs, swap)
    index = index.to(tl.int64)
    if first + BLOCK <= size:
        tl.store(indices + places, index)
    else:
        tl.store(indices + places, index, mask=places < size)


_CHOICE_ARGUMENTS = [f"choice_{name}" for name in _ORDER_ARGUMENTS]


@triton.jit(do_not_specialize=["n", "k", *_ORDER_ARGUMENTS, *_CHOICE_ARGUMENTS])
def _choose_kernel(
    positions,  # (N,) int32 or int64
    indices,  # (K,) int64
    weights,  # (K,) float32
    n,
    k,
    weight,
    size,  # K
    rows,
    shift,
    row_key,
    column_key,
    pairs,
    swap,
    choice_size,  # n, or 1 where that is 0
    choice_rows,
    choice_shift,
    choice_row_key,
    choice_column_key,
    choice_pairs,
    choice_swap,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    places = first + tl.arange(0, BLOCK)
    place = tl.where(places < size, places, 0).to(tl.uint64 if WIDE else tl.uint32)
    drawn = _permute(place, size, rows, shift, row_key, column_key, pairs, swap)
    prunable = drawn < k.to(drawn.dtype)
    rank = _permute(
        tl.where(prunable, drawn, tl.zeros_like(drawn)),
        choice_size,
        choice_rows,
        choice_shift,
        choice_row_key,
        choice_column_key,
        choice_pairs,
        choice_swap,
    ).to(tl.int64)
    at = tl.where(prunable, rank, drawn.to(tl.int64) - k + n)
    index = tl.load(positions + at).to(tl.int64)
    drawn_weight = tl.where(prunable, weight, 1.0).to(tl.float32)
    if first + BLOCK <= size:
        tl.store(indices + places, index)
        tl.store(weights + places, drawn_weight)
    else:
        tl.store(indices + places, index, mask=places < size)
        tl.store(weights + places, drawn_weight, mask=places < size)


def choose(positions: Tensor, n: int, k: int, weight: float, key: int) -> tuple[Tensor, Tensor]:
    """Keep k of the n prunable samples, uniformly without replacement, and all others; shuffle.

    Args:
        positions: (N,) int32 or int64, from `partition`, contiguous.
        n: number of prunable samples, in [0, N].
        k: number of those to keep, in [0, n].
        weight: loss weight of the prunable samples kept; all others get 1.
        key: 64 bits.

    Returns:
        indices (K,) int64 and weights (K,) float32, in the order of the epoch.

    Raises:
        TypeError, ValueError: an argument is not as said; the message names it.
    """
    num_samples = positions.numel()
    check("positions", positions, position_dtype(num_samples))
    if not 0 <= n <= num_samples:
        raise ValueError(f"n must be in [0, {num_samples}], got {n}")
    if not 0 <= k <= n:
        raise ValueError(f"k must be in [0, {n}], got {k}")
    kept = num_samples - n + k
    order, choice = bijection(kept, key, ORDER), bijection(n, key, CHOICE)
    indices = positions.new_empty(kept, dtype=torch.int64)
    weights = positions.new_empty(kept, dtype=torch.float32)
    if kept:
        launch(
            _choose_kernel,
            triton.cdiv(kept, BLOCK),
            *(positions, indices, weights, n, k),
            float(weight),  # a whole number would be another type, and another kernel
            *_arguments(order),
            *_arguments(choice),
            WIDE=num_samples >= 1 << 31,
            BLOCK=BLOCK,
        )
    return indices, weights


def shuffle(num_samples: int, key: int, device: torch.device | str) -> Tensor:
    """All of [0, N) in an order that a key of 64 bits gives: a full epoch, (N,) int64.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """
    through = bijection(num_samples, key, ORDER)
    indices = torch.empty(num_samples, dtype=torch.int64, device=device)
    check("device", indices, torch.int64)
    if num_samples:
        launch(
            _shuffle_kernel,
            triton.cdiv(num_samples, BLOCK),
            indices,
            *_arguments(through),
            WIDE=num_samples >= 1 << 31,
            BLOCK=BLOCK,
        )
    return indices


def _arguments(through: Bijection) -> Bijection:
    # Keys as signed words: Triton types an integer by its value, and would compile a kernel for
    # those below 2**31 and one for those above.
    row, column = (word - (word >> 31 << 32) for word in (through.row_key, through.column_key))
    return through._replace(row_key=row, column_key=column)
