"""The augmentation against big integers, and as random numbers."""

import hashlib
from collections import Counter
from itertools import product
from typing import Any

import pytest
import torch
from scipy.stats import chisquare, ks_2samp
from torch import arange
from torchvision.transforms import RandomResizedCrop

from infobatch_fast.data.augment import augmentation, random_windows


def reference_augmentation(seed, epoch, position, pad):
    """The same generator in Python's integers."""
    mask = 2**64 - 1
    key = hashlib.blake2b(f"{seed} {epoch}".encode(), digest_size=8).digest()
    bits = (int.from_bytes(key, "little") + position * 0x9E3779B97F4A7C15) & mask
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & mask
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & mask
    bits ^= bits >> 31
    room = 2 * pad + 1
    return (bits >> 40) * room >> 24, (bits >> 16 & 0xFFFFFF) * room >> 24, bool(bits & 1)


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63, 12345678901234567890123])
@pytest.mark.parametrize(("epoch", "start", "pad"), [(0, 0, 4), (199, 49_990, 4), (3, 2**40, 15)])
def test_augmentation_equals_big_integers(seed, epoch, start, pad):
    y, x, flip = augmentation(seed, epoch, arange(start, start + 50), pad)
    expected = [reference_augmentation(seed, epoch, start + i, pad) for i in range(50)]
    assert list(zip(y.tolist(), x.tolist(), flip.tolist(), strict=True)) == expected


def test_augmentation_is_uniform():
    draws = zip(*(v.tolist() for v in augmentation(3, 2, arange(40_000), 4)), strict=True)
    counts = Counter(draws)
    assert len(counts) == 162
    assert chisquare(list(counts.values())).pvalue > 1e-4


@pytest.mark.parametrize("step", ["position", "epoch", "seed"])
def test_neighbouring_augmentations_are_independent(step):
    count = 100_000
    here = augmentation(3, 5, arange(count), 4)
    there = {
        "position": augmentation(3, 5, arange(1, count + 1), 4),
        "epoch": augmentation(3, 6, arange(count), 4),
        "seed": augmentation(4, 5, arange(count), 4),
    }[step]
    for a, b in product(here, there):
        sides = [9 if values.dtype == torch.int64 else 2 for values in (a, b)]
        cells = torch.bincount(a.long() * sides[1] + b.long(), minlength=sides[0] * sides[1])
        assert chisquare(cells.numpy()).pvalue > 1e-4


@pytest.mark.gpu
def test_cuda_draws_the_augmentation_of_the_cpu():
    for seed, start in ((0, 0), (-7, 49_000), (2**70, 2**40)):
        on_cpu = augmentation(seed, 3, arange(start, start + 100_000), 4)
        on_cuda = augmentation(seed, 3, arange(start, start + 100_000, device="cuda"), 4)
        for a, b in zip(on_cpu, on_cuda, strict=True):
            assert torch.equal(a, b.cpu())


def test_random_windows_are_torchvisions() -> None:
    number, theirs, same = 3000, RandomResizedCrop.get_params, ([0.08, 1.0], [3 / 4, 4 / 3])
    torch.manual_seed(0)
    for height, width in ((90, 130), (60, 160)):
        image, sides = torch.zeros(3, height, width), torch.tensor([[height, width]] * number)
        expected = [theirs(image, *same) for _ in range(number)]
        windows, flips = random_windows(1, 2, arange(number), sides)
        for ours, other in zip(windows.T, torch.tensor(expected).T, strict=True):
            alike: Any = ks_2samp(ours.numpy(), other.numpy())
            assert alike.pvalue > 1e-3
        assert abs(flips.double().mean() - 0.5) < 4 * 0.5 / number**0.5
    for height, width in ((4, 1000), (1000, 4), (1, 9)):  # where no random one fits
        image, sides = torch.zeros(3, height, width), torch.tensor([[height, width]])
        windows, _ = random_windows(1, 2, arange(1), sides)
        assert windows[0].tolist() == [*theirs(image, *same)]
