"""Classifiers for 32 x 32 images: torchvision's ResNets with a CIFAR stem, and a small one."""

import torch
from torch import Tensor, nn

from infobatch_fast.errors import UserError, unknown_name

MODELS = ("r18", "r34", "r50", "r101", "small")


def make_model(name: str, num_classes: int = 10, *, seed: int | None = None) -> nn.Module:
    """A network from images (B, 3, 32, 32) to logits (B, C), on the CPU in float32.

    The ResNets (He et al. 2016, arXiv:1512.03385) are torchvision's with a 3x3 stem of stride 1 and
    no max-pool, so a state_dict loads into a torchvision model changed in these two modules. The
    initialisation is PyTorch's default, as in the InfoBatch experiments, not torchvision's.

    Args:
        name: "r18", "r34", "r50", "r101", or "small" (`SmallResNet`) to try things on a CPU.
        num_classes: C.
        seed: Fixes the initial weights and leaves the global generators as they are; without one
            the weights are drawn from torch's global generator.

    Raises:
        UserError: If the name is unknown.
        ValueError: If num_classes is below 1.
    """
    if name not in MODELS:
        raise UserError(unknown_name("model", name, MODELS))
    if num_classes < 1:
        raise ValueError(f"num_classes must be >= 1, got {num_classes}")
    # Built without storage: torchvision's own initialisation draws nothing and costs nothing.
    with torch.device("meta"):
        model = SmallResNet(num_classes) if name == "small" else _cifar_resnet(name, num_classes)
    model.to_empty(device="cpu")
    if seed is None:
        _initialise(model)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(seed)
            _initialise(model)
    return model


def _cifar_resnet(name: str, num_classes: int) -> nn.Module:
    # Here, since torchvision takes seconds to import.
    from torchvision import models

    build = {
        "r18": models.resnet18,
        "r34": models.resnet34,
        "r50": models.resnet50,
        "r101": models.resnet101,
    }[name]
    model = build(num_classes=num_classes)
    model.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
    model.maxpool = nn.Identity()  # type: ignore[assignment]
    return model


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
            module.reset_parameters()


class SmallResNet(nn.Module):
    """A residual network of three basic blocks, for runs of a minute on two CPU cores.

    Args:
        num_classes: C.
        width: Channels of the stem and the first block; the others have two and four times as many.
    """

    def __init__(self, num_classes: int = 10, width: int = 16):
        super().__init__()
        from torchvision.models.resnet import BasicBlock

        self.conv1 = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = BasicBlock(width, width)
        self.layer2 = BasicBlock(width, 2 * width, 2, _shortcut(width))
        self.layer3 = BasicBlock(2 * width, 4 * width, 2, _shortcut(2 * width))
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, 3, H, W)."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def _shortcut(channels: int) -> nn.Module:
    conv = nn.Conv2d(channels, 2 * channels, 1, stride=2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(2 * channels))
