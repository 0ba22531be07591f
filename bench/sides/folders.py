"""Folders of JPEGs: DALI, its twin, and torchvision's ImageFolder in a DataLoader.

A pass also decodes and resizes. All take the crops that ours draws, and pixels differ by the
rounding of the resizing.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import Side
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.transforms.v2 import functional as v2

from infobatch_fast.data.dataset import Dataset
from sides.loaders import Batches, Pass, loader_side, ours
from sides.peers import data_loader

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


def folder_sides(of: Pass) -> dict[str, Callable[[], Side]]:
    """What makes each side of a pass over a folder's data set."""
    many = f"{of.workers} worker" + "s" * (of.workers > 1)
    return {
        f"torchvision's ImageFolder and v2, {many}": partial(loader_side, image_folder, of),
        f"ours, Pillow in {many}": partial(_counted, "torch", of),
        "ours, DALI": partial(_counted, "dali", of),
    }


def _counted(kind: str, of: Pass) -> Side:
    """Ours, with what a pass reads and decodes."""
    side, counts = loader_side(partial(ours, kind), of), of.data.images.counts
    before = counts.read, counts.decoded
    side.call()
    read, decoded = counts.read - before[0], counts.decoded - before[1]
    return replace(side, more={"read_bytes": read, "decoded_images": decoded})


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


def image_folder(of: Pass) -> Callable[[], Batches]:
    """ImageFolder in a DataLoader."""
    plan, size = of.plan, of.batch_size
    parts = zip(plan.indices.cpu().split(size), plan.positions("cpu").split(size), strict=True)
    picks = [of.data.images.picks(some, of.seed, plan.epoch, at, True) for some, at in parts]
    return data_loader(_Peer(of.data), picks, of)
