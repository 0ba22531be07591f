"""Which operations a device gets: the Triton kernels where they prove themselves, else torch's."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from . import prune_torch, reference


class Kernels(NamedTuple):
    """The operations of `prune`, `choose`, `update` and `cross_entropy`, by their names there.

    Attributes:
        max_classes: the most that the cross-entropy takes.
    """

    threshold: Callable[..., Any]
    partition: Callable[..., Any]
    choose: Callable[..., Any]
    shuffle: Callable[..., Any]
    update: Callable[..., Any]
    record: Callable[..., Any]
    cross_entropy_gradient: Callable[..., Any]
    max_classes: int


def triton_kernels(device: torch.device) -> Kernels | None:
    """The Triton kernels, if the device can run them; None where torch's operations must do.

    Before their first use on a device they are compared with torch's there, once, which compiles
    them. One that fails or differs is not used: a warning says so and why.

    Args:
        device: of the tensors that they will be given.
    """
    if device.type != "cuda":
        return None
    if device not in _PROVEN:
        kernels = None
        try:
            kernels = load()
            with torch.cuda.device(device):
                prove(kernels, device)
        except Exception as error:  # no Triton; of the compiler or the driver; or of `prove`
            kernels = None
            why = " ".join(str(error).split())[:300] or type(error).__name__
            warnings.warn(
                f"torch's operations stand in for the Triton kernels: {why}", stacklevel=2
            )
        _PROVEN[device] = kernels
    return _PROVEN[device]


_PROVEN: dict[torch.device, Kernels | None] = {}  # functools' cache would stop torch.compile


def load() -> Kernels:
    """The Triton kernels, unproven."""
    from . import choose, cross_entropy, prune, update

    return Kernels(
        prune.threshold,
        prune.partition,
        choose.choose,
        choose.shuffle,
        update.update,
        update.record,
        cross_entropy.cross_entropy_gradient,
        cross_entropy.MAX_CLASSES,
    )


def prove(kernels: Kernels, device: torch.device) -> None:
    """Compare the kernels with torch's operations on a small example.

    Args:
        kernels: to be compared.
        device: where.

    Raises:
        RuntimeError: one differs; the message names it.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    scores = draw(3000) * 4
    scores[::7] = torch.nan
    key = 0x9E3779B97F4A7C15
    threshold = reference.threshold(scores)
    agree("threshold", kernels.threshold(scores), threshold, 1e-6)
    for source in ((scores, threshold), (reference.well_learned(scores),)):
        positions, count = kernels.partition(*source)
        expected, n = prune_torch.partition(*source)
        agree("partition", positions, expected)
        agree("partition", count, n)
    n = int(n)
    chosen = kernels.choose(positions, n, n // 2, 2.5, key)
    expected_choice = prune_torch.choose(positions, n, n // 2, 2.5, key)
    for got, want in zip(chosen, expected_choice, strict=True):
        agree("choose", got, want)
    agree("shuffle", kernels.shuffle(3000, key, device), prune_torch.shuffle(3000, key, device))

    indices, weights = chosen[0][:300].contiguous(), chosen[1][:300].contiguous()
    logits, labels = (draw(300, 10) - 0.5) * 8, (draw(300) * 10).long()
    scale = torch.full((), 8.0, device=device)
    attached = logits.clone().requires_grad_()
    losses = F.cross_entropy(attached, labels, reduction="none", label_smoothing=0.1)
    mean = reference.rescaled_mean(losses, weights)
    (wanted,) = torch.autograd.grad(mean * scale, attached)
    fused = kernels.cross_entropy_gradient(
        logits, labels, weights, label_smoothing=0.1, scale=scale
    )
    for got, want in zip(fused, (mean, losses, wanted), strict=True):
        agree("cross_entropy", got, want.detach(), 1e-4)
    losses = losses.detach().requires_grad_()
    written, expected = scores.clone(), scores.clone()
    mine = kernels.update(losses, weights, indices, written)
    agree("update", mine.detach(), mean.detach(), 1e-5)
    (gradient,) = torch.autograd.grad(mine, losses)
    agree("update", gradient, weights / 300, 1e-6)
    reference.record(expected, indices, losses)
    agree("update", written, expected)
    other = losses.detach() + 1
    other[::3] = torch.inf
    kernels.record(written, indices, other, torch.ones((), device=device))  # a skipped step
    agree("record", written, expected)
    kernels.record(written, indices, other, torch.zeros((), device=device))
    reference.record(expected, indices, other)
    agree("record", written, expected)


def agree(name: str, got: torch.Tensor, want: torch.Tensor, relative: float = 0.0) -> None:
    """Raise RuntimeError unless two results agree; NaN equals NaN."""
    same = got.shape == want.shape and got.dtype == want.dtype
    if not same or not torch.allclose(got, want, relative, relative, equal_nan=True):
        raise RuntimeError(f"the kernel {name} differs from torch's operations")
