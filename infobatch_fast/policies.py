"""Which samples an epoch may leave out, as pure functions from scores to a mask.

A policy names the *prunable* samples alone. How many of them are kept, which, with what weight and
in what order is the same for all (`kernels.reference.choose`): two policies differ in nothing else.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from infobatch_fast.kernels import reference


def soft(scores: Tensor) -> Tensor:
    """InfoBatch (arXiv:2303.04947): samples whose last loss is below the mean of those seen.

    Args:
        scores: (N,) float32, NaN where not seen.

    Returns:
        (N,) bool.
    """
    return reference.well_learned(scores)


def random(scores: Tensor) -> Tensor:
    """Every sample seen before, whatever its loss: a fresh uniform subset each epoch.

    Args:
        scores: (N,) float32, NaN where not seen.

    Returns:
        (N,) bool.
    """
    return scores.isfinite()


def none(scores: Tensor) -> Tensor:
    """No sample: every epoch is full.

    Args:
        scores: (N,) float32.

    Returns:
        (N,) bool, all False.
    """
    return torch.zeros_like(scores, dtype=torch.bool)


POLICIES: dict[str, Callable[[Tensor], Tensor]] = {"soft": soft, "random": random, "none": none}
