"""The prunable samples of an epoch, in Triton; `twin` says what each part does.

    limit = threshold(scores)                                   # 2 launches
    positions, count = partition(scores, limit)                 # 2
    n = int(count)                                              # the epoch's one host sync
    indices, weights = choose(positions, n, k, n / k, key)      # 1, of `choose`

All up to the sync has fixed sizes and addresses: a CUDA graph can capture it.

Dimensions: N samples, n prunable of them, P programs of a launch. Bytes moved: threshold reads 4 N;
partition reads 8 N of scores, 2 N of a mask, and writes 4 N (8 N from N = 2**31 on). Those 4 N are
held until the epoch is chosen.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check, launch
from .twin import position_dtype

# Samples a program handles at a time; 8 a thread, which hold all their words in registers.
BLOCK = 1024
# Programs of a launch over all N, each with a stretch of its own. A program adds up what those
# before it counted: a launch less than a scan, and a sum in the same order on every device.
PROGRAMS = 2048


@triton.jit
def _load(source, offsets, whole, num_samples, other):
    # A mask would split the vector loads wherever N is no multiple of 16.
    if whole:
        value = tl.load(source + offsets)
    else:
        value = tl.load(source + offsets, mask=offsets < num_samples, other=other)
    return value


@triton.jit(do_not_specialize=["num_samples", "blocks"])
def _sums_kernel(
    scores,  # (N,) float32
    sums,  # (P,) float64
    counts,  # (P,) int64
    num_samples,
    blocks,  # of BLOCK samples, that a program handles
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    total = tl.zeros([BLOCK], tl.float64)
    seen = tl.zeros([BLOCK], tl.int32)
    first = program.to(tl.int64) * blocks * BLOCK
    stop = tl.minimum(first + blocks.to(tl.int64) * BLOCK, num_samples)
    # Not range(), which takes no tensor in the interpreter of Triton 3.6 under NumPy 2.4.
    while first < stop:
        offsets = first + tl.arange(0, BLOCK)
        score = _load(scores, offsets, first + BLOCK <= num_samples, num_samples, float("nan"))
        finite = tl.abs(score) < float("inf")
        total += tl.where(finite, score, 0.0).to(tl.float64)
        seen += finite.to(tl.int32)
        first += BLOCK
    tl.store(sums + program, tl.sum(total, axis=0))
    tl.store(counts + program, tl.sum(seen.to(tl.int64), axis=0))


@triton.jit(do_not_specialize=["programs"])
def _mean_kernel(
    sums,  # (P,) float64
    counts,  # (P,) int64
    mean,  # () float32
    programs,
    PROGRAMS: tl.constexpr,
):
    program = tl.arange(0, PROGRAMS)
    inside = program < programs
    total = tl.sum(tl.load(sums + program, mask=inside, other=0.0), axis=0)
    seen = tl.sum(tl.load(counts + program, mask=inside, other=0), axis=0)
    exact = total / tl.maximum(seen, 1).to(tl.float64)
    nearest = exact.to(tl.float32)
    bits = nearest.to(tl.int32, bitcast=True)
    # The next float32 above: one more in the bits, one less for a negative number. -0.0 does not
    # occur here: it is not less than a mean that it is nearest to.
    above = tl.where(bits < 0, bits - 1, bits + 1).to(tl.float32, bitcast=True)
    up = tl.where(nearest.to(tl.float64) < exact, above, nearest)
    tl.store(mean, tl.where(seen == 0, float("nan"), up))


@triton.jit
def _is_prunable(
    source, offsets, whole, num_samples, limit, MASK: tl.constexpr
):  # -> (BLOCK,) bool, False from N on
    if MASK:
        prunable = _load(source, offsets, whole, num_samples, 0) != 0
    else:
        score = _load(source, offsets, whole, num_samples, float("nan"))
        prunable = (score < limit) & (score > float("-inf"))
    return prunable


@triton.jit(do_not_specialize=["num_samples", "blocks"])
def _count_kernel(
    source,  # (N,) float32, or uint8 with MASK
    threshold,  # () float32; not read with MASK
    counts,  # (P,) int64
    num_samples,
    blocks,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    limit = 0.0
    if not MASK:
        limit = tl.load(threshold)
    count = tl.zeros([BLOCK], tl.int32)
    first = program.to(tl.int64) * blocks * BLOCK
    stop = tl.minimum(first + blocks.to(tl.int64) * BLOCK, num_samples)
    while first < stop:
        offsets = first + tl.arange(0, BLOCK)
        whole = first + BLOCK <= num_samples
        count += _is_prunable(source, offsets, whole, num_samples, limit, MASK).to(tl.int32)
        first += BLOCK
    tl.store(counts + program, tl.sum(count.to(tl.int64), axis=0))


@triton.jit(do_not_specialize=["num_samples", "blocks", "programs"])
def _partition_kernel(
    source,  # (N,) float32, or uint8 with MASK
    threshold,  # () float32; not read with MASK
    counts,  # (P,) int64
    positions,  # (N,) int32, or int64 from N = 2**31 on
    total,  # () int64
    num_samples,
    blocks,
    programs,
    MASK: tl.constexpr,
    BLOCK: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    program = tl.program_id(0)
    limit = 0.0
    if not MASK:
        limit = tl.load(threshold)
    others = tl.arange(0, PROGRAMS)
    count = tl.load(counts + others, mask=others < programs, other=0)
    n = tl.sum(count, axis=0)
    before = tl.sum(tl.where(others < program, count, 0), axis=0)  # prunable samples
    first = program.to(tl.int64) * blocks * BLOCK
    stop = tl.minimum(first + blocks.to(tl.int64) * BLOCK, num_samples)
    if program == 0:
        tl.store(total, n)
    while first < stop:
        offsets = first + tl.arange(0, BLOCK)
        whole = first + BLOCK <= num_samples
        prunable = _is_prunable(source, offsets, whole, num_samples, limit, MASK)
        one = prunable.to(tl.int32)
        rank = before + tl.cumsum(one, axis=0) - one
        # Of the samples before this one, all that are not prunable come before it.
        at = tl.where(prunable, rank, n + offsets - rank)
        tl.store(positions + at, offsets.to(positions.dtype.element_ty), mask=offsets < num_samples)
        before += tl.sum(one, axis=0)
        first += BLOCK


def threshold(scores: Tensor) -> Tensor:
    """The mean of the scores seen, rounded up to float32; NaN where none was seen.

    Args:
        scores: (N,) float32, contiguous.

    Returns:
        () float32. Added in float64 in a fixed order: the same scores give the same bits.

    Raises:
        TypeError, ValueError: the scores are not as said; the message names dtype or shape.
    """
    check("scores", scores, torch.float32)
    if not scores.numel():
        return scores.new_full((), torch.nan)
    blocks, programs = _stretches(scores.numel())
    sums = scores.new_empty(programs, dtype=torch.float64)
    counts = scores.new_empty(programs, dtype=torch.int64)
    mean = scores.new_empty(())
    launch(_sums_kernel, programs, scores, sums, counts, scores.numel(), blocks, BLOCK=BLOCK)
    launch(_mean_kernel, 1, sums, counts, mean, programs, PROGRAMS=PROGRAMS)
    return mean


def partition(source: Tensor, threshold: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The samples' numbers with the prunable ones first, both parts in ascending order.

    Args:
        source: (N,) float32 scores, or (N,) bool, True where a sample is prunable; contiguous.
        threshold: () float32 with scores, of which those below it are prunable unless they are
            -inf; None with a mask.

    Returns:
        positions (N,) int32, int64 from N = 2**31 on; n, () int64.

    Raises:
        TypeError, ValueError: an argument is not as said; the message names it.
    """
    mask = threshold is None
    check("source", source, torch.bool if mask else torch.float32)
    if threshold is not None:
        check("threshold", threshold, torch.float32, (), source.device)
    num_samples = source.numel()
    positions = source.new_empty(num_samples, dtype=position_dtype(num_samples))
    if not num_samples:
        return positions, source.new_zeros((), dtype=torch.int64)
    blocks, programs = _stretches(num_samples)
    counts = source.new_empty(programs, dtype=torch.int64)
    total = source.new_empty((), dtype=torch.int64)
    if mask:
        source = source.view(torch.uint8)
    limit = counts if threshold is None else threshold
    launch(
        _count_kernel,
        programs,
        *(source, limit, counts, num_samples, blocks),
        MASK=mask,
        BLOCK=BLOCK,
    )
    launch(
        _partition_kernel,
        programs,
        *(source, limit, counts, positions, total, num_samples, blocks, programs),
        MASK=mask,
        BLOCK=BLOCK,
        PROGRAMS=PROGRAMS,
    )
    return positions, total


def _stretches(num_samples: int) -> tuple[int, int]:
    """Blocks that a program handles one after another, and programs."""
    blocks = triton.cdiv(num_samples, BLOCK)
    each = triton.cdiv(blocks, PROGRAMS)
    return each, triton.cdiv(blocks, each)
