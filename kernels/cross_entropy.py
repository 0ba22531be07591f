"""Cross-entropy, the rescaled mean of it, its gradient and the scores, in one launch.

Dimensions: N samples, B batch, C classes. What is computed is, sample by sample and in float32,
`F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)`, then
`reference.rescaled_mean` and `reference.record`. NaN and infinite logits give what they give there,
losses and gradients. `ignore_index` is not supported: a label outside [0, C), where torch stops the
device, makes its sample's loss and gradient, and so the mean, NaN.

How many launches: a small batch (B times C, rounded up to a power of two, at most 32,768: 200
samples of 10 or 100 classes) is one program's work, so the mean is at hand in the launch that made
the losses. A larger one is spread over the device, and a second launch, that of `update`, takes the
mean. The alternative, a counter by which the last program to finish knows that it may add up, would
save that short launch where a step is long, and cost a buffer that must be zero before each launch,
which two streams or two graphs cannot share. The same input gives the same bits every time.

Under `torch.compile` plain torch operations are traced instead, which inductor fuses.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .update import (
    check_constant,
    check_dtype,
    check_launchable,
    check_scalar,
    check_scores,
    check_vector,
    launch_update,
    score,
)

MAX_CLASSES = 8192  # a row is held in registers, 16 logits a thread
_ALONE = 32768  # logits, padded, up to which one program takes the batch
_LOGITS = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit(
    do_not_specialize=["batch", "num_samples"],
    do_not_specialize_on_alignment=[
        *("labels_ptr", "weights_ptr", "indices_ptr", "scores_ptr"),
        *("scale_ptr", "loss_ptr", "losses_ptr"),
    ],
)
def _cross_entropy_kernel(
    logits_ptr,  # (B, C) float32, bfloat16 or float16, rows STRIDE apart
    labels_ptr,  # (B,) int64
    weights_ptr,  # (B,) float32
    indices_ptr,  # (B,) int64 or int32; None without RECORD
    scores_ptr,  # (N,) float32, written; None without RECORD
    scale_ptr,  # () float32; None without SCALE
    loss_ptr,  # () float32, written by the only program; None without MEAN
    losses_ptr,  # (B,) float32, written; None without LOSSES
    gradient_ptr,  # (B, C) of the dtype of the logits, written; None without GRADIENT
    batch,
    num_samples,
    SMOOTHING: tl.constexpr,
    STRIDE: tl.constexpr,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOSSES: tl.constexpr,
    MEAN: tl.constexpr,
    RECORD: tl.constexpr,
    GRADIENT: tl.constexpr,
    SCALE: tl.constexpr,
):
    columns = tl.arange(0, COLUMNS)[None, :]
    present = columns < CLASSES
    count = batch.to(tl.float32)
    factor = 1.0 / count
    if SCALE:
        factor = tl.load(scale_ptr) / count
    mean = tl.zeros((ROWS,), dtype=tl.float32)
    start = tl.program_id(0).to(tl.int64) * ROWS
    # Not range(), which takes no tensor in the interpreter of Triton 3.6 under NumPy 2.4.
    while start < batch:
        rows = start + tl.arange(0, ROWS)
        valid = rows < batch
        inside = (rows[:, None] < batch) & present
        # A row beyond the batch is read as zeros, label 0, weight 0, index 0: it adds a 0.
        row = tl.load(logits_ptr + rows[:, None] * STRIDE + columns, mask=inside, other=0.0)
        logits = tl.where(present, row.to(tl.float32), float("-inf"))
        label = tl.load(labels_ptr + rows, mask=valid, other=0)
        weight = tl.load(weights_ptr + rows, mask=valid, other=0.0)
        known = (label >= 0) & (label < CLASSES)
        hit = columns == label.to(tl.int32)[:, None]

        # The maximum may pass over a NaN; the sum of powers does not.
        shifted = logits - tl.max(logits, axis=1, keep_dims=True)
        power = tl.exp(shifted)
        total = tl.sum(power, axis=1)
        if LOSSES:
            log_total = tl.log(total)
            loss = log_total - tl.sum(tl.where(hit, shifted, 0.0), axis=1)
            # Not with 0: 0 times the infinite loss of another class is NaN.
            if SMOOTHING > 0:
                others = CLASSES * log_total - tl.sum(tl.where(present, shifted, 0.0), axis=1)
                loss = (1.0 - SMOOTHING) * loss + (SMOOTHING / CLASSES) * others
            loss = tl.where(known, loss, float("nan"))
            tl.store(losses_ptr + rows, loss, mask=valid)
            if MEAN:
                term = loss * weight
                if RECORD:
                    index = tl.load(indices_ptr + rows, mask=valid, other=0).to(tl.int64)
                    exists = (index >= 0) & (index < num_samples)
                    tl.store(scores_ptr + index, score(loss), mask=valid & exists)
                    term = tl.where(exists, term, float("nan"))
                mean += term
        if GRADIENT:
            slope = tl.where(known, weight * factor, float("nan"))
            target = tl.where(hit, 1.0 - SMOOTHING, 0.0) + SMOOTHING / CLASSES
            gradient = (power / tl.expand_dims(total, 1) - target) * tl.expand_dims(slope, 1)
            tl.store(
                gradient_ptr + rows[:, None] * CLASSES + columns,
                gradient.to(gradient_ptr.dtype.element_ty),
                mask=inside,
            )
        start += tl.num_programs(0) * ROWS
    if MEAN:
        tl.store(loss_ptr, tl.sum(mean, axis=0) / count)


def cross_entropy_update(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    indices: Tensor | None = None,
    scores: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The mean of weight * cross-entropy, differentiable in `logits`; and the losses, as scores.

    One launch forward where the batch is small, two where it is not, and one backward, which
    computes the softmax anew and takes the incoming gradient in: no (B, C) tensor is kept but the
    logits, and the gradient is rounded once, whatever scale the loss was multiplied by. Empty input
    launches nothing and gives NaN.

    Args:
        logits: (B, C) float32, bfloat16 or float16, C in [2, 8192], each row contiguous.
        labels: (B,) int64, contiguous, in [0, C).
        weights: (B,) float32, contiguous.
        indices: (B,) int64 or int32, contiguous, without duplicates. One outside [0, N) writes
            nothing and makes the loss NaN.
        scores: (N,) float32, contiguous, written in place at `indices`; a loss that is not finite
            becomes NaN. Without indices and scores nothing is recorded: for a step that decides
            after its backward pass and then calls `update.record`.
        label_smoothing: in [0, 1], as torch has it. Each value is a kernel of its own.

    Returns:
        loss () float32, and losses (B,) float32, which are not differentiable.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: an argument has another shape, layout or device, requires a gradient that it
            would not get, or is out of range.
        RuntimeError: of the backward pass, where it is to be differentiated in turn.
    """
    _check(logits, labels, weights, indices, scores, label_smoothing)
    arguments = (logits, labels, weights, indices, scores, label_smoothing)
    if logits.shape[0] == 0 or torch.compiler.is_compiling():
        return _plain(*arguments)
    return _CrossEntropy.apply(*arguments)


def cross_entropy_gradient(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    indices: Tensor | None = None,
    scores: Tensor | None = None,
    label_smoothing: float = 0.0,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`cross_entropy_update` and the gradient in the same launch, for `logits.backward(gradient)`.

    Nothing here is differentiable: autograd starts at the logits, with no launch in between.

    Args:
        logits: as in `cross_entropy_update`, and so on to `label_smoothing`.
        labels: as there.
        weights: as there.
        indices: as there.
        scores: as there.
        label_smoothing: as there.
        scale: () or (1,) float32, of float16 loss scaling: the gradient is that of scale * loss,
            multiplied in float32 before it is rounded. The loss and the losses are not scaled.

    Returns:
        loss () float32, losses (B,) float32, and the gradient (B, C) of the dtype of the logits:
        what `(scale * loss).backward()` would give them, save that a sum may be in another order.

    Raises:
        TypeError: an argument has another dtype.
        ValueError: as in `cross_entropy_update`.
    """
    _check(logits, labels, weights, indices, scores, label_smoothing)
    if scale is not None:
        check_scalar("scale", scale, (torch.float32,), logits.device)
    logits = logits.detach()
    if logits.shape[0] == 0 or torch.compiler.is_compiling():
        loss, losses = _plain(logits, labels, weights, indices, scores, label_smoothing)
        return loss, losses, _plain_gradient(logits, labels, weights, label_smoothing, scale)
    loss, losses = _allocate(logits)
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    _launch(
        *(logits, labels, weights, indices, scores, label_smoothing, scale),
        *(loss, losses, gradient),
    )
    return loss, losses, gradient


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        weights: Tensor,
        indices: Tensor | None,
        scores: Tensor | None,
        label_smoothing: float,
    ) -> tuple[Tensor, Tensor]:
        loss, losses = _allocate(logits)
        arguments = (logits, labels, weights, indices, scores, label_smoothing)
        _launch(*arguments, None, loss, losses, None)
        ctx.label_smoothing = label_smoothing
        ctx.save_for_backward(logits, labels, weights)
        ctx.mark_non_differentiable(losses)
        ctx.set_materialize_grads(False)  # or the losses' zeros would be a launch
        return loss, losses

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise RuntimeError("cross_entropy_update must not be differentiated twice")
        logits, labels, weights = ctx.saved_tensors
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        arguments = (logits, labels, weights, None, None, ctx.label_smoothing)
        _launch(*arguments, grads[0], None, None, gradient)
        return gradient, None, None, None, None, None


def _allocate(logits: Tensor) -> tuple[Tensor, Tensor]:
    loss = torch.empty((), dtype=torch.float32, device=logits.device)
    return loss, torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)


def _launch(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    scores: Tensor | None,
    label_smoothing: float,
    scale: Tensor | None,
    loss: Tensor | None,
    losses: Tensor | None,
    gradient: Tensor | None,
) -> None:
    """Write what is given of the mean loss with the losses, and of the gradient."""
    check_launchable("logits", logits)
    batch, classes = logits.shape
    columns = triton.next_power_of_2(classes)
    alone = loss is not None and batch * columns <= _ALONE
    rows, num_warps = _tile(columns, alone)
    options: dict[str, Any] = {
        "SMOOTHING": float(label_smoothing),
        "STRIDE": logits.stride(0),
        "CLASSES": classes,
        "ROWS": rows,
        "COLUMNS": columns,
        "LOSSES": losses is not None,
        "MEAN": alone,
        "RECORD": alone and scores is not None,
        "GRADIENT": gradient is not None,
        "SCALE": scale is not None,
        "num_warps": num_warps,
        "enable_fp_fusion": True,
    }
    with torch.cuda.device_of(logits):
        _cross_entropy_kernel[(1 if alone else triton.cdiv(batch, rows),)](
            logits,
            labels,
            weights,
            indices if alone else None,
            scores if alone else None,
            scale,
            loss if alone else None,
            losses,
            gradient,
            batch,
            scores.numel() if alone and scores is not None else 0,
            **options,
        )
    if loss is not None and losses is not None and not alone:
        launch_update(losses, weights, indices, scores, loss, None)


def _tile(columns: int, alone: bool) -> tuple[int, int]:
    """Rows that a program holds at a time, and its warps: 16 logits a thread, fewer if narrow."""
    rows = min(1024, max(1, (8192 if alone else 2048) // columns))
    return rows, max(4, rows * columns // 512)


def _plain(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    scores: Tensor | None,
    label_smoothing: float,
) -> tuple[Tensor, Tensor]:
    losses = F.cross_entropy(
        logits.float(), labels, reduction="none", label_smoothing=label_smoothing
    )
    if indices is not None and scores is not None:
        reference.record(scores, indices.long(), losses)
    return reference.rescaled_mean(losses, weights), losses.detach()


def _plain_gradient(
    logits: Tensor, labels: Tensor, weights: Tensor, label_smoothing: float, scale: Tensor | None
) -> Tensor:
    batch, classes = logits.shape
    hit = torch.arange(classes, device=logits.device) == labels[:, None]
    target = hit * (1 - label_smoothing) + label_smoothing / classes
    slope = weights * ((1.0 if scale is None else scale) / max(batch, 1))
    return ((logits.float().softmax(1) - target) * slope[:, None]).to(logits.dtype)


def _check(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    scores: Tensor | None,
    label_smoothing: float,
) -> None:
    check_dtype("logits", logits, _LOGITS)
    if logits.dim() != 2 or not 2 <= logits.shape[1] <= MAX_CLASSES:
        shape = tuple(logits.shape)
        raise ValueError(f"logits must have shape (any, 2 to {MAX_CLASSES}), got {shape}")
    batch, classes = logits.shape
    if (batch and logits.stride(1) != 1) or (batch > 1 and logits.stride(0) < classes):
        strides = f"({classes} or more, 1)"
        raise ValueError(f"logits must have strides {strides}, got {logits.stride()}")
    check_vector("labels", labels, batch, (torch.int64,), logits.device)
    check_vector("weights", weights, batch, (torch.float32,), logits.device)
    check_constant(weights=weights)
    if (indices is None) != (scores is None):
        got = "no scores" if scores is None else "no indices"
        raise ValueError(f"indices and scores must be given together, got {got}")
    if indices is not None and scores is not None:
        check_scores(indices, scores, logits)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
