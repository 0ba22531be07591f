"""The synthetic images: their form, shares and difficulty, and the seed that decides them."""

import pytest
import torch
from cifar_files_made import fails

from infobatch_fast.data import synthetic
from infobatch_fast.data.dataset import Dataset
from infobatch_fast.data.synthetic import make_synthetic


def same(a: Dataset, b: Dataset, *names: str) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


ALL = ("images", "labels", "test_images", "test_labels")


def test_synthetic_is_a_function_of_its_seed() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make_synthetic(5000, 300, seed=3)  # more than one chunk
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(first, make_synthetic(5000, 300, seed=3), *ALL)
    other = make_synthetic(5000, 300, seed=4)
    assert not any(same(first, other, name) for name in ALL)
    fewer = make_synthetic(7, 300, seed=3)
    assert same(first, fewer, "test_images", "test_labels")
    assert not torch.equal(first.images[:300], first.test_images)


def test_synthetic_form() -> None:
    got = make_synthetic(5003, 61, 4, seed=-1)
    assert got.images.shape == (5003, 32, 32, 3)
    assert got.test_images.shape == (61, 32, 32, 3)
    assert got.images.dtype == torch.uint8
    assert got.images.is_contiguous()
    assert sorted(got.labels.bincount().tolist()) == [1250, 1251, 1251, 1251]
    assert sorted(got.test_labels.bincount().tolist()) == [15, 15, 15, 16]
    assert got.labels.dtype == torch.int64
    assert (got.name, got.source, got.num_classes) == ("synthetic", "synthetic", 4)
    assert (got.mean, got.std) == ((0.5,) * 3, (0.25,) * 3)
    # The order is random: the number of equal neighbours is that of independent labels.
    equal = (got.labels[1:] == got.labels[:-1]).float().mean().item()
    assert abs(equal - 0.25) < 4 * (0.25 * 0.75 / 5002) ** 0.5
    pixels = got.images.float() / 255
    assert abs(pixels.mean().item() - 0.5) < 0.05
    assert 0.15 < pixels.std().item() < 0.35
    assert ((got.images == 0) | (got.images == 255)).float().mean().item() < 0.1


@pytest.mark.parametrize("counts", [(1, 1, 2), (1, 1, 1000), (4096, 1, 2), (4097, 3, 3)])
def test_synthetic_sizes(counts: tuple[int, int, int]) -> None:
    got = make_synthetic(*counts)
    assert len(got.images) == len(got.labels) == counts[0]
    assert len(got.test_images) == len(got.test_labels) == counts[1]
    assert 0 <= int(got.labels.min()) <= int(got.labels.max()) < counts[2]
    assert got.images[-1].float().std() > 5  # the last one is an image as well


@pytest.mark.parametrize(
    ("easy", "hard"), [(0.5, 0.1), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.3, 0.7), (0.9, 0.1)]
)
def test_synthetic_shares(easy: float, hard: float) -> None:
    n = 4000
    images = make_synthetic(n, 1, easy=easy, hard=hard).images.float()
    # Second differences leave little of the smooth patterns: the noise tells the level.
    rough = (images[:, 2:] - 2 * images[:, 1:-1] + images[:, :-2]).std((1, 2, 3)) / 6**0.5 / 64
    low, middle, high = synthetic._NOISE
    got_easy = (rough < (low + middle) / 2).float().mean().item()
    got_hard = (rough > (middle + high) / 2).float().mean().item()
    for got, share in ((got_easy, easy), (got_hard, hard)):
        assert abs(got - share) <= 4 * (share * (1 - share) / n) ** 0.5 + 0.005


def test_synthetic_can_be_learned() -> None:
    """Nearest neighbour: easy samples mostly right, hard ones mostly wrong, neither at chance."""

    def accuracy(easy: float, hard: float) -> float:
        got = make_synthetic(8000, 400, easy=easy, hard=hard)
        train, test = (
            torch.nn.functional.avg_pool2d(i.permute(0, 3, 1, 2).float(), 4).flatten(1)
            for i in (got.images, got.test_images)
        )
        nearest = got.labels[torch.cdist(test, train).argmin(1)]
        return (nearest == got.test_labels).float().mean().item()

    clear, usual, unclear = accuracy(1, 0), accuracy(0.5, 0.1), accuracy(0, 1)
    assert clear > usual > unclear > 0.1
    assert clear > 0.7
    assert unclear < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"easy": 1.5}, r"synthetic_easy must be in \[0, 1\], got 1.5"),
        ({"easy": float("nan")}, r"synthetic_easy must be in \[0, 1\], got nan"),
        ({"hard": -0.1}, r"synthetic_hard must be in \[0, 1\], got -0.1"),
        (
            {"easy": 0.7, "hard": 0.4},
            r"synthetic_easy \+ synthetic_hard must be at most 1, got 0.7 \+ 0.4",
        ),
        ({"num_samples": 0}, "synthetic_samples must be an integer >= 1, got 0"),
        ({"num_samples": 1.5}, "synthetic_samples must be an integer >= 1, got 1.5"),
        ({"num_test": 0}, "synthetic_test must be an integer >= 1, got 0"),
        ({"num_classes": 1}, "synthetic_classes must be an integer >= 2, got 1"),
        ({"num_samples": 10**15}, "synthetic_samples must fit into the memory of cpu, got 1000"),
    ],
)
def test_synthetic_errors(arguments: dict[str, float], message: str) -> None:
    with fails(f"^{message}"):
        make_synthetic(**arguments)  # type: ignore[arg-type]
