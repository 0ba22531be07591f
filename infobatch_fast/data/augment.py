"""The random crops and flips, as a pure function of where a sample comes, and the padding for them.

Dimensions: B positions.
"""

import hashlib

import torch
from torch import Tensor


def augmentation(
    seed: int, epoch: int, start: int, stop: int, pad: int, device: torch.device | str
) -> tuple[Tensor, Tensor, Tensor]:
    """Crop offsets and flips of the positions start to stop of an epoch.

    A pure function of (seed, epoch, position): SplitMix64 (Steele et al., OOPSLA 2014) as a
    counter-based generator, in integer operations that give the same bits on every device.

    Returns:
        Rows to skip, (B,) int64 uniform in [0, 2 pad]; columns to skip, the same; flips, (B,) bool.
    """
    key = hashlib.blake2b(f"{int(seed)} {int(epoch)}".encode(), digest_size=8).digest()
    position = torch.arange(start, stop, dtype=torch.int64, device=device)
    # int64 products wrap around as uint64 ones do; the constants are the published ones less 2^64.
    bits = position * -0x61C8864680B583EB + int.from_bytes(key, "little", signed=True)
    bits = (bits ^ _shift_right(bits, 30)) * -0x40A7B892E31B1A47
    bits = (bits ^ _shift_right(bits, 27)) * -0x6B2FB644ECCEEE15
    bits = bits ^ _shift_right(bits, 31)
    # From 24 bits each: no offset is likelier than 1 / (2 pad + 1) by more than 2^-24.
    offset_y = _shift_right(bits, 40) * (2 * pad + 1) >> 24
    offset_x = (_shift_right(bits, 16) & 0xFFFFFF) * (2 * pad + 1) >> 24
    return offset_y, offset_x, (bits & 1).bool()


def reflect(length: int, pad: int, device: torch.device) -> Tensor:
    """(length + 2 pad,) int64: the line that each line of the padded image repeats, no edge twice.

    torch has no reflect padding for uint8 on every device, hence by index.
    """
    last = length - 1
    return last - (last - torch.arange(-pad, length + pad, device=device).abs()).abs()


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """As of unsigned integers; torch's own shift keeps the sign."""
    return bits >> count & (1 << 64 - count) - 1
