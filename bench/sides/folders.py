"""Folders of JPEGs: DALI, its twin, and torchvision's ImageFolder in a DataLoader.

A pass is a plan's: read, decode, crop at random, resize, flip, normalise. All take the crops that
ours draws, and are compared before they are timed: labels are equal, and pixels differ by the
rounding of the resizing.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Absent, Side
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import functional as v2

from infobatch_fast.data.dataset import Dataset
from infobatch_fast.data.loader import make_loader
from infobatch_fast.plan import Plan

SIDE = 256  # pixels of the files' images, CIFAR's enlarged
# Levels of 255, at most and in the mean: resizing rounds another way, a card's decoder too.
LIMITS = {"cpu": (16.0, 0.5), "cuda": (64.0, 2.0)}


def write_folder(data: Dataset, count: int, folder: Path) -> Path:
    """So many of the images as JPEG files, all of them in train/ and some of them in val/."""
    for split, number in (("train", count), ("val", 1)):
        for i in range(number):
            path = folder / split / f"{int(data.labels[i]):03}" / f"{i:06}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(data.images[i].numpy())
            image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(path, quality=90)
    return folder


def folder_sides(data: Dataset, plan: Plan, batch_size: int) -> dict[str, Callable[[], Side]]:
    """What makes each side of a pass over a folder's data set."""
    workers = data.images.workers
    many = f"{workers} worker" + "s" * (workers > 1)
    return {
        f"torchvision's ImageFolder and v2, {many}": partial(_peer, data, plan, batch_size),
        f"ours, Pillow in {many}": partial(_ours, "torch", data, plan, batch_size),
        "ours, DALI": partial(_ours, "dali", data, plan, batch_size),
    }


def _loader(kind: str, data: Dataset, batch_size: int) -> Any:
    normal = {"mean": data.mean, "std": data.std}
    return make_loader(kind, data.images, data.labels, batch_size, **normal)[0]


def _ours(kind: str, data: Dataset, plan: Plan, batch_size: int) -> Side:
    loader, counts = _loader(kind, data, batch_size), data.images.counts
    for (images, labels, _), twin in zip(
        loader.epoch(plan), _loader("torch", data, batch_size).epoch(plan), strict=True
    ):
        _compare(data, (images, labels), twin)
    before = counts.read, counts.decoded
    call = partial(_exhaust, lambda: loader.epoch(plan))
    call()
    read, decoded = counts.read - before[0], counts.decoded - before[1]
    return Side(call, images=len(plan), more={"read_bytes": read, "decoded_images": decoded})


def _exhaust(batches: Callable[[], Any]) -> None:
    for _ in batches():
        pass


class _Peer(ImageFolder):
    """By the same picks as the twin's, with torchvision's own reading and transforms."""

    def __init__(self, data: Dataset) -> None:
        super().__init__(str(data.images.tree.folder))
        self.normal = list(data.mean), list(data.std)

    def __getitem__(self, index: Any) -> tuple[Tensor, int]:
        row, (top, left, height, width), flip, side = index
        path, label = self.samples[row]
        image = v2.resized_crop(self.loader(path), top, left, height, width, [side, side])
        pixels = v2.pil_to_tensor(image)
        pixels = v2.horizontal_flip(pixels) if flip else pixels
        return v2.normalize(v2.to_dtype(pixels, torch.float32, scale=True), *self.normal), label


def _peer(data: Dataset, plan: Plan, batch_size: int) -> Side:
    peer, numbers, positions = _Peer(data), plan.indices.cpu(), plan.positions("cpu")
    picks = [
        data.images.picks(some, 0, plan.epoch, at, True)
        for some, at in zip(numbers.split(batch_size), positions.split(batch_size), strict=True)
    ]
    device = plan.indices.device

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in DataLoader(
            peer,
            batch_sampler=picks,
            num_workers=data.images.workers,
            pin_memory=device.type == "cuda",
            multiprocessing_context="fork",
        ):
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    for batch, twin in zip(batches(), _loader("torch", data, batch_size).epoch(plan), strict=True):
        _compare(data, batch, twin)
    return Side(partial(_exhaust, batches), images=len(plan))


def _compare(data: Dataset, batch: tuple[Tensor, Tensor], twin: tuple[Any, ...]) -> None:
    off = (batch[0] - twin[0]).abs() * torch.tensor(data.std, device=batch[0].device).view(3, 1, 1)
    most, mean = 255 * off.max().item(), 255 * off.mean().item()
    limits = LIMITS[batch[0].device.type]
    if not (most <= limits[0] and mean <= limits[1] and torch.equal(batch[1], twin[1])):
        raise Absent(f"output differs: by up to {most:.1f} levels, {mean:.2f} in the mean")
