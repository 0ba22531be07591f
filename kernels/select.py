"""Which operations a device gets: the Triton kernels where they prove themselves, else torch's."""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference, twin


class Kernels(NamedTuple):
    """The operations of this folder's modules, by their names there.

    Attributes:
        max_classes: the most that the cross-entropy takes.
    """

    threshold: Callable[..., Any]
    partition: Callable[..., Any]
    choose: Callable[..., Any]
    shuffle: Callable[..., Any]
    record: Callable[..., Any]
    cross_entropy_gradient: Callable[..., Any]
    lars: Callable[..., Any]
    max_classes: int


def triton_kernels(device: torch.device) -> Kernels | None:
    """The Triton kernels, if the device can run them; None where torch's operations must do.

    Before their first use on a device they are compared with torch's there, once, which compiles
    them. If one fails or differs none is used: a warning says so and why.
    """
    if device.type != "cuda":
        return None
    if device not in _PROVEN:
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
    from . import choose, cross_entropy, lars, prune, record

    return Kernels(
        prune.threshold,
        prune.partition,
        choose.choose,
        choose.shuffle,
        record.record,
        cross_entropy.cross_entropy_gradient,
        lars.Lars,
        cross_entropy.MAX_CLASSES,
    )


def prove(kernels: Kernels, device: torch.device) -> None:
    """Compare the kernels with torch's operations on small examples, whatever modes are on.

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
        _prove_record(kernels, indices)
        _prove_lars(kernels, device)


def _prove_choosing(kernels: Kernels, device: torch.device) -> tuple[Tensor, Tensor]:
    scores = _draw(device, 3000) * 4
    scores[::7] = torch.nan
    key = 0x9E3779B97F4A7C15
    threshold = reference.threshold(scores)
    _agree("threshold", kernels.threshold(scores), threshold, 1e-6)
    for source in ((reference.well_learned(scores),), (scores, threshold)):
        positions, count = kernels.partition(*source)
        expected, expected_count = twin.partition(*source)
        _agree("partition", positions, expected)
        _agree("partition", count, expected_count)
    n = int(expected_count)
    chosen = kernels.choose(expected, n, n // 2, 2.5, key)
    for got, want in zip(chosen, twin.choose(expected, n, n // 2, 2.5, key), strict=True):
        _agree("choose", got, want)
    _agree("shuffle", kernels.shuffle(3000, key, device), twin.shuffle(3000, key, device))
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
        _agree("cross_entropy_gradient", got, want.detach(), relative)


def _prove_record(kernels: Kernels, indices: Tensor) -> None:
    written = _draw(indices.device, 3000)
    expected = written.clone()
    losses = _draw(indices.device, 300) + 1
    losses[::3] = torch.inf
    flag = torch.ones((), dtype=torch.float32, device=indices.device)
    kernels.record(written, indices, losses, flag)  # a skipped step
    _agree("record", written, expected)
    reference.record(expected, indices, losses)
    kernels.record(written, indices, losses, torch.zeros_like(flag))
    _agree("record", written, expected)


def _prove_lars(kernels: Kernels, device: torch.device) -> None:
    weight, gradient = _draw(device, 2, 5000) - 0.5
    values = torch.tensor([0.5, 0.9, 4.0, 1.0], dtype=torch.float32, device=device)
    lr, momentum, scale, found = values.unbind()
    numbers = {"weight_decay": 0.1, "eta": 0.5, "max_trust": 9.0, "clip": 0.4}
    got = [weight.clone(), torch.ones_like(weight)]
    step = kernels.lars(got[:1], got[1:])
    for skipped in (found, None):
        step.measure([gradient * scale], scale)
        step.update(lr, momentum, **numbers, found=skipped)
    trust = 0.5 * weight.norm() / (gradient.norm() + 0.1 * weight.norm())
    buffer = 0.9 + (gradient + 0.1 * weight).clamp(-0.4, 0.4)
    _agree("lars", got[0], weight - 0.5 * trust * buffer, 1e-5)
    _agree("lars", got[1], buffer, 1e-5)


def _draw(device: torch.device, *shape: int) -> Tensor:
    """Uniform in [0, 1), the same on every device, whatever the defaults are."""
    generator = torch.Generator("cpu").manual_seed(shape[-1])
    return torch.rand(*shape, generator=generator, dtype=torch.float32, device="cpu").to(device)


def _agree(name: str, got: Tensor, want: Tensor, relative: float = 0.0) -> None:
    """Raise RuntimeError unless two results agree; NaN equals NaN."""
    same = got.shape == want.shape and got.dtype == want.dtype
    if not same or not torch.allclose(got, want, relative, relative, equal_nan=True):
        raise RuntimeError(f"the kernel {name} differs from torch's operations")
