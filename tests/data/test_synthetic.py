"""The synthetic images: their form, shares and difficulty, and the seed that decides them."""

import pytest
import torch

from infobatch_fast.data import synthetic
from infobatch_fast.data.synthetic import make_synthetic
from infobatch_fast.errors import UserError


def test_a_function_of_the_seed() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make_synthetic(5000, 300, seed=3)  # more than one chunk
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = make_synthetic(5000, 300, seed=3), make_synthetic(5000, 300, seed=4)
    for name in ("images", "labels", "test_images", "test_labels"):
        assert torch.equal(getattr(first, name), getattr(again, name))
        assert not torch.equal(getattr(first, name), getattr(other, name))
    fewer = make_synthetic(7, 300, seed=3)
    assert torch.equal(first.test_images, fewer.test_images)
    assert torch.equal(first.test_labels, fewer.test_labels)
    assert not torch.equal(first.images[:300], first.test_images)


@pytest.mark.parametrize("counts", [(5003, 61, 4), (1, 1, 2), (1, 1, 1000), (4096, 1, 2)])
def test_counts_and_pixels(counts: tuple[int, int, int]) -> None:
    got = make_synthetic(*counts, seed=-1)
    for images, labels, n in zip(
        (got.images, got.test_images), (got.labels, got.test_labels), counts, strict=False
    ):
        assert images.shape == (n, 32, 32, 3)
        assert images.dtype == torch.uint8
        assert images.is_contiguous()
        of_class = labels.bincount(minlength=counts[2])
        assert len(of_class) == counts[2]
        assert of_class.sum() == n
        assert of_class.max() - of_class.min() <= 1
        assert images[-1].float().std() > 5  # the last one is an image as well
    assert (got.name, got.source, got.num_classes) == ("synthetic", "synthetic", counts[2])


def test_order_and_range_of_pixels() -> None:
    got = make_synthetic(5000, 1, 4)
    # The order is random: the number of equal neighbours is that of independent labels.
    equal = (got.labels[1:] == got.labels[:-1]).float().mean().item()
    assert abs(equal - 0.25) < 4 * (0.25 * 0.75 / 4999) ** 0.5
    pixels = got.images.float() / 255
    assert abs(pixels.mean().item() - 0.5) < 0.05
    assert 0.15 < pixels.std().item() < 0.35
    assert ((got.images == 0) | (got.images == 255)).float().mean().item() < 0.1


def test_shares() -> None:
    images = make_synthetic(2000, 1).images.float()
    # Second differences leave little of the smooth patterns: the noise tells the level.
    rough = (images[:, 2:] - 2 * images[:, 1:-1] + images[:, :-2]).std((1, 2, 3)) / 6**0.5 / 64
    low, middle, high = synthetic._NOISE
    of_easy = (rough < (low + middle) / 2).float().mean().item()
    of_hard = (rough > (middle + high) / 2).float().mean().item()
    for got, share in ((of_easy, 0.5), (of_hard, 0.1)):
        assert abs(got - share) <= 4 * (share * (1 - share) / 2000) ** 0.5 + 0.005


def test_they_can_be_learned_in_part() -> None:
    got = make_synthetic(8000, 200)
    train, test = (
        torch.nn.functional.avg_pool2d(i.permute(0, 3, 1, 2).float(), 4).flatten(1)
        for i in (got.images, got.test_images)
    )
    nearest = got.labels[torch.cdist(test, train).argmin(1)]
    assert 0.3 < (nearest == got.test_labels).float().mean().item() < 0.95


def test_more_than_memory_holds() -> None:
    with pytest.raises(UserError, match=r"^synthetic_samples must fit into .* got 10{15} samples"):
        make_synthetic(10**15)
