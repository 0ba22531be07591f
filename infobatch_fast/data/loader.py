"""Batches of augmented images in the order of a plan, from images that lie on the device.

Dimensions: N samples, K of them in the epoch, B batch, H x W image, C = 3 channels.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from infobatch_fast.data.augment import augmentation, reflect
from infobatch_fast.errors import UserError, reason, unknown_name

if TYPE_CHECKING:
    from infobatch_fast.plan import Batch, Plan

KINDS = ("auto", "dali", "torch")
CHANNELS = 3

Batches = Iterator[tuple[Tensor, Tensor, "Batch"]]


@dataclass(frozen=True)
class Epoch:
    """The batches of one epoch: `len()` of them, from its start at each iteration.

    Yields (images, labels, batch): images (B, C, H, W) float32 in channels_last memory, labels (B,)
    int64, batch the plan's of these samples. The last batch may hold fewer than B.
    """

    _length: int
    _iterate: Callable[[], Batches]

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Batches:
        return self._iterate()


@dataclass(eq=False, repr=False)
class Loader:
    """What all loaders do: check, and cut a plan into batches.

    Attributes:
        images: of N samples, on the device that the batches are made on.
        labels: (N,) int64, on the same device.
        mean: of red, green and blue; images come out as (x / 255 - mean) / std.
        seed: of the augmentation; with the epoch's number its one source of randomness.
        augment: False yields the images themselves, neither cropped at random nor flipped.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    images: InitVar[Any]
    labels: Tensor
    batch_size: int
    _: KW_ONLY
    mean: Sequence[float]
    std: Sequence[float]
    seed: int = 0
    augment: bool = True

    def __post_init__(self, images: Any) -> None:
        self._check(images)
        self._device = images.device

    def _check(self, images: Any) -> None:
        wanted = f"torch.int64 of shape ({len(images)},) on {images.device}"
        if _form(self.labels) != wanted:
            raise ValueError(f"labels must be {wanted}, as images are, got {_form(self.labels)}")
        if not hasattr(self.batch_size, "__index__") or self.batch_size < 1:
            raise ValueError(f"batch_size must be a whole number, from 1, got {self.batch_size}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != CHANNELS or min(values) < 0 or max(values) > 1:
                raise ValueError(f"{name} must be 3 numbers for pixels in [0, 1], got {values}")
        if min(self.std) == 0:
            raise ValueError(f"std must be above 0, got {self.std}")

    def epoch(self, plan: "Plan", start_batch: int = 0) -> Epoch:
        """The batches of `plan` from number start_batch on, which are the same wherever it starts.

        The plan's indices must stay as they are until the last batch is out.

        Raises:
            ValueError: the plan is of another data set.
        """
        if plan.num_samples != len(self.labels):
            raise ValueError(f"plan must be of {len(self.labels)} samples, got {plan.num_samples}")
        first = min(start_batch * self.batch_size, len(plan))
        batches = -(-len(plan) // self.batch_size) - start_batch
        return Epoch(batches, lambda: self._batches(plan, first))

    def _batches(self, plan: "Plan", first: int) -> Batches:
        raise NotImplementedError

    def _spans(self, plan: "Plan", first: int) -> Iterator[tuple[int, int]]:
        """Start and stop of each batch."""
        for start in range(first, len(plan), self.batch_size):
            yield start, min(start + self.batch_size, len(plan))

    def _normalisation(self) -> tuple[Tensor, Tensor]:
        """What is taken off pixels, and what they are then multiplied by: a host sync each."""
        mean, std = (
            torch.tensor([255 * v for v in values], dtype=torch.float32, device=self._device)
            for values in (self.mean, self.std)
        )
        return mean, 1 / std


@dataclass(eq=False, repr=False)
class ResidentLoader(Loader):
    """Of images that lie on the device, (N, H, W, 3) uint8: pads them once.

    Attributes:
        pad: pixels of reflect padding that the random crop moves in.
    """

    pad: int = 4

    def __post_init__(self, images: Tensor) -> None:
        super().__post_init__(images)
        self._size = height, width = images.shape[1], images.shape[2]
        self.pad = self.pad if self.augment else 0
        if self.pad:
            rows = reflect(height, self.pad, images.device)
            columns = reflect(width, self.pad, images.device)
            images = images[:, rows[:, None], columns]
        # With nothing to pad this is the caller's own tensor: a test set is not held twice.
        self._padded = images.contiguous()

    def _check(self, images: Tensor) -> None:
        right = isinstance(images, Tensor) and images.dtype == torch.uint8
        if not right or images.shape[3:] != (CHANNELS,):
            raise ValueError(f"images must be uint8 of shape (N, H, W, 3), got {_form(images)}")
        super()._check(images)
        side = min(images.shape[1:3])
        if not 0 <= self.pad < side:
            raise ValueError(f"pad must be in [0, {side}), got {self.pad}")

    def _crops(self, epoch: int, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`augmentation` at these positions (B,); no crop and no flip where none is wanted."""
        if self.augment:
            return augmentation(self.seed, epoch, positions, self.pad)
        zeros = torch.zeros_like(positions)
        return zeros, zeros, zeros.bool()


def _form(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} of shape {tuple(value.shape)} on {value.device}"


class TorchLoader(ResidentLoader):
    """The loader in plain torch, which neither syncs with the host nor copies the indices to it."""

    def __post_init__(self, images: Tensor) -> None:
        super().__post_init__(images)
        self._normal = self._normalisation()  # here and not in the first epoch

    def _batches(self, plan: "Plan", first: int) -> Batches:
        mean, scale = self._normal
        # A view of every crop there is: one gather takes sample, row and column at once.
        n, line, pixel, channel = self._padded.stride()
        offsets = 2 * self.pad + 1
        windows = self._padded.as_strided(
            (len(self._padded), offsets, offsets, *self._size, CHANNELS),
            (n, line, pixel, line, pixel, channel),
        )
        # All at once: twenty operations an epoch, not a batch.
        positions = plan.positions(self._device)[first:]
        offset_y, offset_x, flip = self._crops(plan.epoch, positions)
        flip = flip.view(-1, 1, 1, 1)
        for start, stop in self._spans(plan, first):
            at = slice(start - first, stop - first)
            indices = plan.indices[start:stop]
            pixels = windows[indices, offset_y[at], offset_x[at]]  # (B, H, W, C) uint8
            if self.augment:
                pixels = torch.where(flip[at], pixels.flip(2), pixels)
            images = torch.sub(pixels, mean).mul_(scale).permute(0, 3, 1, 2)
            yield images, self.labels.index_select(0, indices), plan.batch(start, stop)


def make_loader(
    kind: str, images: Any, labels: Tensor, batch_size: int, **options: Any
) -> tuple[Loader, str | None]:
    """A loader by name, with the arguments of `Loader`: auto is DALI where it works, else torch.

    Args:
        images: (N, H, W, 3) uint8, or a `Source`.

    Returns:
        The loader; and where auto is torch, one line that says why, else None.

    Raises:
        UserError: there is no such kind, or dali was asked for and does not work.
        ValueError: an argument is out of range; the message names it.
    """
    if kind not in KINDS:
        raise UserError(unknown_name("loader", kind, KINDS))
    note, make = None, TorchLoader if isinstance(images, Tensor) else images.loader
    if kind != "torch":
        try:
            if isinstance(images, Tensor):
                from infobatch_fast.data.dali import DaliLoader
            else:
                DaliLoader = images.dali_loader()
            return DaliLoader(images, labels, batch_size, **options), None
        except (ImportError, OSError, RuntimeError) as error:  # not installed, or no fit driver
            if kind == "dali":
                raise UserError(
                    f"loader dali must have a NVIDIA DALI that works, got: {reason(error)}; "
                    'pip install "nvidia-dali-cuda130>=2.4,<2.5", or take --loader torch'
                ) from error
            note = f"WARNING: loader auto is torch, as DALI does not work ({reason(error)})"
    return make(images, labels, batch_size, **options), note
