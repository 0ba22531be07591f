"""Samples that are fetched one by one, in processes beside the one that trains.

Dimensions: N samples, B batch.
"""

import atexit
import random
import signal
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from infobatch_fast.data.augment import augmentation
from infobatch_fast.data.loader import Batches, Loader
from infobatch_fast.errors import UserError, reason

if TYPE_CHECKING:
    from infobatch_fast.plan import Batch, Plan

PICTURE = 64  # pixels a side of what a run's record shows


class WorkerLoader(Loader):
    """The batches of a `Source`, by a torch DataLoader, whose processes live as long as this.

    An iteration that does not come to its end ends them, and the next one starts others.
    """

    def __post_init__(self, images: "Source") -> None:
        super().__post_init__(images)
        self._images, self._normal = images, self._normalisation()
        self._idle: DataLoader | None = None

    def _batches(self, plan: "Plan", first: int) -> Batches:
        source, spans = self._images, list(self._spans(plan, first))
        positions = plan.positions("cpu")
        numbers = plan.indices.cpu()  # the epoch's one host sync: files are read by the host
        fetched, self._idle = self._new() if self._idle is None else self._idle, None
        asked: Any = fetched.sampler
        asked.batches = (
            source.picks(numbers[a:b], self.seed, plan.epoch, positions[a:b], self.augment)
            for a, b in spans
        )
        try:
            for (start, stop), (pixels, notes) in zip(spans, fetched, strict=True):
                source.note(numbers[start:stop], notes)
                images = pixels.to(self._device, non_blocking=True)
                if images.dtype == torch.uint8:
                    mean, scale = self._normal
                    images = torch.sub(images, mean).mul_(scale).permute(0, 3, 1, 2)
                else:
                    images = images.contiguous(memory_format=torch.channels_last)
                labels = self.labels.index_select(0, plan.indices[start:stop])
                yield images, labels, source.weighed(plan.batch(start, stop), numbers[start:stop])
            self._idle = fetched
        finally:
            if self._idle is not fetched:
                _end(fetched)

    def _new(self) -> DataLoader:
        workers = self._images.workers
        made = DataLoader(
            _Fetched(self._images),
            batch_size=None,  # what is asked for at once is a batch
            sampler=_Asked(),
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=_outlive,
            pin_memory=self._device.type == "cuda",
            generator=torch.Generator(),  # which torch seeds workers from, in place of the user's
            multiprocessing_context="fork" if workers else None,  # what files hold is shared
        )
        if workers:
            # Python would wait for them as it exits, since they outlive its SIGTERM. They start
            # here, as what is registered last is done first, and torch 2.11 has a wait of its own.
            iter(made)
            alive = weakref.ref(made)
            atexit.register(lambda: _end(alive()))
        return made


class _Asked:
    """What is fetched in one iteration: the workers are told all that differs from the last."""

    batches: Iterable[list[Any]] = ()

    def __iter__(self) -> Iterator[list[Any]]:
        return iter(self.batches)


class _Fetched(Dataset):
    def __init__(self, source: "Source") -> None:
        self.source = source

    def __getitem__(self, picks: Any) -> tuple[Tensor, Any]:
        pixels, notes = zip(*map(self.source.fetch, picks), strict=True)
        return torch.stack([*map(torch.as_tensor, pixels)]), notes


def _outlive(worker: int) -> None:
    """End at the second SIGTERM: the first may be to all processes, of which one saves a state."""
    signal.signal(signal.SIGTERM, lambda number, _: signal.signal(number, signal.SIG_DFL))


def _end(fetched: Any) -> None:
    if fetched is not None and fetched._iterator is not None:
        fetched._iterator._shutdown_workers()


@dataclass(frozen=True, eq=False, kw_only=True)
class Source:
    """Images that are not in memory: what a loader and a `Dataset` ask of them.

    Attributes:
        rows: (N,) int64 on the host, which of all those that there are.
        sides: height and width of training images, in pixels.
        device: that batches are made on.
        workers: processes, or threads of DALI's, that fetch.
    """

    rows: Tensor
    sides: tuple[int, int]
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    workers: int = 0

    loader = WorkerLoader

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, numbers: Tensor) -> Any:
        return replace(self, rows=self.rows[numbers.cpu()])

    def to(self, device: torch.device | str) -> Any:
        """The same, for batches on `device`."""
        return replace(self, device=torch.device(device))

    def dali_loader(self) -> type[Loader]:
        """The loader by DALI; ImportError where there is none."""
        raise ImportError("a data set of one's own is read by its own code")

    def picks(
        self, numbers: Tensor, seed: int, epoch: int, positions: Tensor, augment: bool
    ) -> list[Any]:
        """What `fetch` must know of each of a batch, at positions (B,) of the epoch."""
        raise NotImplementedError

    def fetch(self, pick: Any) -> tuple[Any, Any]:
        """One sample, in whichever process: pixels, and what `note` is told of it."""
        raise NotImplementedError

    def note(self, numbers: Tensor, notes: list[Any]) -> None:
        """Take notice of a batch that came."""

    def weighed(self, batch: "Batch", numbers: Tensor) -> "Batch":
        """What goes with a batch, with no weight on what could not be fetched."""
        return batch

    def pictures(self, numbers: Tensor) -> Tensor:
        """(P, PICTURE, PICTURE, 3) uint8, for the record."""
        raise NotImplementedError

    def fingerprint(self) -> bytes:
        """What tells these images from others."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, kw_only=True)
class Mapped(Source):
    """A map-style data set of the user's, of images (3, H, W) and labels.

    What its transforms draw, from torch's, numpy's or Python's generator, is a function of (seed,
    epoch, position).

    Attributes:
        name: of what made it.
    """

    dataset: Any
    name: str

    def picks(
        self, numbers: Tensor, seed: int, epoch: int, positions: Tensor, augment: bool
    ) -> list[Any]:
        """Sample and seed, each."""
        high, low, bit = augmentation(seed, epoch, positions, 1 << 14)
        seeds = high << 16 | low << 1 | bit
        return list(zip(self.rows[numbers].tolist(), seeds.tolist(), strict=True))

    def fetch(self, pick: Any) -> tuple[Any, Any]:
        """A sample's image, float32, and what went wrong."""
        row, seed = pick
        if get_worker_info() is not None:  # else the generators are the user's
            for generator in (torch.manual_seed, np.random.seed, random.seed):
                generator(seed)
        shape = (3, *self.sides)
        try:
            image = torch.as_tensor(self.dataset[row][0], dtype=torch.float32)
        except Exception as error:  # of the user's code
            return torch.zeros(shape), f"sample {row}: {type(error).__name__}: {reason(error)}"
        if image.shape != shape:
            return torch.zeros(shape), f"sample {row}: an image of shape {tuple(image.shape)}"
        return image, ""

    def note(self, numbers: Tensor, notes: list[Any]) -> None:
        """UserError if a sample could not be had."""
        if failed := [note for note in notes if note]:
            shape = (3, *self.sides)
            raise UserError(f"dataset {self.name} must give images of {shape}, got {failed[0]}")

    def pictures(self, numbers: Tensor) -> Tensor:
        """From black to white, whatever the normalisation."""
        images = torch.stack([self.fetch((row, 0))[0] for row in self.rows[numbers].tolist()])
        low, high = images.amin((1, 2, 3), True), images.amax((1, 2, 3), True)
        images = 255 * (images - low) / (high - low).clamp(min=1e-6)
        return F.interpolate(images, (PICTURE, PICTURE)).byte().permute(0, 2, 3, 1)

    def fingerprint(self) -> bytes:
        """Of the samples' numbers: the images would all have to be made."""
        return self.rows.numpy().tobytes()
