"""Other ways to load CIFAR: transforms in a DataLoader, and a whole epoch at once."""

import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import functional as pil
from torchvision.transforms.v2 import functional as v2

from infobatch_fast.data.augment import augmentation, reflect
from infobatch_fast.data.dataset import Dataset
from infobatch_fast.data.loader import TorchLoader
from sides.loaders import Batches, Pass, ours

PAD = TorchLoader.pad  # pixels
STUCK = 120  # seconds without a batch, after which a worker process is given up
Item = tuple[int, int, int, bool]  # index, row and column of the crop, flip


def loader_sides(workers: int) -> dict[str, Callable[[Pass], Callable[[], Batches]]]:
    """What makes each loader, by its name; those that fork processes before DALI's threads are."""
    many = f"DataLoader, {workers} worker" + "s" * (workers > 1)
    return {
        f"torchvision v2, {many}": partial(cropped, TensorImages),
        f"PIL, {many}": partial(cropped, PilImages),
        "whole epoch at once": whole_epoch,
        "ours, torch": partial(ours, "torch"),
        "ours, DALI": partial(ours, "dali"),
    }


def whole_epoch(of: Pass) -> Callable[[], Batches]:
    """The way of cifar10-airbench: all images of the epoch are augmented before its first batch."""
    data, device = of.data.to(of.device), of.device
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (data.mean, data.std))
    size = data.images.shape[1]
    lines = reflect(size, PAD, device)
    # In float16, as there; the whole levels are exact in it, and normalised by the batch.
    padded = data.images.permute(0, 3, 1, 2)[:, :, lines][:, :, :, lines].half()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        indices = of.plan.indices
        rows, columns, flips = augmentation(
            of.seed, of.plan.epoch, torch.arange(len(of.plan), device=device), PAD
        )
        images = torch.empty(len(of.plan), 3, size, size, dtype=torch.half, device=device)
        for row in range(2 * PAD + 1):  # an image is cut with all others of its offset
            for column in range(2 * PAD + 1):
                at = ((rows == row) & (columns == column)).nonzero().view(-1)
                crop = padded[indices[at], :, row : row + size, column : column + size]
                images[at] = crop
        images = torch.where(flips.view(-1, 1, 1, 1), images.flip(3), images)
        labels = data.labels[indices]
        for start in range(0, len(of.plan), of.batch_size):
            part = slice(start, start + of.batch_size)
            yield images[part].float().div_(255).sub_(mean).div_(std), labels[part]

    return batches


class TensorImages:
    """A map-style dataset of tensors, transformed by torchvision v2."""

    def __init__(self, data: Dataset) -> None:
        self.data, self.labels = data, data.labels.tolist()
        self.images = data.images.permute(0, 3, 1, 2).contiguous()

    def __getitem__(self, item: Item) -> tuple[Tensor, int]:
        index, row, column, flip = item
        pixels = v2.pad(self.images[index], [PAD], padding_mode="reflect")
        pixels = v2.crop(pixels, row, column, *self.images.shape[2:])
        pixels = v2.horizontal_flip(pixels) if flip else pixels
        pixels = v2.to_dtype(pixels, torch.float32, scale=True)
        return v2.normalize(pixels, list(self.data.mean), list(self.data.std)), self.labels[index]


class PilImages:
    """A map-style dataset as torchvision's CIFAR10 is one, with the usual transforms of PIL."""

    def __init__(self, data: Dataset) -> None:
        self.data, self.labels = data, data.labels.tolist()
        self.images = data.images.numpy()

    def __getitem__(self, item: Item) -> tuple[Tensor, int]:
        index, row, column, flip = item
        image: Any = Image.fromarray(self.images[index])
        image = pil.pad(image, [PAD], padding_mode="reflect")
        image = pil.crop(image, row, column, *self.images.shape[1:3])
        image = pil.hflip(image) if flip else image
        return pil.normalize(
            pil.to_tensor(image), list(self.data.mean), list(self.data.std)
        ), self.labels[index]


def cropped(kind: Callable[[Dataset], Any], of: Pass) -> Callable[[], Batches]:
    """A data set in a DataLoader: the plan's samples with the crops and flips of ours."""
    crops = augmentation(of.seed, of.plan.epoch, torch.arange(len(of.plan)), PAD)
    columns = [of.plan.indices.tolist(), *(values.tolist() for values in crops)]
    items = list(zip(*columns, strict=True))
    starts = range(0, len(items), of.batch_size)
    return data_loader(kind(of.data), [items[i : i + of.batch_size] for i in starts], of)


def data_loader(dataset: Any, batches: Sequence[Sequence[Any]], of: Pass) -> Callable[[], Batches]:
    """A PyTorch DataLoader of these items, whose worker processes live as long as the side."""
    loader = DataLoader(
        dataset,
        batch_sampler=batches,  # pyright: ignore
        num_workers=of.workers,
        persistent_workers=True,
        multiprocessing_context="fork",
        pin_memory=of.device.type == "cuda",
        timeout=STUCK,
        worker_init_fn=_leave_signals,
    )

    def one_pass() -> Iterator[tuple[Tensor, Tensor]]:
        with warnings.catch_warnings():
            # Of forking beside threads: the workers touch neither CUDA nor the threads' locks.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded")
            iterator = iter(loader)
        for images, labels in iterator:
            yield (
                images.to(of.device, non_blocking=True),
                labels.to(of.device, non_blocking=True),
            )

    return one_pass


def _leave_signals(worker: int) -> None:
    # A terminal's Ctrl-C goes to every process; the main one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
