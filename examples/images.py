"""What the examples train on: CIFAR-10 of $INFOBATCH_DATA, or else scikit-learn's digits."""

import os

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset


class Images(Dataset):
    """(N, 3, H, W) uint8 pixels and (N,) labels; a sample is a float image and its label."""

    def __init__(self, pixels: Tensor, labels: Tensor, flip: bool = False) -> None:
        self.pixels, self.labels, self.flip = pixels, labels, flip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        image = self.pixels[i].float().sub(127.5).div(64)
        if self.flip and torch.rand(()) < 0.5:
            image = image.flip(-1)
        return image, int(self.labels[i])


def load(limit: int | None = None) -> tuple[Images, Images]:
    """The training split, `limit` images of it, and the test split, a quarter as many."""
    if "INFOBATCH_DATA" in os.environ:
        from infobatch_fast.data.cifar import load_cifar

        data = load_cifar("cifar10", os.environ["INFOBATCH_DATA"], download=False)
        images = torch.cat([data.images, data.test_images]).movedim(3, 1)
        labels, split, flip = torch.cat([data.labels, data.test_labels]), len(data.labels), True
    else:
        from sklearn.datasets import load_digits

        pixels, digits = map(torch.as_tensor, load_digits(return_X_y=True))
        images = (pixels * 15).byte().view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
        labels, split, flip = digits, 1400, False
    train = slice(0, split if limit is None else min(limit, split))
    test = slice(split, None if limit is None else split + limit // 4)
    return Images(images[train], labels[train], flip), Images(images[test], labels[test])


def network(width: int = 32) -> nn.Module:
    """A small convolutional network for ten classes and images of any size."""
    layers: list[nn.Module] = []
    channels = 3
    for factor, stride in ((1, 1), (2, 2), (4, 2)):
        layers += [nn.Conv2d(channels, factor * width, 3, stride, 1, bias=False)]
        layers += [nn.BatchNorm2d(factor * width), nn.ReLU()]
        channels = factor * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
