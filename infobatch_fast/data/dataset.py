"""The form in which every data set is handed on, and what those who make one share.

Dimensions: N training samples, M test samples.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

PIXELS = 3 * 32 * 32  # bytes of an image


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels of both splits.

    The images are whole in the memory of one device, (N, 32, 32, 3) uint8 and contiguous, or a
    `Source`, which is indexed and moved likewise.
    """

    name: str  # cifar10, cifar100, synthetic, folder or module:function
    images: Any  # of N samples
    labels: Tensor  # (N,) int64 in [0, num_classes)
    test_images: Any  # of M samples
    test_labels: Tensor  # (M,) int64
    num_classes: int
    mean: tuple[float, float, float]  # of red, green and blue in [0, 1]
    std: tuple[float, float, float]
    source: str  # published: known to be the published images; files: of files; synthetic
    classes: tuple[str, ...] | None = None  # names, by label

    def part(self, fraction: float) -> "Dataset":
        """A share in (0, 1] of the training images, at least one: the same for every seed."""
        if fraction == 1:
            return self
        return self._of(self._order()[: max(1, round(fraction * self.labels.numel()))])

    def with_validation(self, number: int) -> "Dataset":
        """With training images held out, the same for every seed, in the place of the test set."""
        if number == 0:
            return self
        order = self._order()
        kept, held = self._of(order[:-number]), self._of(order[-number:])
        return replace(kept, test_images=held.images, test_labels=held.labels)

    def with_label_noise(self, share: float, seed: int) -> "Dataset":
        """With that share of the training labels wrong, each another class with equal chances."""
        if share == 0:
            return self
        number, generator = self.labels.numel(), torch.Generator().manual_seed(seed)
        wrong = torch.randperm(number, generator=generator)[: round(share * number)]
        other = torch.randint(1, self.num_classes, wrong.shape, generator=generator)
        wrong, other = wrong.to(self.labels.device), other.to(self.labels.device)
        labels = self.labels.clone()
        labels[wrong] = (labels[wrong] + other) % self.num_classes
        return replace(self, labels=labels)

    def _of(self, some: Tensor) -> "Dataset":
        """These of the training samples, in the order that they have here."""
        some = some.sort().values
        return replace(self, images=self.images[some], labels=self.labels[some])

    def _order(self) -> Tensor:
        """Of the training samples, at random."""
        number = self.labels.numel()
        drawn = torch.randperm(number, generator=torch.Generator().manual_seed(number))
        return drawn.to(self.labels.device)

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of training images, in pixels."""
        one = self.images
        return (one.shape[1], one.shape[2]) if isinstance(one, Tensor) else one.sides

    @property
    def test_sides(self) -> tuple[int, int]:
        """Height and width of test images, in pixels."""
        one = self.test_images
        if isinstance(one, Tensor):
            return one.shape[1], one.shape[2]
        return (one.test_side,) * 2 if hasattr(one, "test_side") else one.sides

    @property
    def bad(self) -> Any:
        """The files that are left out (`BadFiles`), if any were looked for."""
        return getattr(self.images, "bad", None)

    def pictures(self, numbers: Tensor) -> Tensor:
        """Training images to look at, (P, H, W, 3) uint8."""
        if isinstance(self.images, Tensor):
            return self.images[numbers.to(self.images.device)].cpu()
        return self.images.pictures(numbers)

    def fingerprint(self) -> str:
        """A hash of the training images and labels, in their order."""
        digest, images = hashlib.blake2b(digest_size=8), self.images
        digest.update(
            images.cpu().numpy() if isinstance(images, Tensor) else images.fingerprint()  # pyright: ignore
        )
        digest.update(self.labels.cpu().numpy())  # pyright: ignore
        return digest.hexdigest()

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data with its four tensors on `device`."""
        names = ("images", "labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})
