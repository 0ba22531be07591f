"""Cross-entropy, the rescaled mean of it and its gradient in one launch.

Dimensions: B batch, C classes. What is computed is, sample by sample and in float32,
`F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)`, then
`reference.rescaled_mean`. NaN and infinite logits give what they give there, losses and gradients.
`ignore_index` is not supported: a label outside [0, C), where torch stops the device, makes its
sample's loss and gradient, and so the mean, NaN.

A small batch (B times C, rounded up to a power of two, at most 32,768: 200 samples of 10 or 100
classes) is one program's work, so the mean is at hand in the launch that made the losses. A larger
one is spread over the device, and torch takes the mean. The same input gives the same bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .launch import check, launch

MAX_CLASSES = 8192  # a row is held in registers, 16 logits a thread
_ALONE = 32768  # logits, padded, up to which one program takes the batch
_LOGITS = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit(
    do_not_specialize=["batch"],
    do_not_specialize_on_alignment=["labels", "weights", "scale", "mean", "losses"],
)
def _cross_entropy_kernel(
    logits,  # (B, C) float32, bfloat16 or float16, rows STRIDE apart
    labels,  # (B,) int64
    weights,  # (B,) float32
    scale,  # () float32; None without SCALE
    losses,  # (B,) float32, written
    gradient,  # (B, C) of the dtype of the logits, written
    mean,  # () float32, written by the only program; None without MEAN
    batch,
    SMOOTHING: tl.constexpr,
    STRIDE: tl.constexpr,
    CLASSES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    MEAN: tl.constexpr,
    SCALE: tl.constexpr,
):
    columns = tl.arange(0, COLUMNS)[None, :]
    present = columns < CLASSES
    count = batch.to(tl.float32)
    factor = 1.0 / count
    if SCALE:
        factor = tl.load(scale) / count
    total = tl.zeros((ROWS,), dtype=tl.float32)
    start = tl.program_id(0).to(tl.int64) * ROWS
    # Not range(), which takes no tensor in the interpreter of Triton 3.6 under NumPy 2.4.
    while start < batch:
        rows = start + tl.arange(0, ROWS)
        valid = rows < batch
        inside = (rows[:, None] < batch) & present
        # A row beyond the batch is read as zeros, label 0, weight 0: it adds a 0.
        row = tl.load(logits + rows[:, None] * STRIDE + columns, mask=inside, other=0.0)
        label = tl.load(labels + rows, mask=valid, other=0)
        weight = tl.load(weights + rows, mask=valid, other=0.0)
        known = (label >= 0) & (label < CLASSES)
        hit = columns == label.to(tl.int32)[:, None]

        logit = tl.where(present, row.to(tl.float32), float("-inf"))
        # The maximum may pass over a NaN; the sum of powers does not.
        shifted = logit - tl.max(logit, axis=1, keep_dims=True)
        power = tl.exp(shifted)
        powers = tl.sum(power, axis=1)
        log_powers = tl.log(powers)
        loss = log_powers - tl.sum(tl.where(hit, shifted, 0.0), axis=1)
        # Not with 0: 0 times the infinite loss of another class is NaN.
        if SMOOTHING > 0:
            others = CLASSES * log_powers - tl.sum(tl.where(present, shifted, 0.0), axis=1)
            loss = (1.0 - SMOOTHING) * loss + (SMOOTHING / CLASSES) * others
        loss = tl.where(known, loss, float("nan"))
        tl.store(losses + rows, loss, mask=valid)
        total += loss * weight

        slope = tl.where(known, weight * factor, float("nan"))
        target = tl.where(hit, 1.0 - SMOOTHING, 0.0) + SMOOTHING / CLASSES
        slopes = (power / tl.expand_dims(powers, 1) - target) * tl.expand_dims(slope, 1)
        tl.store(
            gradient + rows[:, None] * CLASSES + columns,
            slopes.to(gradient.dtype.element_ty),
            mask=inside,
        )
        start += tl.num_programs(0) * ROWS
    if MEAN:
        tl.store(mean, tl.sum(total, axis=0) / count)


def cross_entropy_gradient(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    label_smoothing: float = 0.0,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The mean of weight * cross-entropy, the losses, and the gradient for `logits.backward`.

    Nothing here is differentiable: autograd starts at the logits, with no launch in between. The
    gradient is rounded once, whatever scale the loss is multiplied by.

    Args:
        logits: (B, C) float32, bfloat16 or float16, C in [2, 8192], each row contiguous.
        labels: (B,) int64, contiguous, in [0, C).
        weights: (B,) float32, contiguous.
        label_smoothing: in [0, 1], as torch has it. Each value is a kernel of its own.
        scale: () or (1,) float32, of float16 loss scaling: the gradient is that of scale * loss,
            multiplied in float32 before it is rounded. The loss and the losses are not scaled.

    Returns:
        loss () float32, NaN of an empty batch; losses (B,) float32; the gradient (B, C) of the
        dtype of the logits: what `(scale * loss).backward()` would give them, save that a sum may
        be in another order.

    Raises:
        TypeError, ValueError: an argument is not as said; the message names it.
    """
    if logits.dim() != 2 or not 2 <= logits.shape[1] <= MAX_CLASSES:
        shape = tuple(logits.shape)
        raise ValueError(f"logits must have shape (B, 2 to {MAX_CLASSES}), got {shape}")
    batch, classes = logits.shape
    if (batch and logits.stride(1) != 1) or (batch > 1 and logits.stride(0) < classes):
        raise ValueError(f"logits must have contiguous rows, got strides {logits.stride()}")
    check("logits", logits[:1], _LOGITS, logits[:1].shape)
    check("labels", labels, torch.int64, (batch,), logits.device)
    check("weights", weights, torch.float32, (batch,), logits.device)
    if scale is not None:
        check("scale", scale, torch.float32, (), logits.device)
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be in [0, 1], got {label_smoothing}")
    logits = logits.detach()
    losses = torch.empty(batch, dtype=torch.float32, device=logits.device)
    gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
    columns = triton.next_power_of_2(classes)
    alone = 0 < batch * columns <= _ALONE
    mean = losses.new_empty(()) if alone else None
    # Rows that a program holds at a time, and its warps: 16 logits a thread, fewer if narrow.
    rows = min(1024, max(1, (8192 if alone else 2048) // columns))
    if batch:
        launch(
            _cross_entropy_kernel,
            1 if alone else triton.cdiv(batch, rows),
            *(logits, labels, weights, scale, losses, gradient, mean, batch),
            SMOOTHING=float(label_smoothing),
            STRIDE=logits.stride(0),
            CLASSES=classes,
            ROWS=rows,
            COLUMNS=columns,
            MEAN=alone,
            SCALE=scale is not None,
            num_warps=max(4, rows * columns // 512),
        )
    return reference.rescaled_mean(losses, weights) if mean is None else mean, losses, gradient
