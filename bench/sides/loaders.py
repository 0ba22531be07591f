"""Loaders side by side, each shown to give what ours gives before it is timed.

A pass is one epoch of a plan: reflect-pad by 4, random crop, random flip, normalise; float32 images
(B, 3, 32, 32) and int64 labels (B,) end on the device. Crops and flips are a function of (seed,
epoch, position), so a peer is handed the very ones that ours uses, and what is timed is what was
compared, batch by batch, over a whole pass.

Dimensions: N samples, K of them in a pass, B batch.
"""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from harness import Absent, Side
from torch import Tensor

from infobatch_fast.data.dataset import Dataset
from infobatch_fast.data.loader import Loader, make_loader
from infobatch_fast.plan import Plan

PAD = 4
# Moved for an image, whoever makes it: its 32 x 32 x 3 uint8 pixels read and as many float32
# written; its index read, its label read and written (int64). Copies between are a side's own.
IMAGE_BYTES = 32 * 32 * 3 * (1 + 4) + 3 * 8
TOLERANCE = 2e-6  # of normalised float32: the order of the operations may differ

Batches = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Pass:
    """What the loaders of one comparison have in common.

    Attributes:
        data: on the CPU.
        plan: the pass, on the device.
        batch_size: B.
        workers: processes of the loaders that have any.
        seed: of the augmentation.
    """

    data: Dataset
    plan: Plan
    batch_size: int
    workers: int
    seed: int

    @property
    def device(self) -> torch.device:
        """That the batches are delivered on."""
        return self.plan.indices.device

    @cached_property
    def reference(self) -> Loader:
        """Our loader in plain torch, which every side is compared with."""
        return self.make("torch")

    def make(self, kind: str) -> Loader:
        """One of our loaders; raises UserError where DALI does not work."""
        data = self.data.to(self.device)
        options = {"mean": data.mean, "std": data.std, "seed": self.seed, "pad": PAD}
        return make_loader(kind, data.images, data.labels, self.batch_size, **options)[0]


def ours(kind: str, of: Pass) -> Callable[[], Batches]:
    """A pass of our loader: dali or torch."""
    epoch = (of.make("dali") if kind == "dali" else of.reference).epoch(of.plan)
    return lambda: ((images, labels) for images, labels, _ in epoch)


def loader_side(make: Callable[[Pass], Callable[[], Batches]], of: Pass) -> Side:
    """A whole pass of a loader, once compared with ours.

    Raises:
        Absent: its output differs.
    """
    batches = make(of)
    compare(batches(), of)

    def run() -> None:
        for _ in batches():
            pass

    images = len(of.plan)
    return Side(run, images=images, moved=images * IMAGE_BYTES)


def compare(theirs: Batches, of: Pass) -> None:
    """Raise Absent unless every batch has our labels and, undone to 255 levels, our pixels."""
    data = of.data
    mean, std = (torch.tensor(v, device=of.device).view(3, 1, 1) for v in (data.mean, data.std))
    batches = itertools.zip_longest(of.reference.epoch(of.plan), theirs)
    for number, (want, got) in enumerate(batches):
        if want is None or got is None:
            raise Absent(f"output differs: it ends {'after' if want is None else 'before'} ours")
        (images, labels), (ours, our_labels, _) = got, want
        problem = None
        for a, b in ((images, ours), (labels, our_labels)):
            if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
                problem = f"{a.dtype} {tuple(a.shape)} on {a.device}"
        if problem is None:
            levels = [((x * std + mean) * 255).round() for x in (images, ours)]
            # "not <=" is true of NaN as well.
            if not (off := (levels[0] - levels[1]).abs().max().item()) <= 0:
                problem = f"pixels differ by up to {off:.0f} of 255 levels"
            elif not (off := (images - ours).abs().max().item()) <= TOLERANCE:
                problem = f"normalised values differ by up to {off:.1e}"
            elif not torch.equal(labels, our_labels):
                problem = "labels differ"
        if problem is not None:
            raise Absent(f"output differs: batch {number}: {problem}")
