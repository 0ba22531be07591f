"""The random crops and flips, as a pure function of where a sample comes, and the padding for them.

Dimensions: B positions.
"""

import hashlib
import math

import torch
from torch import Tensor

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random window: share of the image; width / height
TRIES = 10  # windows that may not fit, until one in the middle is taken
CENTRE = 224 / 256  # side of the window in the middle, of the image's shorter side


def augmentation(
    seed: int, epoch: int, positions: Tensor, pad: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Crop offsets and flips of the samples at positions (B,) int64 of an epoch.

    A pure function of (seed, epoch, position), with the same bits on every device.

    Returns:
        Rows to skip, (B,) int64 uniform in [0, 2 pad]; columns to skip, the same; flips, (B,) bool.
    """
    # From 24 bits each: no offset is likelier than 1 / (2 pad + 1) by more than 2^-24.
    one, two, bit = _drawn(f"{int(seed)} {int(epoch)}", positions)
    return one * (2 * pad + 1) >> 24, two * (2 * pad + 1) >> 24, bit


def random_windows(
    seed: int, epoch: int, positions: Tensor, sides: Tensor
) -> tuple[Tensor, Tensor]:
    """Where to crop the images at some positions of an epoch, as torchvision's RandomResizedCrop.

    A pure function of (seed, epoch, position) and the image's sides, on the CPU.

    Args:
        positions: (B,) int64.
        sides: (B, 2) int64, height and width.

    Returns:
        Top, left, height and width, (B, 4) int64; flips, (B,) bool.
    """
    key = f"{int(seed)} {int(epoch)}"
    height, width = sides.unbind(1)
    tries = TRIES * positions[:, None] + torch.arange(TRIES)
    one, two, _ = _drawn(f"{key} size", tries.flatten())
    area, ratio = (each.view(-1, TRIES).double() / 2**24 for each in (one, two))
    area = (AREA[0] + (AREA[1] - AREA[0]) * area) * (height * width)[:, None]
    low, high = (math.log(each) for each in RATIO)
    ratio = (low + (high - low) * ratio).exp()
    tried = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], 2).round().long()
    fits = ((tried > 0) & (tried <= sides[:, None])).all(2)
    some = tried[torch.arange(len(sides)), fits.int().argmax(1)]
    one, two, _ = _drawn(f"{key} place", positions)
    place = torch.stack([one, two], 1) * (sides - some + 1) >> 24
    widest = torch.stack([(width / RATIO[0]).round(), (height * RATIO[1]).round()], 1).long()
    widest = torch.minimum(sides, widest)
    middle = torch.cat([(sides - widest) // 2, widest], 1)
    windows = torch.where(fits.any(1)[:, None], torch.cat([place, some], 1), middle)
    return windows, augmentation(seed, epoch, positions, 0)[2]


def middle_windows(sides: Tensor) -> Tensor:
    """The square in the middle of each image that is tested, (B, 4) as of `random_windows`."""
    side = (CENTRE * sides.min(1).values).round().long().clamp(min=1)
    square = side[:, None].expand(-1, 2)
    return torch.cat([(sides - square) // 2, square], 1)


def _drawn(key: str, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of positions (B,): two numbers of 24 bits, (B,) int64 each, and a bit, (B,) bool.

    SplitMix64 (Steele et al., OOPSLA 2014) as a counter-based generator, in integer operations.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    # int64 products wrap around as uint64 ones do; the constants are the published ones less 2^64.
    bits = positions * -0x61C8864680B583EB + int.from_bytes(digest, "little", signed=True)
    bits = (bits ^ _shift_right(bits, 30)) * -0x40A7B892E31B1A47
    bits = (bits ^ _shift_right(bits, 27)) * -0x6B2FB644ECCEEE15
    bits = bits ^ _shift_right(bits, 31)
    return _shift_right(bits, 40), _shift_right(bits, 16) & 0xFFFFFF, (bits & 1).bool()


def reflect(length: int, pad: int, device: torch.device) -> Tensor:
    """(length + 2 pad,) int64: the line that each line of the padded image repeats, no edge twice.

    torch has no reflect padding for uint8 on every device, hence by index.
    """
    last = length - 1
    return last - (last - torch.arange(-pad, length + pad, device=device).abs()).abs()


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """As of unsigned integers; torch's own shift keeps the sign."""
    return bits >> count & (1 << 64 - count) - 1
