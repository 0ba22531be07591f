"""An epoch's plan, what of it travels with a batch, and the losses that come back for one.

Dimensions: N samples, n prunable, K kept in all, B batch, T loss terms a sample.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Fields(NamedTuple):
    indices: Tensor
    weights: Tensor


class Batch(_Fields):
    """What `InfoBatch.update` must know of a batch: it travels with the batch's images.

    Attributes:
        indices: (B,) int64, the samples' numbers in the data set.
        weights: (B,) float32, the samples' loss weights.
    """

    __slots__ = ()

    def __new__(cls, indices: Any, weights: Any = None) -> "Batch":
        """Of both, or of one pair: fastai and Composer make it anew as they would a list."""
        return super().__new__(cls, *(indices if weights is None else (indices, weights)))

    def __reduce__(self) -> Any:
        if self.indices.is_cuda:
            return Batch, (*self,)
        # By value: in a DataLoader's worker a tensor becomes a file of shared memory.
        return _of_arrays, (self.indices.numpy(), self.weights.numpy())

    def __repr__(self) -> str:
        return f"Batch(of {self.indices.numel()} samples, on {self.indices.device})"


def _of_arrays(*arrays: Any) -> Batch:
    return Batch(*map(torch.from_numpy, arrays))


@dataclass(frozen=True)
class Plan:
    """One epoch: which samples, in which order, with which weights; `len(plan)` is K.

    Attributes:
        epoch: the epoch it was drawn for, from 0.
        num_samples: N.
        num_prunable: n, the samples that the policy allowed to be left out; 0 in a full epoch.
        indices: (K,) int64.
        weights: (K,) float32.
        ratio: the share of the prunable samples to be left out, before rounding to whole samples
            and batches.
    """

    epoch: int
    num_samples: int
    num_prunable: int
    indices: Tensor
    weights: Tensor
    ratio: float = 0.0

    @property
    def expected_saving(self) -> float:
        """The share of all samples to be left out: ratio n / N."""
        return self.ratio * self.num_prunable / self.num_samples

    def __len__(self) -> int:
        return self.indices.numel()

    def positions(self, device: torch.device | str) -> Tensor:
        """(K,) int64: the samples' places in the epoch, made on a device."""
        return torch.arange(len(self), device=device)

    def batch(self, start: int, stop: int) -> Batch:
        """The samples at positions start to stop of the epoch, as views."""
        return Batch(self.indices[start:stop], self.weights[start:stop])

    def batches(self, batch_size: int) -> Iterator[Batch]:
        """The epoch in batches of B, the last one partial: to go beside a loader of one's own.

        Raises:
            ValueError: batch_size is below 1.
        """
        check_count("batch_size", batch_size)
        for start in range(0, len(self), batch_size):
            yield self.batch(start, start + batch_size)


def batch_of(given: Any) -> Batch:
    """A `Batch`, also one that came back as a plain pair from what moves or splits containers.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(given, Batch):
        pair = isinstance(given, (tuple, list)) and [getattr(each, "dtype", 0) for each in given]
        if pair != [torch.int64, torch.float32] or any(each.dim() != 1 for each in given):
            kind = type(given).__name__
            raise TypeError(f"batch must be the Batch that came with the samples, got {kind}")
        given = Batch(*given)
    return given


def per_sample(
    losses: Tensor, batch_size: int, mask: Tensor | None = None, name: str = "losses"
) -> Tensor:
    """Losses of any accepted shape and dtype as (B,) float32 (float64 stays), differentiably.

    Args:
        losses: (B,), (B, 1) or (B, T).
        batch_size: B.
        mask: (B, T), what counts of each sample's T losses (real tokens); None is all.
    """
    kind: Any = losses.dtype if isinstance(losses, Tensor) else type(losses).__name__
    if isinstance(kind, str) or not kind.is_floating_point:
        raise TypeError(f"{name} must be a floating tensor, got {kind}")
    if batch_size == 1 and losses.dim() == 0:
        losses = losses.view(1)
    shape = losses.shape
    if not shape or shape[0] != batch_size or 0 in shape[1:]:
        raise ValueError(
            f"{name} must hold one value per sample of the batch of {batch_size} "
            f'(reduction="none"), got shape {tuple(shape)}'
        )
    if kind != torch.float32 and kind != torch.float64:
        losses = losses.float()
    if mask is not None:
        mask = torch.as_tensor(mask)
        if mask.shape != shape:
            shapes = f"{tuple(shape)}, got {tuple(mask.shape)}"
            raise ValueError(f"mask must have the shape of the losses, {shapes}")
        losses, mask = (each.reshape(batch_size, -1) for each in (losses, mask.to(losses)))
        # What is masked may be anything, NaN too.
        summed = losses.masked_fill(mask == 0, 0.0).mul(mask).sum(1)
        return summed / mask.sum(1).clamp(min=1)
    return losses if len(shape) == 1 else losses.flatten(1).mean(1)


def check_count(name: str, value: int) -> None:
    """Raise ValueError unless value is a whole number of at least 1."""
    if isinstance(value, bool) or not hasattr(value, "__index__") or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value}")
