"""What the results of the kernels' benchmark must be, told without the code that is measured.

Dimensions: N samples, n prunable, k of those kept, K kept in all, T parameter tensors.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


class Mismatch(RuntimeError):
    """A side does other work than it must."""


def agree(name: str, got: Tensor, want: Tensor, relative: float) -> None:
    """Raise Mismatch unless values agree to a relative error; NaN equals NaN.

    Args:
        name: for the message.
        got: any floating dtype.
        want: of the same shape.
        relative: error, and as much of 1% of the largest value for those near 0; 0 is equality.
    """
    if got.shape != want.shape:
        raise Mismatch(f"{name}: shape {tuple(got.shape)} and not {tuple(want.shape)}")
    want, got = want.double(), got.double()
    largest = want.abs().nan_to_num(0.0).max().item() if relative else 0.0
    if not torch.allclose(got, want, relative, 1e-2 * relative * largest, equal_nan=True):
        raise Mismatch(f"{name}: not the expected values")


def check_partition(outputs: Sequence[Tensor], prunable: Tensor, n: int) -> None:
    """Both parts hold what they must, in ascending order.

    Args:
        outputs: positions (N,) and n ().
        prunable: (N,) bool.
        n: how many of it are True.
    """
    positions, count = outputs
    parts = positions[:n], positions[n:]
    if positions.shape != prunable.shape or int(count) != n:
        raise Mismatch("partition: other counts")
    if not bool(prunable[parts[0]].all()) or bool(prunable[parts[1]].any()):
        raise Mismatch("partition: a sample in the wrong part")
    if any(bool((part[1:] <= part[:-1]).any()) for part in parts):
        raise Mismatch("partition: a part that does not ascend")


def check_epoch(outputs: Sequence[Tensor], prunable: Tensor, n: int, k: int) -> None:
    """Each other sample, k of the n prunable ones, none twice, with their weights, shuffled.

    Args:
        outputs: indices (K,) and weights (K,).
        prunable: (N,) bool.
        n: how many of it are True.
        k: of those, how many stay.
    """
    indices, weights = outputs
    kept = prunable.numel() - n + k
    if indices.shape != (kept,) or weights.shape != (kept,):
        raise Mismatch(f"epoch: {tuple(indices.shape)} samples and not {kept}")
    seen = torch.zeros_like(prunable)
    seen[indices] = True
    if int(seen.sum()) != kept or int((seen & prunable).sum()) != k:
        raise Mismatch("epoch: a sample twice, or another number of prunable ones")
    of = prunable[indices]
    if not bool((weights == torch.where(of, n / k if n else 1.0, 1.0).to(weights.dtype)).all()):
        raise Mismatch("epoch: a weight that is neither n/k nor 1 where it must be")
    check_even("indices", indices)
    check_even("weights", weights)


def check_permutation(samples: int, outputs: Sequence[Tensor]) -> None:
    """Each of [0, N) once, shuffled."""
    (indices,) = outputs
    seen = torch.zeros(samples, dtype=torch.bool, device=indices.device)
    seen[indices] = True
    if indices.shape != (samples,) or not bool(seen.all()):
        raise Mismatch("shuffle: no permutation")
    check_even("shuffle", indices)


def check_even(name: str, values: Tensor) -> None:
    """Raise Mismatch where the first half's mean is six standard errors off: that is no shuffle."""
    half = values.numel() // 2
    if half < 2:
        return
    off = values[:half].mean(dtype=torch.float64) - values.mean(dtype=torch.float64)
    error = values.double().std() / half**0.5
    if bool(off.abs() > 6 * error + 1e-9):
        raise Mismatch(f"{name}: not shuffled")


def lars_loop(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    buffers: Sequence[Tensor],
    lr: Tensor,
    momentum: Tensor,
) -> None:
    """A step of LARS, a tensor at a time, in place; the numbers are the defaults of `optim.LARS`.

    Args:
        params: T tensors.
        grads: their gradients.
        buffers: their momenta.
        lr: ().
        momentum: ().
    """
    for w, g, buffer in zip(params, grads, buffers, strict=True):
        of_w, of_g = w.norm(), g.norm()
        trust = (0.001 * of_w / (of_g + 5e-4 * of_w)).clamp(max=50.0)
        trust = trust.masked_fill((of_w == 0) | (of_g == 0), 1.0)
        buffer.mul_(momentum).add_((g + 5e-4 * w).clamp(-10.0, 10.0))
        w.sub_(lr * trust * buffer)


def lamb_loop(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    means: Sequence[Tensor],
    squares: Sequence[Tensor],
    count: Tensor,
    lr: Tensor,
    beta1: Tensor,
) -> None:
    """A step of LAMB, a tensor at a time, in place; the numbers are the defaults of `optim.LAMB`.

    Args:
        params: T tensors.
        grads: their gradients.
        means: their first moments.
        squares: their second moments.
        count: (), the steps taken.
        lr: ().
        beta1: ().
    """
    count.add_(1)
    first, second = 1 - beta1**count, 1 - 0.999**count
    for w, g, mean, square in zip(params, grads, means, squares, strict=True):
        mean.mul_(beta1).add_(g * (1 - beta1))
        square.mul_(0.999).addcmul_(g, g, value=1 - 0.999)
        u = (mean / first) / ((square / second).sqrt() + 1e-6) + 5e-4 * w
        of_w, of_u = w.norm(), u.norm()
        trust = (of_w / of_u).clamp(max=10.0).masked_fill((of_w == 0) | (of_u == 0), 1.0)
        w.sub_(lr * trust * u)
