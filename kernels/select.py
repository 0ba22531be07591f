"""Which operations a device gets: the Triton kernels where they prove themselves, else torch's."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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
    """Compare the kernels with torch's operations on small examples, whatever modes are on.

    Args:
        kernels: to be compared.
        device: where.

    Raises:
        RuntimeError: one differs; the message names it.
    """
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        indices, weights = _prove_choosing(kernels, device)
        for dtype, classes, relative in (
            (torch.float32, 10, 1e-4),
            (torch.bfloat16, 10, 0.02),
            (torch.bfloat16, 200, 0.02),  # more logits than one program takes
        ):
            _prove_cross_entropy(kernels, weights, dtype, classes, relative)
        _prove_update(kernels, indices, weights)


def _prove_choosing(kernels: Kernels, device: torch.device) -> tuple[Tensor, Tensor]:
    scores = _draw(device, 3000) * 4
    scores[::7] = torch.nan
    key = 0x9E3779B97F4A7C15
    threshold = reference.threshold(scores)
    agree("threshold", kernels.threshold(scores), threshold, 1e-6)
    for source in ((reference.well_learned(scores),), (scores, threshold)):
        positions, count = kernels.partition(*source)
        expected, expected_count = prune_torch.partition(*source)
        agree("partition", positions, expected)
        agree("partition", count, expected_count)
    n = int(expected_count)
    chosen = kernels.choose(expected, n, n // 2, 2.5, key)
    for got, want in zip(chosen, prune_torch.choose(expected, n, n // 2, 2.5, key), strict=True):
        agree("choose", got, want)
    agree("shuffle", kernels.shuffle(3000, key, device), prune_torch.shuffle(3000, key, device))
    return chosen[0][:300].contiguous(), chosen[1][:300].contiguous()


def _prove_cross_entropy(
    kernels: Kernels, weights: Tensor, dtype: torch.dtype, classes: int, relative: float
) -> None:
    device = weights.device
    logits = ((_draw(device, 300, classes) - 0.5) * 8).to(dtype).requires_grad_()
    labels = (_draw(device, 300) * classes).long()
    scale = torch.full((), 8.0, dtype=torch.float32, device=device)
    losses = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=0.1)
    mean = reference.rescaled_mean(losses, weights)
    (gradient,) = torch.autograd.grad(mean * scale, logits)
    fused = kernels.cross_entropy_gradient(
        logits.detach(), labels, weights, label_smoothing=0.1, scale=scale
    )
    for got, want in zip(fused, (mean, losses, gradient), strict=True):
        agree("cross_entropy", got, want.detach(), relative)


def _prove_update(kernels: Kernels, indices: Tensor, weights: Tensor) -> None:
    written = _draw(weights.device, 3000)
    expected = written.clone()
    losses = _draw(weights.device, 300).requires_grad_()
    mean = kernels.update(losses, weights, indices, written)
    agree("update", mean.detach(), reference.rescaled_mean(losses, weights).detach(), 1e-5)
    (gradient,) = torch.autograd.grad(mean, losses)
    agree("update", gradient, weights / 300, 1e-6)
    reference.record(expected, indices, losses)
    agree("update", written, expected)
    other = losses.detach() + 1
    other[::3] = torch.inf
    flag = torch.ones((), dtype=torch.float32, device=weights.device)
    kernels.record(written, indices, other, flag)  # a skipped step
    agree("record", written, expected)
    kernels.record(written, indices, other, torch.zeros_like(flag))
    reference.record(expected, indices, other)
    agree("record", written, expected)


def _draw(device: torch.device, *shape: int) -> Tensor:
    """Uniform in [0, 1), the same on every device, whatever the defaults are."""
    generator = torch.Generator("cpu").manual_seed(shape[-1])
    return torch.rand(*shape, generator=generator, dtype=torch.float32, device="cpu").to(device)


def agree(name: str, got: Tensor, want: Tensor, relative: float = 0.0) -> None:
    """Raise RuntimeError unless two results agree; NaN equals NaN."""
    same = got.shape == want.shape and got.dtype == want.dtype
    if not same or not torch.allclose(got, want, relative, relative, equal_nan=True):
        raise RuntimeError(f"the kernel {name} differs from torch's operations")
