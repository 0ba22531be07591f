"""The networks: their size, their names, their initial weights, and what a seed fixes."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

from infobatch_fast.errors import UserError
from infobatch_fast.train.models import MODELS, SmallResNet, make_model

PARAMETERS = {
    ("r18", 10): 11_173_962,
    ("r34", 10): 21_282_122,
    ("r50", 10): 23_520_842,
    ("r101", 10): 42_512_970,
    ("r50", 100): 23_705_252,
    ("small", 10): 78_042,
}


@pytest.mark.parametrize(("name", "classes"), PARAMETERS)
def test_parameter_count(name, classes):
    model: Any = make_model(name, classes)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name, classes]
    assert model.fc.weight.shape[0] == classes


def test_state_loads_into_torchvision_and_gives_the_same_logits():
    model: Any = make_model("r18", seed=3).eval()
    theirs: Any = models.resnet18(num_classes=10)
    theirs.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    theirs.maxpool = nn.Identity()
    theirs.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(images), theirs.eval()(images), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["r18", "small"])
def test_initial_weights_are_pytorch_defaults(name):
    model: Any = make_model(name, seed=0)
    modules: list[Any] = list(model.modules())
    for module in modules:
        if isinstance(module, nn.Conv2d | nn.Linear):
            weight = module.weight
            bound = weight[0].numel() ** -0.5
            assert weight.abs().max() <= bound * (1 + 1e-6)
            # A uniform variable on [-b, b]: deviation b / sqrt 3, mean 0, each within five sigma.
            sigma = weight.numel() ** -0.5
            assert abs(weight.std() / bound * 3**0.5 - 1) < 5 * sigma
            assert abs(weight.mean() / bound * 3**0.5) < 5 * sigma
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
        if isinstance(module, nn.BatchNorm2d):
            fresh = nn.BatchNorm2d(module.num_features).state_dict()
            assert all(torch.equal(v, fresh[k]) for k, v in module.state_dict().items())


def test_seed_fixes_the_weights_and_leaves_the_global_generator():
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first: Any = make_model("small", seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    again: Any = make_model("small", seed=5)
    other: Any = make_model("small", seed=6)
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_without_a_seed_the_global_generator_is_used():
    torch.manual_seed(11)
    first: Any = make_model("small")
    second: Any = make_model("small")
    assert not torch.equal(first.conv1.weight, second.conv1.weight)
    torch.manual_seed(11)
    second = make_model("small")
    assert torch.equal(first.conv1.weight, second.conv1.weight)


@pytest.mark.parametrize("name", ["r18", "small"])
def test_logits_are_finite_and_channels_last_is_kept(name):
    model: Any = make_model(name, 7, seed=0).to(memory_format=torch.channels_last)
    seen = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    images = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    logits = model(images)
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)
    # The stem keeps every pixel, and no max-pool follows it; the small one halves at once.
    assert seen[0].shape[2:] == ((16, 16) if name == "small" else (32, 32))
    assert seen[1].shape[2:] == seen[0].shape[2:]
    assert all(p.grad is None for p in model.parameters())
    logits.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_small_network_by_hand():
    model = SmallResNet(10, width=4).eval()
    images = torch.randn(3, 3, 32, 32)

    def block(layer, x):
        out = layer.bn2(layer.conv2(layer.bn1(layer.conv1(x)).relu()))
        return (out + (x if layer.downsample is None else layer.downsample(x))).relu()

    with torch.no_grad():
        x = model.bn1(model.conv1(images)).relu()
        for layer in (model.layer1, model.layer2, model.layer3):
            x = block(layer, x)
        assert x.shape == (3, 16, 4, 4)
        torch.testing.assert_close(model(images), model.fc(x.mean((2, 3))))


def test_names_and_errors():
    assert MODELS == ("r18", "r34", "r50", "r101", "small")
    message = r"model must be one of r18, .*, small, got r55 \(did you mean r50\?\)"
    with pytest.raises(UserError, match=message):
        make_model("r55")
    with pytest.raises(ValueError, match=r"num_classes must be >= 1, got 0"):
        make_model("r18", 0)


def test_torchvision_is_not_imported_with_the_module():
    code = "import sys, infobatch_fast.train.models; sys.exit('torchvision' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
