"""Classifiers: torchvision's ResNets, with a CIFAR stem for small images, and a small one."""

import torch
from torch import Tensor, nn

from infobatch_fast.train.own import own_model

LARGE = 64  # pixels a side from which ResNets have torchvision's own stem


def make_model(
    name: str,
    num_classes: int = 10,
    sides: tuple[int, int] = (32, 32),
    test_sides: tuple[int, int] | None = None,
    *,
    seed: int = 0,
) -> nn.Module:
    """A network from images (B, 3, H, W) of these sides to logits (B, C), on the CPU in float32.

    The ResNets (He et al. 2016, arXiv:1512.03385) are torchvision's, below `LARGE` pixels with a
    3x3 stem of stride 1 and no max-pool, so a state_dict loads into a torchvision model changed in
    these two modules. The initialisation is PyTorch's default, as in the InfoBatch experiments, not
    torchvision's; timm's networks and the user's have their own. torch's global generator stays as
    it is.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        if ":" in name:
            return own_model(name, num_classes, dict.fromkeys((sides, test_sides or sides)))
        # Built without storage: torchvision's own initialisation draws nothing and costs nothing.
        with torch.device("meta"):
            small = name == "small"
            model = SmallResNet(num_classes) if small else _resnet(name, num_classes, min(sides))
        for module in model.to_empty(device="cpu").modules():
            if isinstance(module, nn.Conv2d | nn.Linear | nn.BatchNorm2d):
                module.reset_parameters()
    return model


def _resnet(name: str, num_classes: int, side: int) -> nn.Module:
    from torchvision import models  # here, since it takes seconds to import

    model = getattr(models, name.replace("r", "resnet"))(num_classes=num_classes)
    if side < LARGE:
        model.conv1 = nn.Conv2d(3, 64, 3, stride=1, padding=1, bias=False)
        model.maxpool = nn.Identity()
    return model


class SmallResNet(nn.Module):
    """A residual network of three basic blocks, for runs of a minute on two CPU cores."""

    def __init__(self, num_classes: int):
        super().__init__()
        from torchvision.models.resnet import BasicBlock

        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = BasicBlock(16, 16)
        self.layer2 = BasicBlock(16, 32, 2, _shortcut(16))
        self.layer3 = BasicBlock(32, 64, 2, _shortcut(32))
        self.fc = nn.Linear(64, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, 3, H, W)."""
        x = self.relu(self.bn1(self.conv1(images)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))


def _shortcut(channels: int) -> nn.Module:
    conv = nn.Conv2d(channels, 2 * channels, 1, stride=2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(2 * channels))
