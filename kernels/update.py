"""A batch's losses written into the scores, and the loss to differentiate, in one launch.

The Triton form of `reference.record` and `reference.rescaled_mean`. Dimensions: N samples, B batch.
No call waits for the device, and a CUDA graph may capture every one of them once it has run before
(Triton compiles a kernel at its first call; another B is no other kernel). Two runs give the same
bits: one program adds up the whole batch in a fixed order.

Under `torch.compile` the plain operations of `reference` are traced instead, which inductor fuses.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference

_BLOCK = 4096  # losses a program holds at a time, eight a thread
_OPTIONS: dict[str, Any] = {"BLOCK": _BLOCK, "num_warps": 16, "enable_fp_fusion": True}
_LOSSES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_INDICES = (torch.int64, torch.int32)


@triton.jit
def score(loss):
    """A loss, a block or a number of any floating dtype, as a score; for kernels to call."""
    value = loss.to(tl.float32)
    return tl.where(tl.abs(value) < float("inf"), value, float("nan"))


# B, and where a batch starts within its epoch, change from step to step: no variant for each.
@triton.jit(
    do_not_specialize=["batch", "num_samples"],
    do_not_specialize_on_alignment=[
        *("losses_ptr", "weights_ptr", "indices_ptr", "scores_ptr", "loss_ptr", "slopes_ptr")
    ],
)
def _update_kernel(
    losses_ptr,  # (B,) float64, float32, bfloat16 or float16
    weights_ptr,  # (B,) float32
    indices_ptr,  # (B,) int64 or int32; None without RECORD
    scores_ptr,  # (N,) float32, written; None without RECORD
    loss_ptr,  # () float64 or float32, written
    slopes_ptr,  # (B,) of the dtype of the loss, written; None without SLOPES
    batch,
    num_samples,
    RECORD: tl.constexpr,
    SLOPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    kind = loss_ptr.dtype.element_ty
    count = batch.to(kind)
    total = tl.zeros((BLOCK,), dtype=kind)
    start = tl.zeros((), dtype=tl.int64)
    # Not range(), which takes no tensor in the interpreter of Triton 3.6 under NumPy 2.4.
    while start < batch:
        at = start + tl.arange(0, BLOCK)
        valid = at < batch
        loss = tl.load(losses_ptr + at, mask=valid, other=0.0)
        weight = tl.load(weights_ptr + at, mask=valid, other=0.0).to(kind)
        term = loss.to(kind) * weight
        if RECORD:
            index = tl.load(indices_ptr + at, mask=valid, other=0).to(tl.int64)
            exists = (index >= 0) & (index < num_samples)
            tl.store(scores_ptr + index, score(loss), mask=valid & exists)
            term = tl.where(exists, term, float("nan"))
        if SLOPES:
            tl.store(slopes_ptr + at, weight / count, mask=valid)
        total += term
        start += BLOCK
    tl.store(loss_ptr, tl.sum(total, axis=0) / count)


@triton.jit(
    do_not_specialize=["batch", "num_samples"],
    do_not_specialize_on_alignment=["scores_ptr", "indices_ptr", "losses_ptr", "found_inf_ptr"],
)
def _record_kernel(
    scores_ptr,  # (N,) float32, written
    indices_ptr,  # (B,) int64 or int32
    losses_ptr,  # (B,) float64, float32, bfloat16 or float16
    found_inf_ptr,  # () floating; None without FOUND_INF
    batch,
    num_samples,
    FOUND_INF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    taken = True
    if FOUND_INF:
        taken = tl.load(found_inf_ptr) == 0  # False for NaN too
    if taken:
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        valid = at < batch
        loss = tl.load(losses_ptr + at, mask=valid, other=0.0)
        index = tl.load(indices_ptr + at, mask=valid, other=0).to(tl.int64)
        exists = (index >= 0) & (index < num_samples)
        tl.store(scores_ptr + index, score(loss), mask=valid & exists)


def update(
    losses: Tensor, weights: Tensor, indices: Tensor, scores: Tensor, *, record: bool = True
) -> Tensor:
    """The mean of weight * loss, differentiable in `losses`; and the losses become scores.

    One launch forward, and one backward (of torch: the slopes weight / B, which the forward pass
    wrote, times the incoming gradient). Empty input launches nothing and gives NaN.

    Args:
        losses: (B,) float32, float64, bfloat16 or float16, contiguous.
        weights: (B,) float32, contiguous.
        indices: (B,) int64 or int32, contiguous, without duplicates. One outside [0, N) writes
            nothing and makes the loss NaN.
        scores: (N,) float32, contiguous, written in place at `indices` as `reference.record` does:
            a loss that is not finite becomes NaN.
        record: False leaves the scores alone and does not look at the indices: for a step that
            decides after its backward pass and then calls `record`.

    Returns:
        () float64 for float64 losses, float32 otherwise: `reference.rescaled_mean` of the losses in
        that dtype, and accumulated in it. The gradient has the dtype of `losses`.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: an argument has another shape, layout or device, or requires a gradient.
    """
    check_vector("losses", losses, None, _LOSSES, None)
    check_vector("weights", weights, losses.numel(), (torch.float32,), losses.device)
    check_scores(indices, scores, losses)
    check_constant(weights=weights)
    if losses.numel() == 0 or torch.compiler.is_compiling():
        if record:
            reference.record(scores, indices.long(), losses)
        return reference.rescaled_mean(losses.to(_mean_dtype(losses)), weights)
    return _Update.apply(losses, weights, *((indices, scores) if record else (None, None)))


def record(
    scores: Tensor, indices: Tensor, losses: Tensor, found_inf: Tensor | None = None
) -> None:
    """Write a batch's losses into the scores, in place: `reference.record` in one launch.

    Args:
        scores: (N,) float32, contiguous, written at `indices`; a non-finite loss becomes NaN.
        indices: (B,) int64 or int32, contiguous, without duplicates; one outside [0, N) writes
            nothing.
        losses: (B,) float32, float64, bfloat16 or float16, contiguous.
        found_inf: () or (1,) of one of these dtypes; where it is not 0 the scores stay as they are.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: an argument has another shape, layout or device, or requires a gradient.
    """
    check_vector("losses", losses, None, _LOSSES, None)
    check_scores(indices, scores, losses)
    if found_inf is not None:
        check_scalar("found_inf", found_inf, _LOSSES, losses.device)
    if torch.compiler.is_compiling():
        reference.record(scores, indices.long(), losses, found_inf)
        return
    batch = losses.numel()
    if batch == 0:
        return
    check_launchable("losses", losses)
    options = {"FOUND_INF": found_inf is not None, **_OPTIONS}
    with torch.cuda.device_of(losses):
        _record_kernel[(triton.cdiv(batch, _BLOCK),)](
            scores,
            indices,
            losses,
            found_inf,
            batch,
            scores.numel(),
            **options,
        )


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, losses: Tensor, weights: Tensor, indices: Tensor | None, scores: Tensor | None
    ) -> Tensor:
        dtype = _mean_dtype(losses)
        loss = torch.empty((), dtype=dtype, device=losses.device)
        slopes = torch.empty_like(losses, dtype=dtype) if ctx.needs_input_grad[0] else None
        launch_update(losses, weights, indices, scores, loss, slopes)
        ctx.dtype = losses.dtype
        ctx.save_for_backward(slopes)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (slopes,) = ctx.saved_tensors
        if slopes.dtype == ctx.dtype:
            return slopes * grads[0], None, None, None
        # Cast by the product itself: one launch, rounded once.
        out = torch.empty_like(slopes, dtype=ctx.dtype)
        return torch.mul(slopes, grads[0], out=out), None, None, None


def launch_update(
    losses: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    scores: Tensor | None,
    loss: Tensor,
    slopes: Tensor | None,
) -> None:
    """Launch the kernel behind `update`, on arguments that are checked and not empty.

    Args:
        losses: as in `update`.
        weights: as in `update`.
        indices: as in `update`; None, with the scores, records nothing.
        scores: as in `update`.
        loss: () float64 for float64 losses, float32 otherwise, written: the mean.
        slopes: (B,) of the same dtype, written: weight / B, for a backward pass that needs it.
    """
    check_launchable("losses", losses)
    options = {"RECORD": scores is not None, "SLOPES": slopes is not None, **_OPTIONS}
    with torch.cuda.device_of(losses):
        _update_kernel[(1,)](
            losses,
            weights,
            indices,
            scores,
            loss,
            slopes,
            losses.numel(),
            0 if scores is None else scores.numel(),
            **options,
        )


def check_vector(
    name: str,
    vector: Tensor,
    length: int | None,
    dtypes: Sequence[torch.dtype],
    device: torch.device | None,
) -> None:
    """Check that an argument is a contiguous vector; None accepts any length or device.

    Raises:
        TypeError: it is no tensor, or of none of the dtypes.
        ValueError: it has another shape, layout or device.
    """
    check_dtype(name, vector, dtypes)
    if vector.dim() != 1 or length not in (None, vector.numel()):
        want = "(any,)" if length is None else f"({length},)"
        raise ValueError(f"{name} must have shape {want}, got {tuple(vector.shape)}")
    if not vector.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {vector.stride()}")
    _check_device(name, vector, device)


def check_scalar(
    name: str, scalar: Tensor, dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """Check that an argument is a tensor () or (1,); raises as `check_vector` does."""
    check_dtype(name, scalar, dtypes)
    if scalar.shape not in ((), (1,)):
        raise ValueError(f"{name} must have shape () or (1,), got {tuple(scalar.shape)}")
    _check_device(name, scalar, device)


def check_dtype(name: str, tensor: Tensor, dtypes: Sequence[torch.dtype]) -> None:
    """Raise TypeError unless an argument is a tensor of one of the dtypes."""
    got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
    if got not in dtypes:
        names = " or ".join(str(dtype) for dtype in dtypes)
        raise TypeError(f"{name} must be {names}, got {got}")


def check_scores(indices: Tensor, scores: Tensor, batch: Tensor) -> None:
    """Check what every function here takes: indices (B,) and scores (N,) for a batch (B, ...)."""
    check_vector("indices", indices, batch.shape[0], _INDICES, batch.device)
    check_vector("scores", scores, None, (torch.float32,), batch.device)
    check_constant(scores=scores)


def check_constant(**tensors: Tensor) -> None:
    """Raise ValueError for a tensor that requires a gradient: it would get none."""
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise ValueError(f"{name} must not require a gradient, got requires_grad=True")


def check_launchable(name: str, tensor: Tensor) -> None:
    """Raise ValueError unless a kernel can run where the tensor is: a GPU, or the interpreter."""
    if isinstance(_update_kernel, triton.JITFunction) and not tensor.is_cuda:
        raise ValueError(f"{name} must be on a CUDA device, got {tensor.device}")


def _check_device(name: str, tensor: Tensor, device: torch.device | None) -> None:
    if device not in (None, tensor.device):
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def _mean_dtype(losses: Tensor) -> torch.dtype:
    return torch.float64 if losses.dtype == torch.float64 else torch.float32
