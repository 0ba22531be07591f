"""Learning rate and momentum as functions of the training's progress, and into an optimizer."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Of the InfoBatch runs: where the peak is, and how far below it start and end of the training lie.
PEAK, DIV, FINAL_DIV = 0.3, 25.0, 1e4
LOW, HIGH = 0.85, 0.95  # momentum


def one_cycle(progress: float, *, max_lr: float) -> tuple[float, float]:
    """Learning rate and momentum of the one-cycle policy (Smith 2018, arXiv:1803.09820).

    Two cosines. The rate goes from max_lr / DIV up to max_lr at PEAK of the training, then down to
    max_lr / DIV / FINAL_DIV; the momentum from the top of its range to the bottom and back. The
    progress is the part of the training done, (epoch + step / steps in this epoch) / epochs.
    """
    start = max_lr / DIV
    if progress < PEAK:
        part = progress / PEAK
        return _cosine(start, max_lr, part), _cosine(HIGH, LOW, part)
    part = (progress - PEAK) / (1 - PEAK)
    return _cosine(max_lr, start / FINAL_DIV, part), _cosine(LOW, HIGH, part)


def _cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


def mixup_share(alpha: float, seed: int, epoch: int, number: int) -> float:
    """A step's larger share of mixup (arXiv:1710.09412), whose two are Beta(alpha, alpha)."""
    share = np.random.default_rng((seed, epoch, number)).beta(alpha, alpha)
    return max(share, 1 - share)


def set_schedule(optimizer: torch.optim.Optimizer, lr: float, momentum: float) -> None:
    """Set learning rate and momentum (beta1) of every group: a fill where it holds a tensor."""
    for group in optimizer.param_groups:
        group["lr"] = _filled(group["lr"], lr)
        if "momentum" in group:
            group["momentum"] = _filled(group["momentum"], momentum)
        else:
            beta1, *rest = group["betas"]
            group["betas"] = (_filled(beta1, momentum), *rest)


def _filled(held: Any, value: float) -> Any:
    return held.fill_(value) if isinstance(held, Tensor) else value
