"""Pruning on the host, to measure pruning on the device against, and the check of both.

Dimensions: N samples, n well-learned, k of those kept, K kept in all, B batch.
"""

from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data.dataloader import _BaseDataLoaderIter

Indices = NDArray[np.int64]
Floats = NDArray[np.float32]

INSTALL = (
    "the package infobatch is not installed: "
    "pip install git+https://github.com/NUS-HPC-AI-Lab/InfoBatch"
)


class Side(Protocol):
    """One way to prune. What `choose` and `batch` return, no one else looks into."""

    def choose(self) -> Any:
        """Draw an epoch from the scores."""

    def epoch(self, chosen: Any) -> tuple[Indices, Floats]:
        """A drawn epoch on the host: indices (K,) and weights (K,), in order."""
        ...

    def batch(self, chosen: Any, start: int, stop: int) -> Any:
        """What `update` must know of the samples at positions start to stop of an epoch."""

    def update(self, losses: Tensor, batch: Any) -> Tensor:
        """Record the losses (B,) of a batch as scores; returns the loss () to differentiate."""
        ...

    def recorded(self, indices: Indices) -> Floats | None:
        """Scores (B,) of these samples as they are now; None where the side keeps none."""
        ...


class NumpyPruning:
    """InfoBatch (arXiv:2303.04947) with scores and weights in arrays on the host.

    An epoch is an array of indices for a sampler. An update copies the losses to the host, where it
    writes the scores and gathers the weights, and copies these to the device.

    Args:
        scores: (N,), copied.
        ratio: r, the share of the well-learned samples that an epoch leaves out.
        seed: of the choice and the order.
    """

    def __init__(self, scores: Floats, ratio: float, seed: int) -> None:
        self.scores = scores.copy()
        self.weights = np.ones(len(scores), np.float32)
        self.ratio = ratio
        self._random = np.random.default_rng(seed)

    def choose(self) -> Indices:
        """Draw an epoch: indices (K,) in order; `weights` (N,) are renewed."""
        mask = self.scores < self.scores.mean(dtype=np.float64)
        well_learned = np.flatnonzero(mask)
        n = len(well_learned)
        k = max(1, round((1 - self.ratio) * n)) if n else 0
        kept = self._random.choice(well_learned, k, replace=False, shuffle=False)
        self.weights.fill(1)
        self.weights[kept] = n / max(k, 1)
        order = np.concatenate([np.flatnonzero(~mask), kept])
        self._random.shuffle(order)
        return order

    def epoch(self, chosen: Indices) -> tuple[Indices, Floats]:
        """Indices (K,) and weights (K,)."""
        return chosen, self.weights[chosen]

    def batch(self, chosen: Indices, start: int, stop: int) -> Indices:
        """Indices (B,)."""
        return chosen[start:stop]

    def update(self, losses: Tensor, batch: Indices) -> Tensor:
        """Record losses (B,), and return the mean of weight * loss."""
        self.scores[batch] = losses.detach().cpu().numpy()  # on a GPU the host waits here
        weights = torch.from_numpy(self.weights[batch]).to(losses.device)
        return (losses * weights).mean()

    def recorded(self, indices: Indices) -> Floats:
        """Scores (B,)."""
        return self.scores[indices]


class OriginalPackage:
    """The package `infobatch` itself, by its sampler and its `update`.

    Its epoch is a Python list of indices, which its DataLoader needs: the conversion is its own
    cost. It seeds numpy's global generator at each epoch.

    Args:
        scores: (N,).
        ratio: as for `NumpyPruning`.

    Raises:
        ModuleNotFoundError: it is not installed; the message says how to.
    """

    def __init__(self, scores: Floats, ratio: float) -> None:
        package = _import_original()
        self._infobatch = package.InfoBatch(range(len(scores)), 10**9, ratio, 1.0)
        self._infobatch.scores[:] = torch.from_numpy(scores)
        self._sampler = self._infobatch.sampler

    def choose(self) -> Any:
        """Draw an epoch: the sampler, which holds it."""
        return iter(self._sampler)

    def epoch(self, chosen: Any) -> tuple[Indices, Floats]:
        """Indices (K,) and weights (K,)."""
        indices = np.array(chosen[:], np.int64)
        return indices, self._infobatch.weights.numpy()[indices]

    def batch(self, chosen: Any, start: int, stop: int) -> Tensor:
        """Indices (B,) int64 on the host, as its DataLoader collates them."""
        return torch.tensor(chosen[start:stop])

    def update(self, losses: Tensor, batch: Tensor) -> Tensor:
        """Record losses (B,), rescaled in place, and return their mean."""
        self._infobatch.set_active_indices(batch)
        return self._infobatch.update(losses)

    def recorded(self, indices: Indices) -> Floats:
        """Scores (B,)."""
        return self._infobatch.scores.numpy()[indices]


def _import_original() -> Any:
    # Importing it replaces this method of torch's, which nothing here must be measured with.
    ours = _BaseDataLoaderIter.__next__
    try:
        return import_module("infobatch")
    except ModuleNotFoundError as error:
        if error.name != "infobatch":
            raise
        raise ModuleNotFoundError(INSTALL, name=error.name) from None
    finally:
        _BaseDataLoaderIter.__next__ = ours


def other_work(side: Side, scores: Floats, ratio: float, losses: Tensor) -> str | None:
    """Draw an epoch and update with its first batch, and compare with what InfoBatch says.

    Args:
        side: holds these scores; its first B scores of the epoch are other ones afterwards.
        scores: (N,).
        ratio: r; 0 for an epoch that must be full.
        losses: (B,) of the first batch.

    Returns:
        What is not as it must be; None where all is.
    """
    chosen = side.choose()
    indices, weights = side.epoch(chosen)
    problem = _other_epoch(scores, ratio, indices, weights)
    if problem is not None:
        return problem
    b = losses.numel()
    leaf = losses.clone().requires_grad_()
    loss = side.update(leaf.clone(), side.batch(chosen, 0, b))
    loss.backward()
    assert leaf.grad is not None
    values = losses.cpu().numpy()
    if not np.isclose(loss.item(), np.mean(values * weights[:b], dtype=np.float64), rtol=1e-4):
        return "the loss is not the mean of weight * loss"
    if not np.allclose(leaf.grad.cpu().numpy(), weights[:b] / b, rtol=1e-4):
        return "the gradient is not weight / B"
    recorded = side.recorded(indices[:b])
    if recorded is not None and not np.array_equal(recorded, values):
        return "the scores are not the losses"
    return None


def _other_epoch(scores: Floats, ratio: float, indices: Indices, weights: Floats) -> str | None:
    times = np.bincount(indices, minlength=len(scores))
    if len(times) > len(scores) or times.max() > 1:
        return "the epoch has an index that is out of range or occurs twice"
    mean = scores.mean(dtype=np.float64)
    well_learned, kept = scores < mean, times > 0
    # A mean accumulated in float32 may fall on the other side of these.
    unsure = np.abs(scores - mean) <= 1e-6 * abs(mean)
    if not kept[~well_learned & ~unsure].all():
        return "the epoch leaves out a sample that is not well-learned"
    n, k = int(well_learned.sum()), int((kept & well_learned).sum())
    slack = int(unsure.sum()) + 1  # 1: the package rounds down
    if abs(k - (1 - ratio) * n) > slack:
        return f"the epoch keeps {k} of {n} well-learned samples at ratio {ratio}"
    expected = np.where(well_learned[indices], n / max(k, 1), 1.0)
    wrong = np.abs(weights - expected) > expected * (1e-5 + slack / max(k, 1))
    if (wrong & ~unsure[indices]).any():
        return "a weight is not n/k of the well-learned and 1 of the others"
    if _uneven(indices) or _uneven(weights):
        return "the epoch is not shuffled"
    return None


def _uneven(values: NDArray[Any]) -> bool:
    """Whether the first half's mean is six standard errors off, which a shuffle is not."""
    half = len(values) // 2
    off = abs(values[:half].mean(dtype=np.float64) - values.mean(dtype=np.float64)) if half else 0
    return bool(off > 6 * values.std(dtype=np.float64) / max(half, 1) ** 0.5 + 1e-9)
