"""`kernels.prune` against its twin in plain torch, and the twin's statistics.

The tests of the kernels, `test_kernel_...`, run them on the GPU where there is one. Elsewhere they
run in Triton's interpreter, in a process of their own: Triton reads the variable once, when it is
first imported.
"""

import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from infobatch_fast.kernels import prune_torch as twin
from infobatch_fast.kernels import reference
from infobatch_fast.kernels.bijection import _WORD, Bijection, _network, bijection, permute
from infobatch_fast.telemetry.syncs import host_syncs

CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if CUDA else "cpu")
BLOCK = 1024
INF, NAN = math.inf, math.nan


@pytest.fixture
def prune() -> ModuleType:
    pytest.importorskip("triton")
    if not CUDA and not INTERPRETED:
        pytest.skip("run by test_in_the_interpreter")
    from infobatch_fast.kernels import prune

    return prune


@pytest.fixture
def chooser(prune: ModuleType) -> ModuleType:
    from infobatch_fast.kernels import choose

    return choose


def child(code: list[str], **variables: str) -> str:
    """What a Python process prints, in an environment without TRITON_INTERPRET but with these."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *code], env={**env, **variables}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the kernels run in this process")
def test_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    said = child(
        [
            *("-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__))),
            *("-k", "test_kernel_", "-m", "not gpu"),
        ],
        TRITON_INTERPRET="1",
    )
    assert " passed" in said
    assert "skipped" not in said, said[-2000:]


# The kernels ------------------------------------------------------------------------------------


def made_scores(size: int) -> Tensor:
    """Scores with all that may be among them; of sums that float64 holds exactly."""
    rng = np.random.default_rng(size)
    scores = rng.integers(-(2**12), 2**14, size).astype(np.float32) / 256
    special = rng.choice(np.array([NAN, INF, -INF, 0.0, -0.0], np.float32), size)
    return torch.from_numpy(np.where(rng.random(size) < 0.2, special, scores)).to(DEVICE)


SIZES = [1, 2, 127, BLOCK - 1, BLOCK, BLOCK + 1, 10_000]


@pytest.mark.parametrize("size", [*SIZES, 50_000])
def test_kernel_threshold(prune: ModuleType, size: int) -> None:
    scores = made_scores(size)
    torch.testing.assert_close(
        prune.threshold(scores), reference.threshold(scores), rtol=0, atol=0, equal_nan=True
    )
    scores = torch.rand(size, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    seen = prune.threshold(scores)
    assert seen.dtype == torch.float32
    assert seen.shape == ()
    # The order of the additions may move the mean over a float32, and no further.
    exact = math.fsum(scores.tolist()) / size
    below, above = (torch.tensor(seen.item()).nextafter(torch.tensor(to)) for to in (-INF, INF))
    assert below <= exact * (1 + 1e-13)
    assert exact * (1 - 1e-13) <= seen.item() < above
    assert torch.equal(seen, prune.threshold(scores))


@pytest.mark.parametrize(
    ("scores", "mean"),
    [
        ([NAN], NAN),
        ([NAN, INF, -INF], NAN),
        ([1.0, NAN, INF, 3.0, -INF], 2.0),
        ([1.0, 1.0, 1 + 2**-23], 1 + 2**-23),  # 1 + 2**-23 / 3: up
        ([-1.0, -1.0, -1 - 2**-23], -1.0),
        ([-1.0, -1 - 2**-23, -1 - 2**-23], -1 - 0.0),
        ([2**-149, 0.0, 0.0], 2**-149),
        ([-(2**-149), 0.0, 0.0], -0.0),
        ([3.4028234663852886e38] * 3, 3.4028234663852886e38),
        ([-3.4028234663852886e38] * 3, -3.4028234663852886e38),
    ],
)
def test_kernel_threshold_rounds_up(prune: ModuleType, scores: list[float], mean: float) -> None:
    values = torch.tensor(scores, device=DEVICE)
    expected = torch.tensor(mean)
    for of in (prune.threshold, reference.threshold):
        torch.testing.assert_close(of(values).cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_kernel_threshold_of_many_in_float64(prune: ModuleType) -> None:
    # In float32 the small ones would be lost.
    scores = torch.full((3 * BLOCK,), 1e-6, device=DEVICE)
    scores[0] = 1e6
    expected = torch.tensor((1e6 + (3 * BLOCK - 1) * float(np.float32(1e-6))) / (3 * BLOCK))
    torch.testing.assert_close(prune.threshold(scores).cpu(), expected, rtol=1.2e-7, atol=0)


def same_partition(prune: ModuleType, source: Tensor, limit: Tensor | None) -> tuple[Tensor, int]:
    positions, count = prune.partition(source, limit)
    expected, expected_count = twin.partition(source, limit)
    assert torch.equal(positions, expected)
    assert positions.dtype == torch.int32
    assert count.dtype == torch.int64
    assert count.shape == ()
    assert count == expected_count
    return positions, int(count)


@pytest.mark.parametrize("size", SIZES)
def test_kernel_partition(prune: ModuleType, size: int) -> None:
    scores = made_scores(size)
    for limit in (reference.threshold(scores), scores[:1].view(()), torch.tensor(INF).to(DEVICE)):
        positions, n = same_partition(prune, scores, limit)
        mask = ((scores < limit) & scores.isfinite()).cpu().numpy()
        expected = np.concatenate([np.flatnonzero(mask), np.flatnonzero(~mask)])
        assert n == mask.sum()
        np.testing.assert_array_equal(positions.cpu().numpy(), expected)
    for mask in (scores > 20, scores > NAN, scores == scores, torch.ones_like(scores).bool()):
        same_partition(prune, mask, None)


@pytest.mark.parametrize("programs", [1, 2, 4])
@pytest.mark.parametrize("size", [3 * BLOCK, 4 * BLOCK + 1, 9 * BLOCK + 7])
def test_kernel_of_several_blocks_a_program(
    prune: ModuleType, monkeypatch: pytest.MonkeyPatch, size: int, programs: int
) -> None:
    monkeypatch.setattr(prune, "PROGRAMS", programs)
    scores = made_scores(size)
    limit = prune.threshold(scores)
    assert torch.equal(limit, reference.threshold(scores))
    _, n = same_partition(prune, scores, limit)
    assert 0 < n < size
    same_partition(prune, scores > 3, None)


def kept(n: int) -> list[int]:
    return sorted({k for k in (0, 1, n // 3, n - 1, n) if 0 <= k <= n})


@pytest.mark.parametrize("size", SIZES)
def test_kernel_choose(prune: ModuleType, chooser: ModuleType, size: int) -> None:
    shares = (0, 1 / 3, 1) if size > 200 else (0, 0.1, 1 / 3, 0.9, 1)
    for share in shares:
        n = round(size * share)
        mask = torch.zeros(size, dtype=torch.bool, device=DEVICE)
        mask[torch.randperm(size, generator=torch.Generator().manual_seed(n))[:n].to(DEVICE)] = True
        positions, _ = same_partition(prune, mask, None)
        for k in kept(n) if size < 200 else [n // 2]:
            check_choice(chooser, mask, positions, n, k, 2**64 - 1 - k)


def check_choice(
    chooser: ModuleType, mask: Tensor, positions: Tensor, n: int, k: int, key: int
) -> None:
    weight = n / k if k else 7.0
    indices, weights = chooser.choose(positions, n, k, weight, key)
    of_twin = twin.choose(positions, n, k, weight, key)
    assert torch.equal(indices, of_twin[0])
    assert torch.equal(weights, of_twin[1])
    assert indices.dtype == torch.int64
    assert weights.dtype == torch.float32
    narrow, _ = chooser.choose(positions, n, k, weight, key, torch.int32)
    assert narrow.dtype == torch.int32
    assert torch.equal(narrow.long(), indices)
    # And by what it is for, whatever the twin says.
    drawn, prunable = indices.tolist(), mask.tolist()
    assert len(drawn) == len(set(drawn)) == len(prunable) - n + k
    assert set(drawn) >= {i for i, may in enumerate(prunable) if not may}
    assert sum(prunable[i] for i in drawn) == k
    expected = [np.float32(weight) if prunable[i] else np.float32(1) for i in drawn]
    np.testing.assert_array_equal(weights.cpu().numpy(), np.array(expected, np.float32))


@pytest.mark.parametrize("size", [1, 2, 3, 127, 999, 1000, BLOCK, 10_000])
def test_kernel_shuffle(prune: ModuleType, chooser: ModuleType, size: int) -> None:
    for key in (0, 2**63 + 5):
        indices = chooser.shuffle(size, key, DEVICE)
        assert torch.equal(indices, twin.shuffle(size, key, DEVICE))
        assert torch.equal(indices.sort().values, torch.arange(size, device=DEVICE))
    narrow = chooser.shuffle(size, 1, DEVICE, torch.int32)
    assert narrow.dtype == torch.int32
    assert torch.equal(narrow.long(), chooser.shuffle(size, 1, DEVICE))
    assert torch.equal(
        chooser.shuffle(size, 1, DEVICE, rounds=2), twin.shuffle(size, 1, DEVICE, rounds=2)
    )


@pytest.mark.parametrize(
    "size", [2**20, 10**9, 2**31 - 1, 2**31, 2**31 + 1, 3 * 10**9, 2**32 + 1, 10**11 + 7]
)
def test_kernel_shuffle_of_sizes_that_fit_no_machine(
    prune: ModuleType, chooser: ModuleType, size: int
) -> None:
    for key in range(4):
        through = bijection(size, key, twin.ORDER)
        first = torch.empty(BLOCK, dtype=torch.int64, device=DEVICE)
        constants = prune.launch(WIDE=size >= 2**31, BLOCK=BLOCK)
        chooser._shuffle_kernel[(1,)](first, *chooser._arguments(through), **constants)
        assert torch.equal(first, permute(torch.arange(BLOCK, device=DEVICE), through))
        assert first.unique().numel() == BLOCK
        assert first.min() >= 0
        assert first.max() < size


def test_kernel_of_int64_positions(
    prune: ModuleType, chooser: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched = []

    class Recorder:
        def __getitem__(self, grid: tuple[int]):
            return lambda *args, **constants: launched.append((grid, args, constants))

    monkeypatch.setattr(prune, "_sums_kernel", Recorder())
    for name in ("_shuffle_kernel", "_choose_kernel"):
        monkeypatch.setattr(chooser, name, Recorder())
    for size in (2**31 - 1, 2**31):
        wide = size == 2**31
        chooser.shuffle(size, 0, "meta")
        positions = torch.empty(size, dtype=torch.int64 if wide else torch.int32, device="meta")
        chooser.choose(positions, size // 2, 7, 1.0, 0)
        assert [grid for grid, _, _ in launched] == [(2**21,), (2**20 + 1,)]
        assert [constants["WIDE"] for _, _, constants in launched] == [wide, wide]
        launched.clear()


def test_kernel_empty(
    prune: ModuleType, chooser: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (prune, chooser):
        for name in list(vars(module)):
            if name.endswith("_kernel") and name != "_sums_kernel":
                monkeypatch.setattr(module, name, None)  # which cannot be launched
    scores = torch.empty(0, device=DEVICE)
    limit = prune.threshold(scores)
    assert limit.isnan()
    assert limit.shape == ()
    for source in ((scores, limit), (scores.bool(),)):
        positions, count = prune.partition(*source)
        assert positions.shape == (0,)
        assert count == 0
    indices, weights = chooser.choose(positions, 0, 0, 1.0, 0)
    assert indices.shape == weights.shape == chooser.shuffle(0, 0, DEVICE).shape == (0,)
    none_left = torch.arange(5, dtype=torch.int32, device=DEVICE)
    assert chooser.choose(none_left, 5, 0, 1.0, 0)[0].shape == (0,)


def test_kernel_refusals(prune: ModuleType, chooser: ModuleType) -> None:
    scores = torch.ones(6, device=DEVICE)
    limit = torch.tensor(1.0, device=DEVICE)
    positions = torch.arange(6, dtype=torch.int32, device=DEVICE)

    def refused(error: type[Exception], said: str, call, *args) -> None:
        with pytest.raises(error, match=said):
            call(*args)

    refused(
        TypeError,
        r"^scores must be torch.float32, got torch.float64$",
        prune.threshold,
        scores.double(),
    )
    refused(
        ValueError,
        r"^scores must have shape \(N,\), got \(2, 3\)$",
        prune.threshold,
        scores.view(2, 3),
    )
    refused(
        ValueError, r"^scores must be contiguous, got strides \(2,\)$", prune.threshold, scores[::2]
    )
    refused(
        TypeError, r"^source must be torch.bool, got torch.float32$", prune.partition, scores, None
    )
    refused(
        TypeError,
        r"^source must be torch.float32, got torch.bool$",
        prune.partition,
        scores.bool(),
        limit,
    )
    refused(
        ValueError,
        r"^threshold must have shape \(\), got \(1,\)$",
        prune.partition,
        scores,
        limit.view(1),
    )
    refused(
        ValueError,
        rf"^threshold must be on {DEVICE}.*, got meta$",
        prune.partition,
        scores,
        limit.to("meta"),
    )
    for n, k, said in (
        (7, 1, r"^n must be in \[0, 6\], got 7$"),
        (-1, 0, "^n must"),
        (3, 4, r"^k must be in \[0, 3\], got 4$"),
        (3, -1, "^k must"),
    ):
        refused(ValueError, said, chooser.choose, positions, n, k, 1.0, 0)
    refused(
        TypeError,
        r"^positions must be torch.int32, got torch.int64$",
        chooser.choose,
        positions.long(),
        *(3, 1, 3.0, 0),
    )
    for key in (-1, 2**64, 1.5):
        refused(
            ValueError,
            rf"^key must be a whole number in \[0, 2\*\*64\), got {key}$",
            chooser.shuffle,
            *(6, key, DEVICE),
        )
    refused(
        ValueError,
        "^dtype must be torch.int32 or torch.int64, got torch.int16$",
        chooser.shuffle,
        *(6, 0, DEVICE, torch.int16),
    )
    refused(
        ValueError,
        r"^dtype must be torch.int64 for more than 2\*\*31 samples, got torch.int32$",
        chooser.shuffle,
        *(2**31 + 1, 0, DEVICE, torch.int32),
    )


AHEAD_OF_TIME = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from infobatch_fast.kernels import choose as chooser
from infobatch_fast.kernels import prune

def through(size, prefix=""):
    names = ["size", "rows", "shift", "row_key", "column_key", "pairs"]
    return {prefix + name: size if name == "size" else "i32" for name in names}

sources = []
def add(kernel, signature, **constants):
    sources.append((kernel, signature, constants))

add(prune._sums_kernel, dict(scores="*fp32", sums="*fp64", counts="*i64", num_samples="i32",
                             blocks="i32"), BLOCK=1024)
add(prune._mean_kernel, dict(sums="*fp64", counts="*i64", mean="*fp32", programs="i32"),
    PROGRAMS=2048)
for mask, size, wide in ((False, "i32", "*i32"), (True, "i64", "*i64")):
    source = dict(source="*u8" if mask else "*fp32", threshold="*i64" if mask else "*fp32")
    add(prune._count_kernel, dict(**source, counts="*i64", num_samples=size, blocks="i32"),
        MASK=mask, BLOCK=1024)
    add(prune._partition_kernel, dict(**source, counts="*i64", positions=wide, total="*i64",
                                      num_samples=size, blocks="i32", programs="i32"),
        MASK=mask, BLOCK=1024, PROGRAMS=2048)
for size, positions, indices in (("i32", "*i32", "*i32"), ("i64", "*i64", "*i64")):
    constants = dict(WIDE=size == "i64", BLOCK=1024)
    add(chooser._shuffle_kernel, dict(indices=indices, **through(size)), **constants)
    add(chooser._choose_kernel, dict(positions=positions, indices=indices, weights="*fp32", n=size,
                                   k=size, weight="fp32", **through(size),
                                   **through(size, "choice_")), **constants)
for kernel, signature, constants in sources:
    named = {**signature, **dict.fromkeys(constants, "constexpr")}
    named = {name: named[name] for name in kernel.arg_names}
    pointers = [i for i, kind in enumerate(named.values()) if kind.startswith("*")]
    aligned = {(i,): [["tt.divisibility", 16]] for i in pointers}
    for capability in (80, 90, 100):
        compiled = triton.compile(ASTSource(kernel, named, constants, aligned),
                                  target=GPUTarget("cuda", capability, 32), options=prune.launch())
        ptx = compiled.asm["ptx"]
        assert len(compiled.asm["cubin"]) > 1000
        assert f".target sm_{capability}" in ptx
        assert ".local" not in ptx  # the stack, which registers spill to
        assert "atom" not in ptx
    if kernel in (prune._sums_kernel, prune._count_kernel) and "fp32" in str(signature):
        assert "ld.global.v4" in ptx  # whole blocks are read 16 bytes at a time
print("compiled", len(sources))
"""


def test_ahead_of_time(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    said = child(["-c", AHEAD_OF_TIME], TRITON_CACHE_DIR=str(tmp_path))
    assert said == "compiled 10\n"


@pytest.mark.gpu
@pytest.mark.parametrize("size", [50_000, 1_281_167, 2**24 + 3])
def test_kernel_on_the_gpu_at_size(prune: ModuleType, chooser: ModuleType, size: int) -> None:
    generator = torch.Generator(DEVICE).manual_seed(size)
    scores = torch.rand(size, device=DEVICE, generator=generator) ** 3
    scores[::17] = NAN
    with host_syncs(DEVICE, "forbid"):
        limit = prune.threshold(scores)
        positions, count = prune.partition(scores, limit)
    torch.testing.assert_close(limit, reference.threshold(scores), rtol=1.2e-7, atol=0)
    expected, n = twin.partition(scores, limit)
    assert torch.equal(positions, expected)
    assert count == n
    n = int(n)
    k = n // 2
    with host_syncs(DEVICE, "forbid"):
        first = chooser.choose(positions, n, k, n / k, 3)
        order = chooser.shuffle(size, 3, DEVICE)
    for _ in range(20):
        assert torch.equal(limit, prune.threshold(scores))
        assert all(map(torch.equal, first, chooser.choose(positions, n, k, n / k, 3)))
    assert all(map(torch.equal, first, twin.choose(positions, n, k, n / k, 3)))
    assert torch.equal(order, twin.shuffle(size, 3, DEVICE))
    # The plan is the same on the host.
    on_host = twin.choose(positions.cpu(), n, k, n / k, 3)
    assert torch.equal(first[0].cpu(), on_host[0])


@pytest.mark.gpu
def test_kernel_in_a_cuda_graph(prune: ModuleType) -> None:
    scores = torch.rand(50_000, device=DEVICE)
    prune.partition(scores, prune.threshold(scores))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        limit = prune.threshold(scores)
        positions, count = prune.partition(scores, limit)
    for seed in range(3):
        scores.copy_(torch.rand(50_000, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        expected = prune.threshold(scores)
        assert torch.equal(limit, expected)
        assert torch.equal(positions, prune.partition(scores, expected)[0])
        assert count == prune.partition(scores, expected)[1]


# The bijection ----------------------------------------------------------------------------------


def many(size: int, count: int, rounds: int | None = None, stream: int = twin.ORDER) -> Tensor:
    """(count, size): where the bijections of the keys 0, 1, ... lead all of [0, size)."""
    through = [bijection(size, key, stream, rounds) for key in range(count)]
    rows, columns = (
        torch.tensor([[getattr(one, name)] for one in through])
        for name in ("row_key", "column_key")
    )
    # The twin's arithmetic, with a key for each row of the tensor.
    all_of_them = through[0]._replace(row_key=rows, column_key=columns)
    led = _network(torch.arange(size).expand(count, size), all_of_them)
    while (outside := led >= size).any():
        led = torch.where(outside, _network(led, all_of_them), led)
    return led


def test_it_is_a_bijection() -> None:
    for size in [*range(1, 300), 999, 1000, 4097, 65_536, 1_000_003]:
        led = permute(torch.arange(size), bijection(size, size, 0))
        assert torch.equal(led.sort().values, torch.arange(size)), size
    assert torch.equal(many(1000, 3)[2], twin.shuffle(1000, 2, "cpu"))
    # A size of 2**31 - 1, at both of its ends.
    size = 2**31 - 1
    ends = torch.cat([torch.arange(5000), torch.arange(size - 5000, size)])
    led = permute(ends, bijection(size, 1, 0))
    assert led.unique().numel() == 10_000
    assert led.max() < size


def test_its_values_are_these() -> None:
    # A change of them changes every run that was ever made.
    assert twin.shuffle(10, 0, "cpu").tolist() == [1, 6, 0, 3, 2, 8, 7, 4, 5, 9]
    assert twin.shuffle(10**6, 2**64 - 1, "cpu")[:5].tolist() == [
        762539,
        781847,
        613555,
        965941,
        83429,
    ]
    indices, weights = twin.choose(torch.arange(8, dtype=torch.int32), 5, 2, 2.5, 7)
    assert indices.tolist() == [3, 0, 6, 7, 5]
    assert weights.tolist() == [2.5, 2.5, 1.0, 1.0, 1.0]


def test_the_grid_is_hardly_larger_than_the_size() -> None:
    for size in [*range(1, 3000), 50_000, 1_281_167, 10**8, 10**9, 2**31 + 1, 10**11]:
        through = bijection(size, 0, 0)
        cells = through.rows << through.shift
        assert size <= cells < size + (1 << through.shift)
        assert size == 1 or 1 << 2 * through.shift <= 2 * size
        assert through.rows < 2**31
        assert 1 <= through.shift <= 31


def test_the_rounds() -> None:
    rounds = {size: 2 * bijection(size, 0, 0).pairs for size in (1, 999, 1000, 2**20 - 1, 2**20)}
    assert list(rounds.values()) == [24, 24, 12, 12, 8]
    assert bijection(10**9, 0, 0).pairs == 4


@pytest.mark.parametrize("rounds", [0, 1, 3, -2])
def test_refused_rounds(rounds: int) -> None:
    with pytest.raises(ValueError, match=f"^rounds must be even and at least 2, got {rounds}$"):
        bijection(5, 0, 0, rounds)


@pytest.mark.parametrize("size", [-1, 2**60])
def test_refused_sizes(size: int) -> None:
    with pytest.raises(ValueError, match=rf"^size must be in \[0, 2\*\*60\), got {size}$"):
        bijection(size, 0, 0)


def test_keys_and_streams_give_unlike_bijections() -> None:
    words: Counter[tuple[str, int]] = Counter()
    keys = [*range(2000), *(2**64 - 1 - n for n in range(2000)), *(1 << n for n in range(11, 64))]
    for key in keys:
        for stream in (twin.CHOICE, twin.ORDER):
            one = bijection(1000, key, stream)
            assert 0 <= one.row_key <= _WORD
            assert 0 <= one.column_key <= _WORD
            words["row", one.row_key] += 1
            words["column", one.column_key] += 1
    # Words of 32 bits, each by itself: but for a rare coincidence, all different.
    assert len(words) >= 4 * len(keys) - 4
    # One key's two streams, and two keys that are neighbours: as many equal places as chance has.
    for a, b in ((many(1000, 400), many(1000, 400, stream=0)), (many(1000, 400), many(1000, 401))):
        equal = int((a == b[-400:]).sum())
        assert abs(equal - 400) < 5 * math.sqrt(400)


def chi_square(counts: Tensor, dof: int | None = None) -> float:
    """The probability of counts so uneven, were all cells alike."""
    expected = counts.sum().item() / counts.numel()
    value = ((counts - expected) ** 2 / expected).sum().item()
    return float(stats.chi2.sf(value, counts.numel() - 1 if dof is None else dof))


def every_order(size: int, rounds: int | None) -> float:
    led = many(size, 60_000, rounds)
    codes = (led * size ** torch.arange(size)).sum(1)
    seen = codes.unique(return_counts=True)[1]
    counts = torch.zeros(math.factorial(size), dtype=torch.float64)
    counts[: len(seen)] = seen.double()
    return chi_square(counts)


@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_every_order_is_as_frequent(size: int) -> None:
    assert every_order(size, None) > 1e-3


@pytest.mark.parametrize("size", [3, 4, 5, 6])
@pytest.mark.parametrize("rounds", [2, 4])
def test_few_rounds_prefer_some_orders(size: int, rounds: int) -> None:
    assert every_order(size, rounds) < 1e-20


def everywhere(size: int, rounds: int | None) -> float:
    """Every element to every place: the least likely of the elements' counts, corrected for all."""
    led = many(size, 40 * size, rounds)
    chances = [chi_square(torch.bincount(led[:, i], minlength=size).double()) for i in range(size)]
    # Of neighbours too, by how far apart they come to lie.
    apart = (led[:, 1:] - led[:, :-1]) % size
    chances += [chi_square(torch.bincount(row, minlength=size)[1:].double()) for row in apart.T]
    return min(chances) * len(chances)


@pytest.mark.parametrize("size", [7, 16, 33, 100, 129])
def test_every_element_comes_everywhere(size: int) -> None:
    assert everywhere(size, None) > 1e-3


@pytest.mark.parametrize("size", [16, 33, 100, 129])
def test_two_rounds_do_not_lead_everywhere(size: int) -> None:
    assert everywhere(size, 2) < 1e-20


def oddity(size: int, keys: int, rounds: int | None) -> float:
    """The greatest deviation, in sigmas, of what a Feistel network of few rounds gets wrong.

    How often two elements a step apart stay a step apart, a step being one, or the width of the
    grid, to which neighbouring rows of a column are apart; in the order and in its inverse. And how
    the first 16 parts of the range, and its residues modulo 16, are spread over the like.
    """
    width = 1 << bijection(size, 0, 0).shift
    seen: Counter[tuple] = Counter()
    cells = torch.zeros(4, 16, 16, dtype=torch.float64)
    every = torch.arange(size)
    parts = (every * 16 // size, every % 16)
    for key in range(keys):
        led = permute(every, bijection(size, key, twin.ORDER, rounds))
        inverse = torch.empty_like(led).scatter_(0, led, every)
        for name, order in enumerate((led, inverse)):
            for step in (1, 2, width):
                apart = order[step:] - order[:-step]
                for far in (1, -1, 2, width, -width):
                    seen[name, step, far] += int((apart == far).sum())
        for i, (a, b) in enumerate((a, b) for a in parts for b in parts):
            table = torch.bincount(a * 16 + b[led], minlength=256).view(16, 16).double()
            expected = torch.outer(torch.bincount(a), torch.bincount(b)) / size
            cells[i] += (table - expected) ** 2 / expected
    worst = 0.0
    for (_, step, far), count in seen.items():
        expected = keys * (size - step) * (size - abs(far)) / (size * (size - 1))
        worst = max(worst, abs(count - expected) / math.sqrt(expected))
    dof = 15 * 15 * keys
    for value in cells.sum((1, 2)).tolist():
        worst = max(worst, abs(value - dof) / math.sqrt(2 * dof))
    return worst


STRUCTURE = [(1000, 300), (4096, 150), (50_000, 40), (2**20 + 7, 4)]


@pytest.mark.parametrize(("size", "keys"), STRUCTURE)
def test_neighbours_part(size: int, keys: int) -> None:
    assert oddity(size, keys, None) < 4


@pytest.mark.parametrize(("size", "keys"), STRUCTURE[:3])
def test_neighbours_stay_together_in_few_rounds(size: int, keys: int) -> None:
    assert oddity(size, keys // 4, 2) > 50
    assert oddity(size, keys, 4) > 5


# The choice and the order -----------------------------------------------------------------------


def plans(size: int, n: int, k: int, count: int, rounds: int | None = None) -> Tensor:
    """(count, K) indices, of the keys 0, 1, ...; samples 0 to n - 1 are the prunable ones."""
    positions = torch.arange(size, dtype=torch.int32)
    drawn = [twin.choose(positions, n, k, n / k, key, rounds=rounds)[0] for key in range(count)]
    return torch.stack(drawn)


def test_choice_and_order_together_are_uniform() -> None:
    # N = 4, n = 3, k = 2: three choices, six orders of the three samples, each pair alike.
    drawn = plans(4, 3, 2, 900)
    codes = (drawn * 4 ** torch.arange(3)).sum(1).tolist()
    counts = torch.tensor(list(Counter(codes).values()), dtype=torch.float64)
    assert counts.numel() == 18
    assert chi_square(counts) > 1e-3
    # As those of the reference are.
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(4) < 3
    of_reference = [reference.choose(mask, 3, 2, 1.5, generator)[0] for _ in range(900)]
    assert set(codes) == set((torch.stack(of_reference) * 4 ** torch.arange(3)).sum(1).tolist())


def test_each_prunable_sample_and_pair_is_kept_as_often() -> None:
    size, n, k, count = 60, 40, 15, 1000
    drawn = plans(size, n, k, count)
    member = torch.zeros(count, size).scatter_(1, drawn, 1.0)
    assert (member[:, n:] == 1).all()
    often = member[:, :n].sum(0)
    deviation = math.sqrt(count * k / n * (1 - k / n))
    assert (often - count * k / n).abs().max() < 4 * deviation
    pairs = (member[:, :n].T @ member[:, :n])[*torch.triu_indices(n, n, 1)]
    both = k * (k - 1) / (n * (n - 1))
    scores = (pairs - count * both) / math.sqrt(count * both * (1 - both))
    assert scores.abs().max() < 4.5  # of 780
    assert 0.85 < scores.std() < 1.15
    # Where in the epoch a sample comes does not depend on its number, or on whether it is prunable.
    place = torch.argsort(drawn, 1)[:, -(size - n) :].double().mean(0)
    deviation = math.sqrt(((size - n + k) ** 2 - 1) / 12 / count)
    assert (place - (size - n + k - 1) / 2).abs().max() < 4.5 * deviation


@pytest.mark.parametrize(("size", "keys"), [(1000, 60), (50_000, 10), (10**6, 2)])
def test_the_first_half_has_its_share(size: int, keys: int) -> None:
    """One permutation that both chose and ordered would put the prunable samples first."""
    n = round(0.8 * size)
    k = n // 2
    total = size - n + k
    half = total // 2
    share = k / total
    first = neighbours = 0
    for key in range(keys):
        prunable = twin.choose(torch.arange(size, dtype=torch.int32), n, k, 2.0, key)[0] < n
        first += int(prunable[:half].sum())
        neighbours += int((prunable[1:] & prunable[:-1]).sum())
    spread = math.sqrt(keys * half * share * (1 - share) * (total - half) / (total - 1))
    assert abs(first - keys * half * share) < 4 * spread
    together = keys * (total - 1) * share * (k - 1) / (total - 1)
    assert abs(neighbours - together) < 4 * math.sqrt(together)


def test_choice_and_order_have_keys_of_their_own() -> None:
    """Whether a prunable sample is kept says nothing of its rank, nor its rank of its place."""
    size, n, k = 20_000, 20_000, 10_000
    correlations = []
    for key in range(20):
        drawn = twin.choose(torch.arange(size, dtype=torch.int32), n, k, 2.0, key)[0].double()
        place = torch.arange(k, dtype=torch.float64)
        correlations.append(torch.corrcoef(torch.stack([place, drawn]))[0, 1].item())
        assert abs(drawn.mean() - (n - 1) / 2) < 4.5 * n / math.sqrt(12 * k * 2)
    scores = np.array(correlations) * math.sqrt(k)
    assert np.abs(scores).max() < 4
    assert 0.5 < scores.std() < 1.5


def test_a_bijection_is_plain_numbers() -> None:
    assert isinstance(bijection(7, 0, 0), Bijection)
    assert all(isinstance(number, int) for number in bijection(7, 0, 0))
