"""Learning rate and momentum as functions of the training's progress, and into an optimizer."""

import math
from typing import Any

import torch
from torch import Tensor


def one_cycle(
    progress: float,
    *,
    max_lr: float,
    pct_start: float = 0.3,
    div: float = 25.0,
    final_div: float = 1e4,
    momentum_range: tuple[float, float] = (0.85, 0.95),
) -> tuple[float, float]:
    """Learning rate and momentum of the one-cycle policy (Smith 2018, arXiv:1803.09820).

    Two cosines. The rate goes from max_lr / div up to max_lr at `pct_start` of the training, then
    down to max_lr / div / final_div; the momentum from the top of its range to the bottom and back.

    Args:
        progress: Part of the training done, (epoch + step / steps in this epoch) / epochs.
        max_lr: The highest learning rate.
        pct_start: Where it is reached.
        div: How far below it the training starts.
        final_div: How far below its start the training ends.
        momentum_range: The lowest and the highest momentum.

    Raises:
        ValueError: If progress is outside [0, 1] or pct_start outside (0, 1).
    """
    if not 0 <= progress <= 1:
        raise ValueError(f"progress must be in [0, 1], got {progress}")
    if not 0 < pct_start < 1:
        raise ValueError(f"pct_start must be in (0, 1), got {pct_start}")
    low, high = momentum_range
    start = max_lr / div
    if progress < pct_start:
        part = progress / pct_start
        return _cosine(start, max_lr, part), _cosine(high, low, part)
    part = (progress - pct_start) / (1 - pct_start)
    return _cosine(max_lr, start / final_div, part), _cosine(low, high, part)


def _cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


def set_schedule(optimizer: torch.optim.Optimizer, lr: float, momentum: float) -> None:
    """Sets learning rate and momentum (beta1) of every group: a fill where it holds a tensor."""
    for group in optimizer.param_groups:
        group["lr"] = _filled(group["lr"], lr)
        if "momentum" in group:
            group["momentum"] = _filled(group["momentum"], momentum)
        else:
            beta1, *rest = group["betas"]
            group["betas"] = (_filled(beta1, momentum), *rest)


def _filled(held: Any, value: float) -> Any:
    return held.fill_(value) if isinstance(held, Tensor) else value
