"""How many samples an epoch leaves out: a ratio, a schedule of it, or a share of the whole run."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infobatch_fast.errors import reason
from infobatch_fast.pruning import DELTA, Pruning

PODS_PERIOD = 10  # epochs, about: whole periods fit the epochs that prune
PODS_SWING = 0.5  # of the ratio, to either side
# What a target may leave out of the prunable samples where those kept are weighted by n / k: at a
# ratio near 1 a single sample would stand for all of them, and one step ruins the network.
MOST_WEIGHTED = 0.9


# How a budget is spent: half of a run left out was no better than a third of fewer epochs, and no
# policy better than hard (docs/policies.md). The most of an epoch only bounds runs of few epochs.
RECOMMENDED = "hard"
MOST_OF_A_RUN, MOST_OF_AN_EPOCH = 1 / 3, 2 / 3


class Spending(NamedTuple):
    """How to spend a budget: `InfoBatch(len(dataset), epochs, **pruning)`.

    Attributes:
        epochs: of the run.
        pruning: arguments of `InfoBatch`: the recommended policy, the share of the samples of these
            epochs to leave out, and delta.
    """

    epochs: int
    pruning: dict[str, Any]


def spend(budget: float, num_epochs: int, delta: float = DELTA) -> Spending:
    """What to train on for a share of the samples of so many full epochs.

    As many epochs as may be, up to num_epochs, while a third of their samples are left out at most.

    Args:
        budget: the share, in (0, 1).
        num_epochs: of the run that it is a share of.
        delta: share of the epochs that prune, in (0, 1].

    Raises:
        ValueError: budget is out of range, or the epochs are too few to spend it.
    """
    if not 0 < budget < 1:
        raise ValueError(f"budget must be in (0, 1), got {budget}")
    for epochs in range(num_epochs, 0, -1):
        saving = 1 - budget * num_epochs / epochs
        prunes = Pruning(delta=delta).first_full_epoch(epochs) - 1  # the first epoch is full
        most = min(MOST_OF_A_RUN, MOST_OF_AN_EPOCH * max(0, prunes) / epochs)
        if 0 < saving <= most + 1e-9:
            pruning = {"policy": RECOMMENDED, "target_saving": saving, "delta": delta}
            return Spending(epochs, pruning)
    full = round(budget * num_epochs)
    if full and abs(full / (budget * num_epochs) - 1) < 0.005:
        return Spending(full, {"policy": "none"})
    raise ValueError(f"budget must leave epochs that prune, got {budget} of {num_epochs} epochs")


class Budget(NamedTuple):
    """What an epoch leaves out of its n prunable samples.

    Attributes:
        ratio: r, the share of them, in [0, 1); not used where there is a number.
        number: samples; None leaves out r n.
        most: the share of them that a number leaves out at most.
    """

    ratio: float
    number: float | None = None
    most: float = 1.0

    @property
    def prunes(self) -> bool:
        """Whether it leaves out anything."""
        return self.ratio > 0 if self.number is None else self.number > 0

    def kept(self, n: int) -> float:
        """Samples kept of n prunable ones, before rounding."""
        if self.number is None:
            return (1 - self.ratio) * n
        return max(n - self.number, (1 - self.most) * n)

    def kept_on_device(self, n: Tensor) -> Tensor:
        """The same of n () int64: rounded, at least one, () int64, without a host sync."""
        n = n.double()
        if self.number is None:
            kept = n * (1 - self.ratio)
        else:
            kept = torch.maximum(n - self.number, n * (1 - self.most))
        return kept.round().clamp(min=1).long()


@dataclass(frozen=True)
class Schedule:
    """How the ratio changes from epoch to epoch.

    Attributes:
        name: of `SCHEDULES`, or the function's as `module:function`.
        function: of the ratio asked for, the epoch, and the first full epoch at the end; gives the
            epoch's ratio. The first it is asked for is epoch 1, as nothing is scored before. With
            a target only the proportions count of what it gives.
    """

    name: str
    function: Callable[[float, int, int], float]

    def __call__(self, ratio: float, epoch: int, first: int, below: float = math.inf) -> float:
        """The epoch's ratio, in [0, below); ValueError, which names the schedule, for another."""
        try:
            given = float(self.function(ratio, epoch, first))
        except (Exception, SystemExit) as error:  # whatever the user's function raises
            what = f"failed: {type(error).__name__}: {reason(error)}"
            raise ValueError(f"ratio_schedule {self.name} {what}") from error
        if not 0 <= given < below:
            rule = f"must give ratios in [0, {below:g}), got {given:g} in epoch {epoch}"
            raise ValueError(f"ratio_schedule {self.name} {rule}")
        return given


def constant(ratio: float, epoch: int, first_full_epoch: int) -> float:
    """The ratio itself."""
    return ratio


def pods(ratio: float, epoch: int, first_full_epoch: int) -> float:
    """PODS (arXiv:2605.14773): phases of much data and of little, whose mean is the ratio.

    A cosine here, which begins with much data.
    """
    length = first_full_epoch - 1
    if length < 4:
        return ratio
    periods = max(1, round(length / PODS_PERIOD))
    return ratio * (1 - _swing(ratio) * math.cos(2 * math.pi * periods * (epoch - 0.5) / length))


SCHEDULES = {"constant": constant, "pods": pods}


def scheduled_ratio(ratio: float, schedule: Schedule, epoch: int, first_full_epoch: int) -> float:
    """The ratio of an epoch, below 1."""
    return ratio if epoch == 0 else schedule(ratio, epoch, first_full_epoch, below=1.0)


def to_save(
    left: float, num_samples: int, schedule: Schedule, epoch: int, first_full_epoch: int
) -> float:
    """An epoch's part of the samples `left` that the run has still to save.

    What an epoch could not save falls to those after it. None is asked to save more than all
    `num_samples`, where the run can do without.
    """
    later = range(max(epoch, 1), first_full_epoch)
    if epoch == 0 or not later or left <= 0:
        return 0.0
    mean = left / (num_samples * len(later))
    parts = [schedule(mean, each, first_full_epoch) / mean for each in later]
    return left * parts[0] / sum(parts) if parts[0] else 0.0


def _swing(mean: float) -> float:
    """How far shares swing around their mean, relative to it, without passing 1."""
    return PODS_SWING * min(1.0, max(0.0, 1 - mean) / mean) if mean > 0 else 0.0
