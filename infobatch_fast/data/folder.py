"""Folders of images as a data set: what an epoch leaves out is neither read nor decoded.

Dimensions: N samples, B batch, S side of what comes out.
"""

import io
import mmap
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from infobatch_fast.data.augment import middle_windows, random_windows
from infobatch_fast.data.dataset import Dataset
from infobatch_fast.data.loader import Loader
from infobatch_fast.data.tree import BadFiles, Tree, read_tree, why_of
from infobatch_fast.data.workers import PICTURE, Source
from infobatch_fast.errors import UserError

if TYPE_CHECKING:
    from infobatch_fast.plan import Batch

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
HELD = 0.25  # of the machine's memory that files may take


def _grey() -> np.ndarray:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (124, 116, 104)).save(file, "PNG")
    return np.frombuffer(file.getvalue(), np.uint8)


GREY, GREY_WINDOW = _grey(), (0, 0, 8, 8)  # in the place of what cannot be decoded


def _shared(number: int) -> np.ndarray:
    """Bytes, all 0, that forked processes share."""
    return np.frombuffer(mmap.mmap(-1, number), np.uint8)


@dataclass
class Counts:
    """What was read from the disk, in bytes, and how many images were decoded."""

    read: int = 0
    decoded: int = 0


class Held:
    """The bytes of files, each from its first reading on; forked processes share them."""

    def __init__(self, sizes: np.ndarray) -> None:
        self.stops = sizes.cumsum()
        self.bytes = _shared(int(self.stops[-1]))
        self.there = _shared(len(sizes))

    def __getitem__(self, row: int) -> np.ndarray:
        return self.bytes[self.stops[row - 1] if row else 0 : self.stops[row]]


@dataclass(frozen=True, eq=False, kw_only=True)
class Files(Source):
    """The images of a tree.

    Attributes:
        test_side: S of testing, in pixels.
        bad: takes up what cannot be decoded.
        lost: (rows of the tree,), not 0 for those that could not be decoded; forks share it.
        held: the files' bytes, if they are kept.
    """

    tree: Tree
    test_side: int
    bad: BadFiles
    lost: np.ndarray
    held: Held | None = None
    counts: Counts = field(default_factory=Counts)

    def dali_loader(self) -> type[Loader]:
        """See `Source`."""
        from infobatch_fast.data.dali_folder import DaliFolderLoader

        return DaliFolderLoader

    def windows(
        self, numbers: Tensor, seed: int, epoch: int, positions: Tensor, augment: bool
    ) -> tuple[Tensor, Tensor]:
        """Of a batch: (B, 4) int64, top, left, height and width in pixels; flips, (B,) bool."""
        rows = self.rows[numbers]
        sides = torch.from_numpy(self.tree.sides[rows.numpy()])
        if augment:
            windows, flips = random_windows(seed, epoch, positions, sides)
        else:
            windows, flips = middle_windows(sides), torch.zeros(len(rows), dtype=torch.bool)
        for i in self._lost(rows):
            windows[i] = torch.tensor(GREY_WINDOW)
        return windows, flips

    def picks(
        self, numbers: Tensor, seed: int, epoch: int, positions: Tensor, augment: bool
    ) -> list[Any]:
        """Row, window, flip and side, each."""
        windows, flips = self.windows(numbers, seed, epoch, positions, augment)
        side = self.sides[0] if augment else self.test_side
        columns = self.rows[numbers].tolist(), windows.tolist(), flips.tolist()
        return [(*pick, side) for pick in zip(*columns, strict=True)]

    def fetch(self, pick: Any) -> tuple[Any, Any]:
        """(S, S, 3) uint8, and bytes read with what went wrong."""
        row, window, flip, side = pick
        content, read, why = self.read(row)
        if not why:
            try:
                return decode(content, window, flip, side), (read, why)
            except Exception as error:  # Pillow raises many kinds
                why = why_of(error)
        return decode(GREY, GREY_WINDOW, flip, side), (read, why)

    def read(self, row: int) -> tuple[np.ndarray, int, str]:
        """A file's bytes, how many came from the disk, and what went wrong, grey then."""
        if self.lost[row]:
            return GREY, 0, ""
        if self.held is not None and self.held.there[row]:
            return self.held[row], 0, ""
        try:
            content = np.fromfile(self.tree.folder / self._name(row), np.uint8)
            if len(content) != self.tree.sizes[row]:
                raise OSError("changed since it was indexed")
        except OSError as error:
            return GREY, 0, why_of(error)
        if self.held is not None:
            self.held[row][:] = content
            self.held.there[row] = 1
        return content, len(content), ""

    def _name(self, row: int) -> str:
        return os.fsdecode(self.tree.names[row])

    def note(self, numbers: Tensor, notes: Sequence[tuple[int, str]]) -> None:
        """Count what was read and decoded, and take up what could not be; see `BadFiles.add`."""
        self.counts.read += sum(read for read, _ in notes)
        self.counts.decoded += len(notes)
        rows = self.rows[numbers].tolist()
        why = {row: why for row, (_, why) in zip(rows, notes, strict=True) if why}
        if why:
            self.lost[list(why)] = 1
            name = self.tree.folder.name
            self.bad.add({f"{name}/{self._name(row)}": each for row, each in why.items()})

    def weighed(self, batch: "Batch", numbers: Tensor) -> "Batch":
        """With weight 0 for what could not be decoded, and came as a grey image."""
        lost = self._lost(self.rows[numbers])
        if not lost:
            return batch
        weights = batch.weights.clone()
        weights[torch.tensor(lost, device=weights.device)] = 0.0
        return batch._replace(weights=weights)

    def _lost(self, rows: Tensor) -> list[int]:
        return self.lost[rows.numpy()].nonzero()[0].tolist()

    def pictures(self, numbers: Tensor) -> Tensor:
        """The middle of each image."""
        windows, _ = self.windows(numbers, 0, 0, numbers, False)
        picks = zip(self.rows[numbers].tolist(), windows.tolist(), strict=True)
        pixels = [self.fetch((row, window, False, PICTURE))[0] for row, window in picks]
        return torch.from_numpy(np.stack(pixels))

    def fingerprint(self) -> bytes:
        """Of names and sizes."""
        rows = self.rows.numpy()
        return self.tree.names[rows].tobytes() + self.tree.sizes[rows].tobytes()


def decode(content: np.ndarray, window: Sequence[int], flip: bool, side: int) -> np.ndarray:
    """By Pillow, as DALI does it: the image's window (top, left, height, width) as (S, S, 3) uint8.

    The EXIF orientation is obeyed first; grey, CMYK, palettes and 16 bits become RGB of 8 bits, and
    transparency is dropped.
    """
    with Image.open(io.BytesIO(content.tobytes())) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        top, left, height, width = window
        image = image.convert("RGB").crop((left, top, left + width, top + height))
    image = image.resize((side, side), Image.Resampling.BILINEAR)  # of enough pixels to be smooth
    return np.array(ImageOps.mirror(image) if flip else image)


def _memory() -> int:
    """Bytes that the machine, or the container, has."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):  # no container, or no limit
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory


def load_folder(
    folder: Path,
    *,
    side: int = 176,
    test_side: int = 224,
    workers: int,
    cache: str = "auto",
    processes: int = 1,
    max_bad_files: int = 0,
    say: Callable[[str], None],
) -> Dataset:
    """Index `folder`, whose train/ and val/ hold a folder of images for each class.

    Args:
        side: pixels of a training image, and test_side of a tested one.
        workers: threads of DALI's, or processes, that decode.
        cache: on, off, or auto, if the files are small enough for all `processes` of this machine.

    Raises:
        UserError: there is no such folder, a class has no image to train on, or too many files
            are bad.
    """
    bad, splits = BadFiles(max_bad_files), []
    trees = [read_tree(folder / split, bad, say) for split in ("train", "val")]
    train, test = trees
    if strange := sorted(set(test.classes) - set(train.classes)):
        raise UserError(f"{test.folder} must hold classes of {train.folder}, got {strange[0]}")
    if bare := sorted(set(range(len(train.classes))) - set(train.labels.tolist())):
        name = train.folder / train.classes[bare[0]]
        raise UserError(f"{name} must hold an image, as its class is trained, got none")
    total = sum(int(tree.sizes.sum()) for tree in trees)
    hold = cache == "on" or (cache == "auto" and processes * total <= HELD * _memory())
    number = torch.tensor([train.classes.index(name) for name in test.classes])
    for tree in trees:
        images = Files(
            rows=torch.arange(len(tree.names)),
            workers=workers,
            tree=tree,
            sides=(side, side),
            test_side=test_side,
            bad=bad,
            lost=_shared(len(tree.names)),
            held=Held(tree.sizes) if hold else None,
        )
        splits += [images, torch.from_numpy(tree.labels)]
    splits[3] = number[splits[3]]
    return Dataset(
        "folder",
        *splits,
        num_classes=len(train.classes),
        mean=MEAN,
        std=STD,
        source="files",
        classes=train.classes,
    )
