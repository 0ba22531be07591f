"""The one-cycle schedule against torch's."""

import pytest
import torch
from torch import nn

from infobatch_fast.train.schedule import one_cycle


@pytest.mark.parametrize("total", [10, 97, 1000])
def test_one_cycle_is_within_one_step_of_torch(total):
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


def test_one_cycle_ends_and_errors():
    assert one_cycle(0, max_lr=5.0) == pytest.approx((0.2, 0.95))
    assert one_cycle(0.15, max_lr=5.0) == pytest.approx((2.6, 0.9))
    assert one_cycle(0.3, max_lr=5.0) == pytest.approx((5.0, 0.85))
    assert one_cycle(0.65, max_lr=5.0) == pytest.approx((2.50001, 0.9))
    assert one_cycle(1, max_lr=5.0) == pytest.approx((2e-5, 0.95))
    wide = one_cycle(0.5, max_lr=1.0, pct_start=0.5, momentum_range=(0.1, 0.2))
    assert wide == pytest.approx((1.0, 0.1))
    with pytest.raises(ValueError, match=r"progress must be in \[0, 1\], got 1.5"):
        one_cycle(1.5, max_lr=1.0)
    with pytest.raises(ValueError, match=r"pct_start must be in \(0, 1\), got 0"):
        one_cycle(0.5, max_lr=1.0, pct_start=0)
