"""The form in which every data set is handed on, and what those who make one share.

Dimensions: N training samples, M test samples.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

PIXELS = 3 * 32 * 32  # bytes of an image


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels of both splits, whole in the memory of one device."""

    name: str  # cifar10, cifar100 or synthetic
    images: Tensor  # (N, 32, 32, 3) uint8, contiguous
    labels: Tensor  # (N,) int64 in [0, num_classes)
    test_images: Tensor  # (M, 32, 32, 3) uint8, contiguous
    test_labels: Tensor  # (M,) int64
    num_classes: int
    mean: tuple[float, float, float]  # of red, green and blue in [0, 1]
    std: tuple[float, float, float]
    source: str  # published: known to be the published images; files: of files; synthetic
    classes: tuple[str, ...] | None = None  # names, by label

    def part(self, fraction: float) -> "Dataset":
        """A share in (0, 1] of both splits, of each at least one image: the same for every seed."""
        if fraction == 1:
            return self
        taken = {}
        for images, labels in (("images", "labels"), ("test_images", "test_labels")):
            number = getattr(self, labels).numel()
            drawn = torch.randperm(number, generator=torch.Generator().manual_seed(number))
            some = drawn[: max(1, round(fraction * number))].sort().values
            for name in (images, labels):
                tensor = getattr(self, name)
                taken[name] = tensor[some.to(tensor.device)]
        return replace(self, **taken)

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data with its four tensors on `device`."""
        names = ("images", "labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})
