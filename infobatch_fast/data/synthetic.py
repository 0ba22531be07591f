"""Synthetic images on which pruning can work, for tests and for machines without CIFAR.

Dimensions: N training samples, M test samples, C classes, V patterns of a class, W waves a side,
B one chunk.
"""

import hashlib

import torch
from torch import Tensor

from infobatch_fast.data.dataset import PIXELS, Dataset
from infobatch_fast.errors import UserError, reason

_CHUNK = 4096  # samples at a time: 50 MB of float32 pixels, a few times over
_WAVES = 5  # cosine waves a side
_VARIANTS = 6  # patterns of a class
_EASY, _HARD = 0.5, 0.1  # shares of the samples
# Strength of the smooth random pattern (the class pattern has 1) and of the pixel noise in
# standard deviations of the image: easy, between, hard. Chosen by training a small network.
_CLUTTER = (0.5, 1.2, 1.6)
_NOISE = (0.1, 0.3, 0.6)


def make_synthetic(
    num_samples: int = 50_000,
    num_test: int = 10_000,
    num_classes: int = 10,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Dataset:
    """Images of smooth class patterns, some clear and some not, of N/C samples a class.

    An image is one of its class's patterns, shifted, at some contrast, plus a smooth random
    pattern and pixel noise. Half of the samples carry little of both; a tenth much, and part of
    another class's pattern besides; the rest lie between. Every number comes from `seed` through
    generators of its own. The test set does not depend on `num_samples`. A CPU and a GPU give
    different images.

    Raises:
        UserError: more images than `device` has memory for.
    """
    size = (num_classes, _VARIANTS, 3, _WAVES, _WAVES)
    generator = _generator(seed, "patterns", device)
    patterns = torch.randn(size, generator=generator, device=device)
    tensors: list[Tensor] = []
    for split, count in (("train", num_samples), ("test", num_test)):
        try:
            tensors += _synthesize(patterns, count, _generator(seed, split, device))
        except RuntimeError as error:  # torch's out-of-memory errors on every device
            raise UserError(
                f"synthetic_samples must fit into the memory of {device}, got {count} samples of "
                f"{PIXELS} bytes ({reason(error)})"
            ) from error
    return Dataset(
        "synthetic",
        *tensors,
        num_classes=num_classes,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        source="synthetic",
    )


def _generator(seed: int, use: str, device: torch.device | str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed} {use}".encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def _synthesize(patterns: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (count, 32, 32, 3) uint8 and labels (count,) from patterns (C, V, 3, W, W)."""
    device = patterns.device
    images = torch.empty(count, 32, 32, 3, dtype=torch.uint8, device=device)
    labels = torch.randperm(count, generator=generator, device=device) % len(patterns)
    for start in range(0, count, _CHUNK):
        part = slice(start, start + _CHUNK)
        images[part] = _draw(patterns, labels[part], generator)
    return images, labels


def _draw(patterns: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """One image (B, 32, 32, 3) uint8 for each of the labels (B,)."""
    b, device = len(labels), labels.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def pick(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (b,), generator=generator, device=device)

    place = uniform(b, 1, 1, 1)
    level = 1 - (place < _EASY).long() + (place >= 1 - _HARD).long()  # 0 easy, 1 between, 2 hard
    clutter, noise = (torch.tensor(values, device=device)[level] for values in (_CLUTTER, _NOISE))
    own = patterns[labels, pick(0, _VARIANTS)]  # (B, 3, W, W)
    other = patterns[(labels + pick(1, len(patterns))) % len(patterns), pick(0, _VARIANTS)]
    share = (0.3 + 0.3 * uniform(b, 1, 1, 1)) * (level == 2)
    contrast = 0.6 + 0.8 * uniform(b, 1, 1, 1)
    smooth = contrast * torch.lerp(own, other, share) + clutter * normal(b, 3, _WAVES, _WAVES)
    pixel = torch.arange(32, device=device) + 0.5
    waves = torch.arange(_WAVES, device=device) * (torch.pi / 32)
    shift = 8 * uniform(2, b, 1, 1) - 4  # in pixels, either way
    rows, columns = torch.cos((pixel[:, None] + shift) * waves)  # (B, 32, W) each
    image = torch.einsum("bcij,byi,bxj->byxc", smooth, rows, columns) / _WAVES
    image += noise * normal(b, 32, 32, 3)
    return (image * 64 + 128).clamp_(0, 255).to(torch.uint8)
