"""Loaders set side by side by `throughput.py`, and the proof that they do the same work.

A side's pass is one epoch of a plan: reflect-pad by 4, random crop, random flip, normalise; float32
images (B, 3, 32, 32) and int64 labels (B,) end on the device. Crops and flips are a function of
(seed, epoch, position) (`augment.augmentation`), so a peer can be handed the very ones that ours
uses: the DataLoader sides get (index, row, column, flip) from their sampler, in place of draws of
their own in the transforms, which would cost them a little more. What is timed is so what was
compared, batch by batch, over a whole pass. A peer that cannot be handed them is compared without
augmentation, and its note says what it does in the timed passes.

Dimensions: N samples, K of them in a pass, B batch.
"""

import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import functional as pil
from torchvision.transforms.v2 import functional as v2

from infobatch_fast.data.augment import augmentation
from infobatch_fast.data.cifar import Dataset
from infobatch_fast.data.loader import Loader, TorchLoader, make_loader
from infobatch_fast.plan import Plan

PAD = 4
# The least that has to move for an image, whoever makes it: its 32 x 32 x 3 uint8 pixels read and
# as many float32 written; its index read, its label read and written (int64). Intermediate copies,
# such as DALI's gather of the padded 40 x 40 image, are a side's own affair.
IMAGE_BYTES = 32 * 32 * 3 * (1 + 4) + 3 * 8
# One process makes too few images a second for more of them to say more.
MOST_WITHOUT_WORKERS = 16_384
# Of normalised float32: the order of the operations may differ by a few roundings.
TOLERANCE = 2e-6
STUCK = 120  # seconds without a batch, after which a worker process is given up

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Setting:
    """What the sides of one comparison have in common.

    Attributes:
        data: on the CPU.
        device: that the batches are delivered on.
        plan: the pass, on the device.
        batch_size: B.
        workers: processes of the sides that have any.
        seed: of the augmentation.
        folder: for the files of peers that read their own format; shared by all comparisons.
    """

    data: Dataset
    device: torch.device
    plan: Plan
    batch_size: int
    workers: int
    seed: int
    folder: Path

    @cached_property
    def reference(self) -> TorchLoader:
        """Our loader in plain torch, which every side is compared with."""
        return self._in_torch(augment=True)

    @cached_property
    def plain_reference(self) -> TorchLoader:
        """The same without augmentation."""
        return self._in_torch(augment=False)

    def _in_torch(self, *, augment: bool) -> TorchLoader:
        data = self.data.to(self.device)
        how: dict[str, Any] = {"mean": data.mean, "std": data.std, "seed": self.seed, "pad": PAD}
        return TorchLoader(data.images, data.labels, self.batch_size, augment=augment, **how)


@dataclass(frozen=True)
class Side:
    """One loader, ready to run.

    Attributes:
        batches: a pass, as timed.
        plan: the samples of a pass, in order.
        plain: a pass in the same order without augmentation, where it cannot be handed ours.
        tolerance: of the normalised values, in the comparison.
        note: what a reader of its figures must know.
        compared: with ours, before it was timed.
    """

    batches: Callable[[], Batches]
    plan: Plan
    plain: Callable[[], Batches] | None = None
    tolerance: float = TOLERANCE
    note: str = ""
    compared: str = "every batch of a pass"


def run(side: Side) -> None:
    """Take a whole pass."""
    for _ in side.batches():
        pass


def compare(side: Side, setting: Setting) -> str | None:
    """Compare every batch of a pass with ours, and so warm the side up.

    Returns:
        How the outputs differ, or None where they are equal: the same pixels of 255 levels, the
        normalised values within the side's tolerance, the same labels, in the same order.
    """
    reference = setting.reference if side.plain is None else setting.plain_reference
    ours = reference.epoch(side.plan)
    theirs = iter((side.plain or side.batches)())
    for number, (images, labels, _) in enumerate(ours):
        batch = next(theirs, None)
        if batch is None:
            return f"output differs: it ends after {number} of {len(ours)} batches"
        if why := _difference(*batch, images, labels, setting.data, side.tolerance):
            return f"output differs: batch {number}: {why}"
    if next(theirs, None) is not None:
        return f"output differs: it goes on after {len(ours)} batches"
    if side.plain is not None:
        run(side)
    return None


def _difference(
    images: Tensor, labels: Tensor, want: Tensor, want_labels: Tensor, data: Dataset, most: float
) -> str | None:
    for name, got, ours in (("images", images, want), ("labels", labels, want_labels)):
        if (got.shape, got.dtype, got.device) != (ours.shape, ours.dtype, ours.device):
            return (
                f"{name} are {got.dtype} {tuple(got.shape)} on {got.device}, "
                f"not {ours.dtype} {tuple(ours.shape)} on {ours.device}"
            )
    mean, std = (torch.tensor(v, device=want.device).view(3, 1, 1) for v in (data.mean, data.std))

    def levels(normalised: Tensor) -> Tensor:
        return ((normalised * std + mean) * 255).round()

    # "not <=" is true of NaN as well.
    if not (worst := (levels(images) - levels(want)).abs().max().item()) <= 0:
        return f"pixels differ by up to {worst:.0f} of 255 levels"
    if not (off := (images - want).abs().max().item()) <= most:
        return f"normalised values differ by up to {off:.1e}, more than {most:.1e}"
    if not torch.equal(labels, want_labels):
        return f"{int((labels != want_labels).sum())} labels differ"
    return None


def ours(setting: Setting, kind: str) -> Side:
    """Our loader: kind is dali or torch.

    Raises:
        UserError: DALI does not work here.
    """
    loader: Loader = setting.reference
    if kind == "dali":
        data = setting.data.to(setting.device)
        how: dict[str, Any] = {"mean": data.mean, "std": data.std, "seed": setting.seed, "pad": PAD}
        loader, _ = make_loader("dali", data.images, data.labels, setting.batch_size, **how)
    epoch = loader.epoch(setting.plan)

    def batches() -> Batches:
        return ((images, labels) for images, labels, _ in epoch)

    if kind == "torch":
        return Side(batches, setting.plan, compared="is what the others are compared with")
    on_cpu = setting.device.type == "cpu"
    note = "2 threads of DALI beside the main one" if on_cpu else ""
    return Side(batches, setting.plan, note=note)


Item = tuple[int, int, int, bool]  # index, row and column of the crop, flip


class _Items:
    """A batch sampler: the plan's samples with the crops and flips that ours gives them."""

    def __init__(self, plan: Plan, batch_size: int, seed: int) -> None:
        self.plan, self.batch_size, self.seed = plan, batch_size, seed

    def __len__(self) -> int:
        return -(-len(self.plan) // self.batch_size)

    def __iter__(self) -> Iterator[list[Item]]:
        crops = augmentation(self.seed, self.plan.epoch, 0, len(self.plan), PAD, "cpu")
        columns = [self.plan.indices.tolist(), *(values.tolist() for values in crops)]
        items = list(zip(*columns, strict=True))
        for start in range(0, len(items), self.batch_size):
            yield items[start : start + self.batch_size]


def augment_v2(pixels: Tensor, item: Item, data: Dataset) -> Tensor:
    """(3, 32, 32) uint8 to float32, by torchvision's v2 kernels for tensors."""
    _, row, column, flip = item
    pixels = v2.crop(v2.pad(pixels, [PAD], padding_mode="reflect"), row, column, *pixels.shape[1:])
    if flip:
        pixels = v2.horizontal_flip(pixels)
    return v2.normalize(
        v2.to_dtype(pixels, torch.float32, scale=True), list(data.mean), list(data.std)
    )


class TensorImages:
    """A map-style dataset of tensors, transformed by torchvision v2."""

    def __init__(self, data: Dataset) -> None:
        self.data = data
        self.images = data.images.permute(0, 3, 1, 2).contiguous()
        self.labels = data.labels.tolist()

    def __getitem__(self, item: Item) -> tuple[Tensor, int]:
        return augment_v2(self.images[item[0]], item, self.data), self.labels[item[0]]


class PilImages:
    """A map-style dataset as torchvision's CIFAR10 is one, with the usual transforms of PIL."""

    def __init__(self, data: Dataset) -> None:
        self.data = data
        self.images = data.images.numpy()
        self.labels = data.labels.tolist()

    def __getitem__(self, item: Item) -> tuple[Tensor, int]:
        index, row, column, flip = item
        image: Any = Image.fromarray(self.images[index])
        image = pil.pad(image, [PAD], padding_mode="reflect")
        image = pil.crop(image, row, column, *self.images.shape[1:3])
        if flip:
            image = pil.hflip(image)
        mean, std = list(self.data.mean), list(self.data.std)
        return pil.normalize(pil.to_tensor(image), mean, std), self.labels[index]


def data_loader(setting: Setting, dataset: Any, workers: int, note: str = "") -> Side:
    """A PyTorch DataLoader over `dataset`, whose worker processes live as long as the side.

    Args:
        setting: of the comparison.
        dataset: indexed by `Item`.
        workers: processes; with 0 a pass is of `MOST_WITHOUT_WORKERS` samples at most.
        note: of the side.
    """
    plan, cuda = setting.plan, setting.device.type == "cuda"
    if workers == 0:
        plan = first(plan, MOST_WITHOUT_WORKERS)
    loader = DataLoader(
        dataset,
        batch_sampler=_Items(plan, setting.batch_size, setting.seed),  # pyright: ignore
        num_workers=workers,
        persistent_workers=workers > 0,
        multiprocessing_context="fork" if workers else None,
        pin_memory=cuda,
        timeout=STUCK if workers else 0,
        worker_init_fn=_leave_signals if workers else None,
    )

    def batches() -> Batches:
        with warnings.catch_warnings():
            # Of forking beside threads: the workers touch neither CUDA nor the threads' locks.
            warnings.filterwarnings("ignore", "This process .* is multi-threaded")
            iterator = iter(loader)
        for images, labels in iterator:
            yield (
                images.to(setting.device, non_blocking=True),
                labels.to(setting.device, non_blocking=True),
            )

    return Side(batches, plan, note=note)


def _leave_signals(worker: int) -> None:
    # A terminal's Ctrl-C goes to every process; the main one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def first(plan: Plan, count: int) -> Plan:
    """The first samples of a plan, as one of its own."""
    return replace(plan, indices=plan.indices[:count], weights=plan.weights[:count])
