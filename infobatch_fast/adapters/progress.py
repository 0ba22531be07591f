"""Learning-rate schedules over epochs of varying length."""

import math
from typing import Any

from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from infobatch_fast.infobatch import InfoBatch
from infobatch_fast.plan import check_count


class ProgressLR(LRScheduler):
    """Drives any torch scheduler by how far the run is, in the place of `scheduler.step()`.

    Pruned epochs have fewer steps, so that a scheduler stepped once a batch never reaches its end.
    Call `step()` where you called the scheduler's: it steps the scheduler as often as the progress
    through the epochs asks, none, one or several times, and ends it at its last step. Frameworks
    that want one of torch's schedulers take it.

    Args:
        scheduler: made for `total_steps` steps, such as
            `OneCycleLR(optimizer, 0.4, total_steps=total_steps)`.
        infobatch: whose epochs they are.
        total_steps: of the scheduler; for one that is stepped once an epoch, num_epochs.

    Example:
        >>> import torch
        >>> from infobatch_fast import InfoBatch
        >>> infobatch = InfoBatch(num_samples=8, num_epochs=4, device="cpu")
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> onecycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.4, total_steps=8)
        >>> schedule = ProgressLR(onecycle, infobatch, total_steps=8)
    """

    def __init__(self, scheduler: Any, infobatch: InfoBatch, total_steps: int) -> None:
        check_count("total_steps", total_steps)
        if isinstance(scheduler, ReduceLROnPlateau):
            raise TypeError(
                "scheduler must be one of steps, got ReduceLROnPlateau: step it by its metric"
            )
        # The base class's own would count steps, and set rates. Nor is there an attribute
        # `total_steps`: accelerate stops a scheduler that has one after so many calls.
        self.scheduler, self.infobatch, self.total = scheduler, infobatch, int(total_steps)
        self.optimizer, self.taken, self._step_count = scheduler.optimizer, 0, 0

    def step(self, epoch: int | None = None) -> None:
        """After the optimizer's step: bring the scheduler to where the run is."""
        due = math.floor(self.infobatch.progress * self.total + 1e-9)
        while self.taken < due:
            self.taken += 1
            self.scheduler.step()

    def get_last_lr(self) -> list[Any]:
        """The scheduler's."""
        return self.scheduler.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's, and how often it was stepped, of how many times."""
        counts = {"taken": self.taken, "total": self.total}
        return {**counts, "scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of `state_dict()`."""
        self.taken = state_dict["taken"]
        if not isinstance(self.scheduler, LambdaLR):  # whose function, and its total, no state has
            self.total = state_dict["total"]
        self.scheduler.load_state_dict(state_dict["scheduler"])
