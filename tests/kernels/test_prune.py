"""Threshold and partition: the kernels, on a GPU or in Triton's interpreter, and their twins."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from infobatch_fast.kernels import prune, reference, twin
from infobatch_fast.telemetry.syncs import host_syncs

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BLOCK = prune.BLOCK
INF, NAN = math.inf, math.nan
MOST = 3.4028234663852886e38
SIZES = [1, 2, 127, BLOCK - 1, BLOCK, BLOCK + 1, 10_000]


def made_scores(size: int) -> Tensor:
    """Scores with all that may be among them; of sums that float64 holds exactly."""
    rng = np.random.default_rng(size)
    scores = rng.integers(-(2**12), 2**14, size).astype(np.float32) / 256
    special = rng.choice(np.array([NAN, INF, -INF, 0.0, -0.0], np.float32), size)
    return torch.from_numpy(np.where(rng.random(size) < 0.2, special, scores)).to(DEVICE)


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("size", SIZES)
def test_threshold(size: int) -> None:
    scores = made_scores(size)
    same(prune.threshold(scores), reference.threshold(scores))
    scores = torch.rand(size, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(0))
    limit = prune.threshold(scores)
    # The order of the additions may move the mean over a float32, and no further.
    exact = math.fsum(scores.tolist()) / size
    below = limit.nextafter(torch.tensor(-INF, device=DEVICE)).item()
    assert below <= exact * (1 + 1e-13)
    assert exact * (1 - 1e-13) <= limit.item()
    same(prune.threshold(scores), limit)


@pytest.mark.parametrize(
    ("scores", "mean"),
    [
        ([NAN], NAN),
        ([NAN, INF, -INF], NAN),
        ([1.0, NAN, INF, 3.0, -INF], 2.0),
        ([1.0, 1.0, 1 + 2**-23], 1 + 2**-23),  # 1 + 2**-23 / 3: up
        ([-1.0, -1.0, -1 - 2**-23], -1.0),
        ([2**-149, 0.0, 0.0], 2**-149),
        ([-(2**-149), 0.0, 0.0], -0.0),
        ([MOST] * 3, MOST),
        ([-MOST] * 3, -MOST),
        ([2.0**24, 1.0, 1.0, 1.0], 4194305.0),  # in float32 the small ones would be lost
    ],
)
def test_threshold_rounds_up(scores: list[float], mean: float) -> None:
    for of in (prune.threshold, reference.threshold):
        same(of(torch.tensor(scores, device=DEVICE)).cpu(), torch.tensor(mean))


def same_partition(source: Tensor, limit: Tensor | None, mask: Tensor) -> None:
    """Kernel, twin and numpy."""
    bits = mask.cpu().numpy()
    expected = torch.from_numpy(np.concatenate([np.flatnonzero(bits), np.flatnonzero(~bits)]))
    for of in (prune.partition, twin.partition):
        positions, count = of(source, limit)
        same(positions.cpu(), expected.int())
        same(count.cpu(), torch.tensor(int(bits.sum())))


@pytest.mark.parametrize("programs", [1, 4, prune.PROGRAMS])  # of several blocks, or one
@pytest.mark.parametrize("size", SIZES)
def test_partition(monkeypatch: pytest.MonkeyPatch, size: int, programs: int) -> None:
    monkeypatch.setattr(prune, "PROGRAMS", programs)
    scores = made_scores(size)
    limit = prune.threshold(scores)
    same(limit, reference.threshold(scores))
    same_partition(scores, limit, reference.well_learned(scores))
    infinite = torch.full_like(limit, INF)
    same_partition(scores, infinite, scores.isfinite())
    for mask in (scores > 20, scores > NAN, torch.ones_like(scores).bool()):
        same_partition(mask, None, mask)


def test_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune, "launch", None)  # which cannot be called
    scores = torch.empty(0, device=DEVICE)
    limit = prune.threshold(scores)
    assert limit.isnan()
    for source in ((scores, limit), (scores.bool(),)):
        positions, count = prune.partition(*source)
        assert (positions.shape, count.item()) == ((0,), 0)


@pytest.mark.parametrize(
    ("error", "spoil"),
    [
        (TypeError, lambda x: x.double()),
        (ValueError, lambda x: x.view(2, 3)),
        (ValueError, lambda x: x[::2]),
    ],
)
def test_refused_scores(error: type[Exception], spoil) -> None:
    scores = spoil(torch.ones(6, device=DEVICE))
    with pytest.raises(error, match=r"^scores must "):
        prune.threshold(scores)
    with pytest.raises(error, match=r"^source must "):
        prune.partition(scores, torch.ones((), device=DEVICE))
    with pytest.raises(ValueError, match=r"^threshold must be on"):
        prune.partition(torch.ones(6, device=DEVICE), torch.ones((), device="meta"))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [50_000, 1_281_167, 2**24 + 3])
def test_on_a_gpu_at_size_and_in_a_graph(size: int) -> None:
    scores = made_scores(size)
    prune.partition(scores, prune.threshold(scores))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = prune.partition(scores, prune.threshold(scores))
    for seed in range(3):
        scores.copy_(torch.rand(size, generator=torch.Generator().manual_seed(seed)))
        with host_syncs(DEVICE, "forbid"):
            limit = prune.threshold(scores)
            eager = prune.partition(scores, limit)
        graph.replay()
        expected = twin.partition(scores, limit)
        torch.testing.assert_close(limit, reference.threshold(scores), rtol=1.2e-7, atol=0)
        for got, replayed, want in zip(eager, captured, expected, strict=True):
            same(got, want)
            same(replayed, want)
        for _ in range(20):
            same(prune.threshold(scores), limit)
