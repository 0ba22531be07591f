"""A whole epoch drawn on a card is the one that torch draws on the CPU, sample for sample."""

from types import SimpleNamespace

import pytest
import torch
from steps_made import ON

from infobatch_fast import infobatch as infobatch_module
from infobatch_fast.drawing import key_of
from infobatch_fast.infobatch import InfoBatch
from infobatch_fast.kernels import reference, twin


@pytest.fixture(params=ON)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        plain = SimpleNamespace(**{**vars(twin), "threshold": reference.threshold})
        monkeypatch.setattr(infobatch_module, "triton_kernels", lambda device: plain)
    return request.param


@pytest.mark.filterwarnings("ignore:epoch 2 leaves out nothing")  # the scores came by no update()
@pytest.mark.parametrize("samples", [1, 2, 127, 50_000])
def test_an_epoch_is_what_torch_draws_on_the_cpu(device: str, samples: int) -> None:
    # Whole numbers, whose mean is the same in whatever order they are added; one in 17 unseen.
    scores = torch.randint(0, 8, (samples,), generator=torch.Generator().manual_seed(3)).float()
    scores[1::17] = torch.nan
    infobatch = InfoBatch(samples, 3, 0.5, 1.0, seed=5, device=device)
    infobatch.scores.copy_(scores)
    key, limit = key_of(5, 1), reference.threshold(scores)
    positions, count = twin.partition(scores, limit)
    n = int(count)
    if n:
        k = max(1, round(0.5 * n))
        indices, weights = twin.choose(positions, n, k, n / k, key)
    else:
        indices, weights = twin.shuffle(samples, key, torch.device("cpu")), torch.ones(samples)
    state = infobatch.state_dict()
    plan, following = infobatch.sample(1), infobatch.sample(2)
    assert torch.equal(plan.indices.cpu(), indices)
    assert torch.equal(plan.weights.cpu(), weights)
    assert plan.weights.double().sum().item() == pytest.approx(samples, rel=1e-6)
    assert plan.indices.unique().numel() == len(plan)
    resumed = InfoBatch(samples, 3, 0.5, 1.0, seed=5, device=device)
    resumed.load_state_dict(state)
    for epoch, drawn in ((1, plan), (2, following)):
        again = resumed.sample(epoch)
        assert torch.equal(again.indices, drawn.indices)
        assert torch.equal(again.weights, drawn.weights)
