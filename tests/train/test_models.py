"""The networks: their size, their initial weights, and what a seed fixes."""

from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

from infobatch_fast.train.models import make_model


@pytest.mark.parametrize(
    ("name", "classes", "parameters"),
    [("r18", 10, 11_173_962), ("r50", 100, 23_705_252), ("r50", 10, 23_520_842)],
)
def test_parameter_count(name: str, classes: int, parameters: int) -> None:
    assert sum(p.numel() for p in make_model(name, classes).parameters()) == parameters


def test_state_loads_into_torchvision_and_gives_the_same_logits() -> None:
    model: Any = make_model("r18", seed=3).eval()
    theirs: Any = models.resnet18(num_classes=10)
    theirs.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    theirs.maxpool = nn.Identity()
    theirs.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs.eval()(images), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["r18", "small"])
def test_initial_weights_are_pytorch_defaults(name: str) -> None:
    for module in make_model(name, seed=0).modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight
            bound = weight[0].numel() ** -0.5
            assert weight.abs().max() <= bound * (1 + 1e-6)
            # A uniform variable on [-b, b]: deviation b / sqrt 3, mean 0, each within five sigma.
            sigma = weight.numel() ** -0.5
            assert abs(weight.std() / bound * 3**0.5 - 1) < 5 * sigma
            assert abs(weight.mean() / bound * 3**0.5) < 5 * sigma
        if isinstance(module, nn.BatchNorm2d):
            fresh = nn.BatchNorm2d(module.num_features).state_dict()
            assert all(torch.equal(v, fresh[k]) for k, v in module.state_dict().items())


def test_a_seed_fixes_the_weights_and_leaves_the_global_generator() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    weights = [make_model("small", seed=seed).state_dict()["fc.weight"] for seed in (5, 5, 6)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), before)
