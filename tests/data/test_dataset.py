"""A share of a data set, and its way to a device."""

from dataclasses import replace

import pytest
import torch

from infobatch_fast.data.synthetic import make_synthetic

SPLITS = (("images", "labels"), ("test_images", "test_labels"))


@pytest.mark.parametrize("fraction", [1e-9, 0.25, 0.999, 1.0])
def test_part_is_the_same_share_of_both_splits(fraction: float) -> None:
    data = make_synthetic(1003, 60, 7, seed=2)
    part = data.part(fraction)
    # Which images: found by their bytes, none twice, in the order that they had.
    for images, labels in SPLITS:
        number = {image.numpy().tobytes(): i for i, image in enumerate(getattr(data, images))}
        taken = [number[image.numpy().tobytes()] for image in getattr(part, images)]
        assert taken == sorted(set(taken))
        assert len(taken) == max(1, round(fraction * len(number)))
        assert torch.equal(getattr(part, labels), getattr(data, labels)[taken])
        assert getattr(part, images).is_contiguous()
    for name in ("name", "source", "num_classes", "mean", "std", "classes"):
        assert getattr(part, name) == getattr(data, name)


def test_part_is_uniform_and_takes_no_seed() -> None:
    data = make_synthetic(5000, 50, seed=1)
    places = replace(data, labels=torch.arange(5000), test_labels=torch.arange(50))
    taken = places.part(0.1).labels
    torch.rand(1)  # draws from the global generator
    assert torch.equal(taken, places.part(0.1).labels)
    # Every tenth of the data set gives about its share: binomially 50 of 500, at most.
    counts = torch.histc(taken.float(), 10, 0, 5000)
    assert (counts - 50).abs().max() < 4 * (500 * 0.1 * 0.9) ** 0.5
    assert set(places.part(0.05).labels.tolist()) < set(taken.tolist())  # a larger share adds to it


def test_to_moves_every_tensor() -> None:
    small = make_synthetic(4, 2).to("meta")
    assert all(getattr(small, name).is_meta for names in SPLITS for name in names)
