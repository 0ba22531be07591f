"""A keyed bijection on [0, size): what a shuffle is read through, an element at a time.

A Feistel network over a grid of `rows` x 2**shift cells, of which the first `size` are used: a
round adds to the row, modulo `rows`, a hash of the column, the next one flips bits of the column by
a hash of the row. Where it leaves [0, size) it is applied again (cycle-walking), which ends, since
the network's cycle leads back to where it began.

The grid is the smallest of whole rows, not the smallest power of two: fewer than 2**shift of its
cells, about sqrt(size), are unused, so a block of a kernel seldom walks. Of a power of two up to
half would be, and a block of 1,024 would walk until its last element is home, some eleven times.

Which hash, and how many rounds: see `ROUNDS`. All arithmetic is of unsigned 32-bit words that wrap,
so the kernels, the interpreter and this module agree bit for bit.
"""

from typing import NamedTuple

from torch import Tensor

# The digits after the point of sqrt(3), sqrt(2) and the golden ratio, which are odd.
FIRST = 0xBB67AE85
SECOND = 0x6A09E667
STEP = 0x9E3779B9

# What a network of few rounds shows is in how often two neighbours stay two neighbours: measured,
# it is sqrt(size) times too often with 2 or 3 rounds, 2 times with 4 or 5, and by a share of about
# 1/sqrt(size) with 6 or 7. At that pace the share is 1/size with 8, too little to be measured, and
# size**-2 with 12. Of a few elements some orders are too frequent all the same: of 5 and 6 elements
# with 12 rounds, not with 16.
ROUNDS = ((1000, 24), (1 << 20, 12), (1 << 60, 8))

_WORD = (1 << 32) - 1


class Bijection(NamedTuple):
    """The numbers that define one; see `bijection`.

    Attributes:
        size: of the range that is permuted.
        rows: of the grid.
        shift: base-2 logarithm of its columns.
        row_key: 32 bits that the rows' hashes are keyed with.
        column_key: 32 bits for the columns'.
        pairs: half the rounds, one of a row and one of a column each.
    """

    size: int
    rows: int
    shift: int
    row_key: int
    column_key: int
    pairs: int


def bijection(size: int, key: int, stream: int, rounds: int | None = None) -> Bijection:
    """The bijection on [0, size) that belongs to a key.

    Args:
        size: in [0, 2**60); 0 is taken as 1, so that a kernel may evaluate what it does not use.
        key: 64 bits. They are mixed here: keys that are near each other give unlike bijections.
        stream: another stream of the same key is independent of it.
        rounds: even; None is as many as `ROUNDS` says for the size.

    Raises:
        ValueError: an argument is out of range.
    """
    check_key(key)
    if not 0 <= size < 1 << 60:
        raise ValueError(f"size must be in [0, 2**60), got {size}")
    size = max(size, 1)
    if rounds is None:
        rounds = next(rounds for below, rounds in ROUNDS if size < below)
    if rounds < 2 or rounds % 2:
        raise ValueError(f"rounds must be even and at least 2, got {rounds}")
    # At least two columns: a single one would leave nothing but rotations of the rows.
    shift = max(1, (size - 1).bit_length() // 2)
    words = _mix(_mix(key) + stream)
    return Bijection(size, -(-size >> shift), shift, words & _WORD, words >> 32, pairs=rounds // 2)


def check_key(key: int) -> None:
    """Raise ValueError unless key is a whole number of 64 bits."""
    if not isinstance(key, int) or not 0 <= key < 1 << 64:
        raise ValueError(f"key must be a whole number in [0, 2**64), got {key}")


def permute(positions: Tensor, through: Bijection) -> Tensor:
    """Where a bijection leads, in plain torch: the twin of `_permute` of `choose`.

    Args:
        positions: any shape, int64, in [0, size).
        through: the bijection.

    Returns:
        The shape of `positions`, int64, in [0, size). Waits for the device, which the kernels do
        not.
    """
    led = _network(positions, through)
    while True:
        outside = (led >= through.size).nonzero(as_tuple=True)
        if not outside[0].numel():
            return led
        led[outside] = _network(led[outside], through)


def _network(positions: Tensor, through: Bijection) -> Tensor:
    row = positions >> through.shift
    column = positions & (1 << through.shift) - 1
    for pair in range(through.pairs):
        drawn = _scramble(column, through.row_key + pair * STEP)
        row = (row + (drawn * through.rows >> 32)) % through.rows
        drawn = _scramble(row, through.column_key + pair * STEP)
        column = column ^ drawn >> 32 - through.shift
    return row << through.shift | column


def _scramble(word: Tensor, key: int) -> Tensor:
    """A hash of 32 bits, whose high bits are the good ones; int64 that wraps keeps the low 32."""
    word = (word + key & _WORD) * FIRST & _WORD
    return (word ^ word >> 15) * SECOND & _WORD


def _mix(value: int) -> int:
    """64 bits of which each depends on each bit of the value."""
    mask = (1 << 64) - 1
    value = value + 0x9E3779B97F4A7C15 & mask
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
    return value ^ value >> 31
