"""A share of a data set, and its way to a device."""

from dataclasses import replace

import pytest
import torch

from infobatch_fast.data.synthetic import make_synthetic

SPLITS = (("images", "labels"), ("test_images", "test_labels"))


@pytest.mark.parametrize("fraction", [1e-9, 0.25, 0.999, 1.0])
def test_part_is_a_share_of_the_training_images(fraction: float) -> None:
    data = make_synthetic(1003, 60, 7, seed=2)
    part = data.part(fraction)
    taken = numbers(part.images, data.images)
    assert len(taken) == max(1, round(fraction * 1003))
    assert torch.equal(part.labels, data.labels[taken])
    assert part.images.is_contiguous()
    for name in ("name", "source", "num_classes", "mean", "std", "classes", "test_images"):
        assert getattr(part, name) is getattr(data, name)


def numbers(some: torch.Tensor, images: torch.Tensor) -> list[int]:
    """Which images, found by their bytes: none twice, in the order that they had."""
    number = {image.numpy().tobytes(): i for i, image in enumerate(images)}
    taken = [number[image.numpy().tobytes()] for image in some]
    assert taken == sorted(set(taken))
    return taken


def test_validation_images_are_training_images_held_out() -> None:
    data = make_synthetic(500, 60, 7, seed=2)
    split = data.with_validation(120)
    kept, held = numbers(split.images, data.images), numbers(split.test_images, data.images)
    assert len(held) == 120
    assert sorted(kept + held) == list(range(500))
    assert torch.equal(split.labels, data.labels[kept])
    assert torch.equal(split.test_labels, data.labels[held])
    assert data.with_validation(0) is data


def test_label_noise_is_another_class_for_that_share() -> None:
    data = make_synthetic(5000, 10, 4, seed=2)
    noisy = data.with_label_noise(0.2, seed=1)
    wrong = noisy.labels != data.labels
    assert wrong.sum() == 1000
    # Each of the three others as often: binomially 333, four deviations of 15.
    moved = torch.bincount((noisy.labels - data.labels)[wrong] % 4, minlength=4)
    assert moved[0] == 0
    assert (moved[1:] - 1000 / 3).abs().max() < 60
    assert torch.equal(noisy.labels, data.with_label_noise(0.2, seed=1).labels)
    assert not torch.equal(noisy.labels, data.with_label_noise(0.2, seed=2).labels)
    assert noisy.test_labels is data.test_labels
    assert noisy.fingerprint() != data.fingerprint()
    assert data.fingerprint() == make_synthetic(5000, 10, 4, seed=2).fingerprint()
    assert data.fingerprint() != replace(data, images=data.images.flip(0)).fingerprint()


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
