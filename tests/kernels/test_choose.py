"""Choice and shuffle: the kernels against their twins, and what the twins' bijections are like."""

import math
from collections import Counter
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor

from infobatch_fast.kernels import choose, reference, twin
from infobatch_fast.kernels.twin import _network, bijection, permute
from infobatch_fast.telemetry.syncs import host_syncs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK = choose.BLOCK
SIZES = [1, 2, 127, 1000, BLOCK, BLOCK + 1]


def same(got: Any, want: Any) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize("share", [0, 1 / 3, 1])
@pytest.mark.parametrize("size", SIZES)
def test_choose(size: int, share: float) -> None:
    n = round(size * share)
    mask = torch.zeros(size, dtype=torch.bool)
    mask[torch.randperm(size, generator=torch.Generator().manual_seed(n))[:n]] = True
    positions, _ = twin.partition(mask.to(DEVICE))
    few = {0, 1, n // 3, n} if size < 1000 else {n // 2}
    for k in sorted(k for k in few if 0 <= k <= n):
        weight, key = n / k if k else 7.0, 2**64 - 1 - k
        drawn = choose.choose(positions, n, k, weight, key)
        same(drawn, twin.choose(positions, n, k, weight, key))
        indices, weights = (part.cpu() for part in drawn)
        # And by what it is for, whatever the twin says.
        assert indices.unique().numel() == len(indices) == size - n + k
        assert mask[indices].sum() == k
        same(weights, torch.where(mask[indices], weight, 1.0))


@pytest.mark.parametrize("size", SIZES)
def test_shuffle(size: int) -> None:
    for key in (0, 2**63 + 5):
        indices = choose.shuffle(size, key, DEVICE)
        same(indices, twin.shuffle(size, key, DEVICE))
        same(indices.sort().values, torch.arange(size, device=DEVICE))


@pytest.mark.parametrize("size", [2**20, 2**31 - 1, 2**31, 2**31 + 1, 2**32 + 1, 10**11 + 7])
def test_shuffle_of_sizes_that_fit_no_machine(size: int) -> None:
    for key in range(2):
        through = bijection(size, key, twin.ORDER)
        first = torch.empty(BLOCK, dtype=torch.int64, device=DEVICE)
        wide = size >= 2**31
        arguments = choose._arguments(through)
        choose.launch(choose._shuffle_kernel, 1, first, *arguments, WIDE=wide, BLOCK=BLOCK)
        same(first, permute(torch.arange(BLOCK, device=DEVICE), through))
        assert first.unique().numel() == BLOCK
        assert (first.min() >= 0, first.max() < size) == (True, True)


def test_int64_positions_from_2_to_the_31(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    monkeypatch.setattr(
        choose, "launch", lambda *args, **constants: launched.append((args, constants))
    )
    for size, dtype in ((2**31 - 1, torch.int32), (2**31, torch.int64)):
        choose.shuffle(size, 0, "meta")
        choose.choose(torch.empty(size, dtype=dtype, device="meta"), size // 2, 7, 1.0, 0)
        assert [args[1] for args, _ in launched] == [2**21, 2**20 + 1]
        assert [constants["WIDE"] for _, constants in launched] == [size == 2**31] * 2
        launched.clear()


def test_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "launch", None)  # which cannot be called
    positions = torch.arange(5, dtype=torch.int32, device=DEVICE)
    for indices, weights in (
        choose.choose(positions[:0], 0, 0, 1.0, 0),
        choose.choose(positions, 5, 0, 1.0, 0),
    ):
        assert indices.shape == weights.shape == choose.shuffle(0, 0, DEVICE).shape == (0,)


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        *((ValueError, "n", {"n": n}) for n in (7, -1)),
        *((ValueError, "k", {"k": k}) for k in (4, -1)),
        *((ValueError, "key", {"key": key}) for key in (-1, 2**64, 1.5)),
        (TypeError, "positions", {"positions": torch.arange(6, device=DEVICE)}),
    ],
)
def test_refused(error: type[Exception], name: str, arguments: dict[str, Any]) -> None:
    positions = torch.arange(6, dtype=torch.int32, device=DEVICE)
    good = {"positions": positions, "n": 3, "k": 1, "weight": 3.0, "key": 0}
    with pytest.raises(error, match=f"^{name} must be "):
        choose.choose(**{**good, **arguments})


@pytest.mark.gpu
@pytest.mark.parametrize("size", [50_000, 1_281_167, 2**24 + 3])
def test_on_a_gpu_at_size(size: int) -> None:
    mask = torch.rand(size, device=DEVICE) < 0.7
    positions, count = twin.partition(mask)
    n = int(count)
    choose.choose(positions, n, 1, 1.0, 0)  # compiles
    with host_syncs(DEVICE, "forbid"):
        drawn = choose.choose(positions, n, n // 2, 2.0, 3)
        order = choose.shuffle(size, 3, DEVICE)
    same(drawn, twin.choose(positions, n, n // 2, 2.0, 3))
    same(order, twin.shuffle(size, 3, DEVICE))
    for _ in range(20):
        same(choose.choose(positions, n, n // 2, 2.0, 3), drawn)
    # The plan is the same on the host.
    same(twin.choose(positions.cpu(), n, n // 2, 2.0, 3)[0], drawn[0].cpu())


# The bijection


def many(size: int, count: int, stream: int = twin.ORDER) -> Tensor:
    """(count, size): where the bijections of the keys 0, 1, ... lead all of [0, size)."""
    through = [bijection(size, key, stream) for key in range(count)]
    words = {
        name: torch.tensor([[getattr(one, name)] for one in through])
        for name in ("row_key", "column_key", "swap")
    }
    # The twin's arithmetic, with a key for each row of the tensor.
    every: Any = through[0]._replace(**words)
    places = torch.arange(size).expand(count, size)
    led = _network(places ^ ((places < 2) * every.swap), every)
    while (outside := led >= size).any():
        led = torch.where(outside, _network(led, every), led)
    return led


def test_it_is_a_bijection() -> None:
    for size in [*range(1, 300), 999, 1000, 4097, 65_536, 100_003]:
        led = permute(torch.arange(size), bijection(size, size, 0))
        same(led.sort().values, torch.arange(size))
    same(many(1000, 3)[2], twin.shuffle(1000, 2, "cpu"))
    size = 2**31 - 1  # at both of its ends
    ends = torch.cat([torch.arange(5000), torch.arange(size - 5000, size)])
    led = permute(ends, bijection(size, 1, 0))
    assert led.unique().numel() == 10_000
    assert led.max() < size


def test_its_values_are_these() -> None:
    # A change of them changes every run that was ever made on a GPU.
    assert twin.shuffle(10, 0, "cpu").tolist() == SHUFFLED
    assert twin.shuffle(10**6, 2**64 - 1, "cpu")[:3].tolist() == [762539, 781847, 613555]
    indices, weights = twin.choose(torch.arange(8, dtype=torch.int32), 5, 2, 2.5, 7)
    assert indices.tolist() == CHOSEN
    assert weights.tolist() == [2.5 if index < 5 else 1.0 for index in CHOSEN]


SHUFFLED = [6, 1, 0, 3, 2, 8, 7, 4, 5, 9]
CHOSEN = [3, 0, 6, 7, 5]


def test_the_grid_is_hardly_larger_than_the_size() -> None:
    for size in [*range(1, 3000), 50_000, 1_281_167, 10**8, 10**9, 2**31 + 1, 10**11]:
        through = bijection(size, 0, 0)
        cells = through.rows << through.shift
        assert size <= cells < size + (1 << through.shift)
        assert size == 1 or 1 << 2 * through.shift <= 2 * size
        assert (through.rows < 2**31, 1 <= through.shift <= 31) == (True, True)


def test_keys_and_streams_give_unlike_bijections() -> None:
    keys = [*range(2000), *(2**64 - 1 - n for n in range(2000)), *(1 << n for n in range(11, 64))]
    words: Counter[tuple[str, int]] = Counter()
    for key in keys:
        for stream in (twin.CHOICE, twin.ORDER):
            one = bijection(1000, key, stream)
            words["row", one.row_key] += 1
            words["column", one.column_key] += 1
    # Words of 32 bits, each by itself: but for a rare coincidence, all different.
    assert len(words) >= 4 * len(keys) - 4
    # One key's two streams, and two keys that are neighbours: as many equal places as chance has.
    orders = many(1000, 401)
    for other in (many(1000, 400, stream=twin.CHOICE), orders[1:]):
        assert abs(int((orders[:-1] == other).sum()) - 400) < 5 * math.sqrt(400)


@pytest.mark.parametrize("size", [2, 3, 7, 20, 100])
def test_odd_permutations_are_as_frequent_as_even_ones(size: int) -> None:
    orders = many(size, 1000)
    later = torch.arange(size)[:, None] < torch.arange(size)
    inversions = torch.stack([(o[:, None] > o)[later].sum() for o in orders])
    assert abs(int((inversions % 2).sum()) - 500) < 4 * math.sqrt(250)


def chi_square(counts: Tensor) -> float:
    """The probability of counts so uneven, were all cells alike."""
    return float(stats.chisquare(counts.double().numpy()).pvalue)


@pytest.mark.parametrize("size", [2, 3, 5, 6])
def test_every_order_is_as_frequent(size: int) -> None:
    codes = (many(size, 20_000) * size ** torch.arange(size)).sum(1)
    counts = codes.unique(return_counts=True)[1]
    assert len(counts) == math.factorial(size)
    assert chi_square(counts) > 1e-3


@pytest.mark.parametrize("size", [7, 33, 129])
def test_every_element_comes_everywhere(size: int) -> None:
    led = many(size, 15 * size)
    chances = [chi_square(torch.bincount(led[:, i], minlength=size)) for i in range(size)]
    # Of neighbours too, by how far apart they come to lie.
    apart = (led[:, 1:] - led[:, :-1]) % size
    chances += [chi_square(torch.bincount(row, minlength=size)[1:]) for row in apart.T]
    assert min(chances) * len(chances) > 1e-3


def oddity(size: int, keys: int, pairs: int | None = None) -> float:
    """The greatest deviation, in sigmas, of what a Feistel network of few rounds gets wrong.

    How often two elements a step apart stay a step apart, a step being one, or the width of the
    grid, to which neighbouring rows of a column are apart; in the order and in its inverse.
    """
    width = 1 << bijection(size, 0, 0).shift
    seen: Counter[tuple] = Counter()
    every = torch.arange(size)
    for key in range(keys):
        through = bijection(size, key, twin.ORDER)
        led = permute(every, through._replace(pairs=pairs or through.pairs))
        inverse = torch.empty_like(led).scatter_(0, led, every)
        for name, order in enumerate((led, inverse)):
            for step in (1, 2, width):
                apart = order[step:] - order[:-step]
                for far in (1, -1, 2, width, -width):
                    seen[name, step, far] += int((apart == far).sum())
    worst = 0.0
    for (_, step, far), count in seen.items():
        expected = keys * (size - step) * (size - abs(far)) / (size * (size - 1))
        worst = max(worst, abs(count - expected) / math.sqrt(expected))
    return worst


@pytest.mark.parametrize(("size", "keys"), [(1000, 150), (4096, 80), (50_000, 20), (2**20 + 7, 2)])
def test_neighbours_part(size: int, keys: int) -> None:
    assert oddity(size, keys) < 4.5
    assert size > 5000 or oddity(size, keys // 2, pairs=1) > 20  # the measure can tell


def plans(size: int, n: int, k: int, count: int) -> Tensor:
    """(count, K) indices, of the keys 0, 1, ...; samples 0 to n - 1 are the prunable ones."""
    positions = torch.arange(size, dtype=torch.int32)
    return torch.stack([twin.choose(positions, n, k, n / k, key)[0] for key in range(count)])


def test_choice_and_order_together_are_uniform() -> None:
    # N = 4, n = 3, k = 2: three choices, six orders of the three samples, each pair alike.
    codes = (plans(4, 3, 2, 270) * 4 ** torch.arange(3)).sum(1)
    seen, counts = codes.unique(return_counts=True)
    assert len(counts) == 18
    assert chi_square(counts) > 1e-3
    # As those of the reference are.
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(4) < 3
    drawn = [reference.choose(mask, 3, 2, 1.5, generator)[0] for _ in range(270)]
    same((torch.stack(drawn) * 4 ** torch.arange(3)).sum(1).unique(), seen)


def test_each_prunable_sample_and_pair_is_kept_as_often() -> None:
    size, n, k, count = 60, 40, 15, 250
    drawn = plans(size, n, k, count)
    member = torch.zeros(count, size).scatter_(1, drawn, 1.0)
    assert (member[:, n:] == 1).all()
    deviation = math.sqrt(count * k / n * (1 - k / n))
    assert (member[:, :n].sum(0) - count * k / n).abs().max() < 4 * deviation
    pairs = (member[:, :n].T @ member[:, :n])[*torch.triu_indices(n, n, 1)]
    both = k * (k - 1) / (n * (n - 1))
    scores = (pairs - count * both) / math.sqrt(count * both * (1 - both))
    assert scores.abs().max() < 4.5  # of 780
    assert 0.85 < scores.std() < 1.15
    # Where in the epoch a sample comes does not depend on its number, or on whether it is prunable.
    place = torch.argsort(drawn, 1)[:, -(size - n) :].double().mean(0)
    deviation = math.sqrt(((size - n + k) ** 2 - 1) / 12 / count)
    assert (place - (size - n + k - 1) / 2).abs().max() < 4.5 * deviation


@pytest.mark.parametrize(("size", "keys"), [(1000, 60), (50_000, 10)])
def test_the_first_half_has_its_share(size: int, keys: int) -> None:
    """One permutation that both chose and ordered would put the prunable samples first."""
    n = round(0.8 * size)
    k = n // 2
    total, half = size - n + k, (size - n + k) // 2
    share = k / total
    prunable = plans(size, n, k, keys) < n
    first = int(prunable[:, :half].sum())
    spread = math.sqrt(keys * half * share * (1 - share) * (total - half) / (total - 1))
    assert abs(first - keys * half * share) < 4 * spread
    together = keys * share * (k - 1)
    assert abs(int((prunable[:, 1:] & prunable[:, :-1]).sum()) - together) < 4 * together**0.5


@pytest.mark.parametrize("size", [-1, 2**60])
def test_refused_sizes(size: int) -> None:
    with pytest.raises(ValueError, match=rf"^size must be in \[0, 2\*\*60\), got {size}$"):
        bijection(size, 0, 0)
