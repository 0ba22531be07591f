"""The one-cycle schedule against torch's."""

import pytest
import torch
from torch import nn

from infobatch_fast.train.schedule import one_cycle


@pytest.mark.parametrize("total", [10, 97, 1000])
def test_one_cycle_is_within_one_step_of_torch(total: int) -> None:
    sgd = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0, momentum=0.9)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        sgd, 5.2, total, pct_start=0.3, div_factor=25.0, final_div_factor=1e4
    )
    torchs = []
    for step in range(total):
        torchs.append((sgd.param_groups[0]["lr"], sgd.param_groups[0]["momentum"]))
        sgd.step()
        if step < total - 1:
            theirs.step()
    for step in range(total):
        ours = one_cycle(step / total, max_lr=5.2)
        near = torchs[max(step - 1, 0) : step + 2]
        for value, values in zip(ours, zip(*near, strict=True), strict=True):
            # The peak lies between two steps, above both by less than one step's change.
            slack = 1e-9 if not 0.29 < step / total < 0.31 else max(values) - min(values)
            assert min(values) - slack <= value <= max(values) + slack


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(0, (0.2, 0.95)), (0.15, (2.6, 0.9)), (0.3, (5.0, 0.85)), (0.65, (2.50001, 0.9)),
     (1, (2e-5, 0.95))],
)  # fmt: skip
def test_one_cycle_by_hand(progress: float, expected: tuple[float, float]) -> None:
    assert one_cycle(progress, max_lr=5.0) == pytest.approx(expected)
