"""A batch's losses written into the scores, in one launch: the Triton form of `reference.record`.

Dimensions: N samples, B batch. It does not wait for the device, and a CUDA graph may capture it
once it has run before (another B is no other kernel).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check, launch

_BLOCK = 1024
_LOSSES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# B, and where a batch starts within its epoch, change from step to step: no variant for each.
@triton.jit(
    do_not_specialize=["batch", "num_samples"],
    do_not_specialize_on_alignment=["scores", "indices", "losses", "found_inf"],
)
def _record_kernel(
    scores,  # (N,) float32, written
    indices,  # (B,) int64
    losses,  # (B,) float64, float32, bfloat16 or float16
    found_inf,  # () floating; None without FOUND_INF
    batch,
    num_samples,
    FOUND_INF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    taken = True
    if FOUND_INF:
        taken = tl.load(found_inf) == 0  # False for NaN too
    if taken:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        valid = at < batch
        loss = tl.load(losses + at, mask=valid, other=0.0).to(tl.float32)
        index = tl.load(indices + at, mask=valid, other=0)
        exists = (index >= 0) & (index < num_samples)
        score = tl.where(tl.abs(loss) < float("inf"), loss, float("nan"))
        tl.store(scores + index, score, mask=valid & exists)


def record(
    scores: Tensor, indices: Tensor, losses: Tensor, found_inf: Tensor | None = None
) -> None:
    """Write a batch's losses into the scores, in place; a non-finite loss becomes NaN.

    Args:
        scores: (N,) float32, contiguous, written at `indices`.
        indices: (B,) int64, contiguous, without duplicates; one outside [0, N), where torch stops
            the device, writes nothing.
        losses: (B,) float32, float64, bfloat16 or float16, contiguous.
        found_inf: () or (1,) of one of these dtypes; where it is not 0 the scores stay as they are.

    Raises:
        TypeError, ValueError: an argument is not as said; the message names it.
    """
    check("losses", losses, _LOSSES)
    check("indices", indices, torch.int64, (losses.numel(),), losses.device)
    check("scores", scores, torch.float32, None, losses.device)
    if found_inf is not None:
        check("found_inf", found_inf, _LOSSES, (), losses.device)
    if losses.numel():
        launch(
            _record_kernel,
            triton.cdiv(losses.numel(), _BLOCK),
            *(scores, indices, losses, found_inf, losses.numel(), scores.numel()),
            FOUND_INF=found_inf is not None,
            BLOCK=_BLOCK,
        )
