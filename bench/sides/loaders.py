"""Loaders side by side, each shown to give what ours gives before it is timed.

A pass is one epoch of a plan: read, crop at random, flip, normalise; float32 images (B, 3, H, W)
and int64 labels (B,) end on the device. Crops and flips are a function of (seed, epoch, position),
so a peer is handed the very ones that ours uses, and what is timed is what was compared, batch by
batch, over a whole pass.

Dimensions: N samples, K of them in a pass, B batch.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from harness import Side, require
from torch import Tensor

from infobatch_fast.data.dataset import Dataset
from infobatch_fast.data.loader import Loader, make_loader
from infobatch_fast.plan import Plan

# Moved for an image, whoever makes it: its 32 x 32 x 3 uint8 pixels read and as many float32
# written; its index read, its label read and written (int64). Copies between are a side's own.
IMAGE_BYTES = 32 * 32 * 3 * (1 + 4) + 3 * 8

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Pass:
    """What the loaders of one comparison have in common.

    Attributes:
        data: on the CPU, or of files.
        plan: the pass, on the device.
        batch_size: B.
        workers: processes of the loaders that have any.
        seed: of the augmentation.
        limits: levels of 255 by which pixels may differ, at most and in the mean: here the order
            of the operations may differ, and no more.
        image_bytes: moved for an image; 0 is not counted.
    """

    data: Dataset
    plan: Plan
    batch_size: int
    workers: int
    seed: int
    limits: tuple[float, float] = (2e-4, 2e-4)
    image_bytes: int = IMAGE_BYTES

    @property
    def device(self) -> torch.device:
        """That the batches are delivered on."""
        return self.plan.indices.device

    @cached_property
    def reference(self) -> Loader:
        """Our loader without DALI, which every side is compared with."""
        return self.make("torch")

    def make(self, kind: str) -> Loader:
        """One of our loaders; raises UserError where DALI does not work."""
        data = self.data.to(self.device)
        options = {"mean": data.mean, "std": data.std, "seed": self.seed}
        return make_loader(kind, data.images, data.labels, self.batch_size, **options)[0]


def first(plan: Plan, count: int) -> Plan:
    """The first samples of a plan, as an epoch of their own."""
    return replace(plan, indices=plan.indices[:count], weights=plan.weights[:count])


def ours(kind: str, of: Pass) -> Callable[[], Batches]:
    """A pass of our loader: dali or torch."""
    epoch = of.make(kind).epoch(of.plan)
    return lambda: ((images, labels) for images, labels, _ in epoch)


def loader_side(make: Callable[[Pass], Callable[[], Batches]], of: Pass) -> Side:
    """A whole pass of a loader, once compared with ours."""
    batches = make(of)
    compare(batches(), of)

    def run() -> None:
        for _ in batches():
            pass

    images = len(of.plan)
    return Side(run, images=images, moved=images * of.image_bytes)


def compare(theirs: Batches, of: Pass) -> None:
    """Raise Absent unless every batch has our labels and, within the limits, our pixels."""
    std = torch.tensor(of.data.std, device=of.device).view(3, 1, 1)
    batches = zip(theirs, of.reference.epoch(of.plan), strict=True)
    for number, ((images, labels), (our_images, our_labels, _)) in enumerate(batches):
        for a, b in ((images, our_images), (labels, our_labels)):
            form = f"{a.dtype} {tuple(a.shape)} on {a.device}"
            same = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
            require(same, f"batch {number} is {form}")
        off = 255 * ((images - our_images) * std).abs()
        most, mean = off.max().item(), off.mean().item()
        within = most <= of.limits[0] and mean <= of.limits[1]  # false of NaN
        told = f"pixels of batch {number} differ by up to {most:.2g} levels, {mean:.2g} in the mean"
        require(within, told)
        require(torch.equal(labels, our_labels), f"labels of batch {number} differ")
