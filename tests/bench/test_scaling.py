"""What is computed of several processes: bytes and hops of a ring."""

import pytest
from scaling import hops, sent


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_a_ring_by_its_rounds(world: int) -> None:
    size = 24 * world
    rounds = 2 * (world - 1)  # each sends one of W parts: adding up, then telling
    assert hops(world) == rounds
    assert sent(world, size) == pytest.approx(rounds * 4 * size / world)
