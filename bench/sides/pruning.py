"""Ways to prune an epoch, each shown to do what InfoBatch does before it is timed.

- device: ours. `choose` gives the epoch's order and weights as tensors on the device; it holds the
  epoch's one host sync. `update` is the rescaled mean, its backward pass, and the record.
- numpy: the way of the original package, on the host. `choose` gives an array for a sampler there;
  a copy on the device would come on top. `update` copies losses to the host and weights back.
- none: no pruning. `choose` shuffles all N on the device, `update` is the plain mean.

Dimensions: N samples, n well-learned, k of those kept, K kept in all, B batch.
"""

import itertools
from typing import Any

import numpy as np
import torch
from harness import Side, require
from numpy.typing import NDArray
from torch import Tensor

from infobatch_fast import InfoBatch
from infobatch_fast.kernels import reference
from infobatch_fast.plan import Batch, Plan
from infobatch_fast.telemetry.syncs import host_syncs

Indices = NDArray[np.int64]
Floats = NDArray[np.float32]
SIDES = ("device", "numpy", "none")
RATIO = 0.5  # r that is measured
TURNS = 64  # batches that updates take in turn


class OnDevice:
    """InfoBatch as it is used in training.

    Every way to prune has its methods; what `choose` and `batch` return, no one else looks into.
    """

    def __init__(self, scores: Floats, ratio: float, seed: int, device: torch.device) -> None:
        self.infobatch = InfoBatch(len(scores), 1, ratio, 1.0, seed, device)
        self.infobatch.scores.copy_(torch.from_numpy(scores))

    def choose(self) -> Plan:
        """Draw an epoch from the scores."""
        return self.infobatch.sample(0)

    def epoch(self, chosen: Plan) -> tuple[Indices, Floats]:
        """A drawn epoch on the host: indices (K,) and weights (K,), in order."""
        return chosen.indices.cpu().numpy(), chosen.weights.cpu().numpy()

    def batch(self, chosen: Plan, start: int, stop: int) -> Batch:
        """What `update` must know of the samples at positions start to stop of an epoch."""
        return chosen.batch(start, stop)

    def update(self, losses: Tensor, batch: Batch) -> Tensor:
        """Record losses (B,), and return the mean of weight * loss."""
        self.infobatch.record(losses, batch)
        return reference.rescaled_mean(losses, batch.weights)

    def recorded(self, indices: Indices) -> Floats | None:
        """Scores (B,) of these samples as they are now; None where none are kept."""
        return self.infobatch.scores.cpu().numpy()[indices]


class FullData(OnDevice):
    """Training without pruning."""

    def __init__(self, samples: int, seed: int, device: torch.device) -> None:
        self.infobatch = InfoBatch(samples, 1, delta=0.0, seed=seed, device=device)

    def update(self, losses: Tensor, batch: Batch) -> Tensor:
        """The plain mean."""
        return losses.mean()

    def recorded(self, indices: Indices) -> None:
        """No scores."""


class NumpyPruning:
    """InfoBatch (arXiv:2303.04947) with scores and weights in arrays on the host."""

    def __init__(self, scores: Floats, ratio: float, seed: int) -> None:
        self.scores = scores.copy()
        self.weights = np.ones(len(scores), np.float32)
        self.ratio = ratio
        self._random = np.random.default_rng(seed)

    def choose(self) -> Indices:
        """Indices (K,) in order; `weights` (N,) are renewed."""
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
        """As they are."""
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
        """As they are."""
        return self.scores[indices]


Pruner = OnDevice | NumpyPruning


def draw_scores(samples: int, seed: int) -> Floats:
    """Scores (N,) as losses lie in the middle of a training: log-normal, 69% below their mean."""
    random = torch.Generator().manual_seed(seed)
    return torch.empty(samples).log_normal_(-1.0, 1.0, generator=random).numpy()


def make_pruner(name: str, scores: Floats, ratio: float, seed: int, device: torch.device) -> Pruner:
    """One of `SIDES` that holds these scores."""
    if name == "none":
        return FullData(len(scores), seed, device)
    if name == "numpy":
        return NumpyPruning(scores, ratio, seed)
    return OnDevice(scores, ratio, seed, device)


def choose_side(pruner: Pruner, name: str, device: torch.device) -> Side:
    """Draws an epoch."""
    more = {}
    # On a CPU a copy "to the host" is none, so that those of numpy's way would not be seen.
    if device.type == "cuda" or name != "numpy":
        pruner.choose()
        with host_syncs(device, "count") as seen:
            pruner.choose()
        more["host_syncs"] = seen.count
    return Side(pruner.choose, more=more)


def update_side(pruner: Any, losses: Tensor) -> Side:
    """Updates with the next batch of an epoch, of these losses (B,), backward included."""
    chosen, b = pruner.choose(), losses.numel()
    count = max(1, min(TURNS, len(pruner.epoch(chosen)[0]) // b))
    batches = itertools.cycle([pruner.batch(chosen, i * b, (i + 1) * b) for i in range(count)])
    leaf = losses.clone().requires_grad_()

    def call() -> None:
        leaf.grad = None
        pruner.update(leaf, next(batches)).backward()

    return Side(call)


def check(pruner: Any, scores: Floats, ratio: float, losses: Tensor) -> None:
    """Draw an epoch and update with its first batch: raise Absent unless it is InfoBatch's work.

    Args:
        pruner: holds these scores; those of its first batch are other ones afterwards.
        scores: (N,).
        ratio: 0 for an epoch that must be full.
        losses: (B,) of the first batch.
    """
    chosen = pruner.choose()
    indices, weights = pruner.epoch(chosen)
    well_learned = torch.from_numpy(scores < scores.mean(dtype=np.float64))
    n = int(well_learned.sum())
    epoch = torch.from_numpy(indices), torch.from_numpy(weights)
    check_epoch(well_learned, n, round((1 - ratio) * n), *epoch)
    b, values = losses.numel(), losses.cpu().numpy()
    leaf = losses.clone().requires_grad_()
    loss = pruner.update(leaf, pruner.batch(chosen, 0, b))
    loss.backward()
    assert leaf.grad is not None
    mean = np.mean(values * weights[:b], dtype=np.float64)
    require(np.isclose(loss.item(), mean, rtol=1e-4), "the loss is not the mean of weight * loss")
    same = np.allclose(leaf.grad.cpu().numpy(), weights[:b] / b, rtol=1e-4)
    require(same, "the gradient is not weight / B")
    recorded = pruner.recorded(indices[:b])
    require(recorded is None or np.array_equal(recorded, values), "the scores are not the losses")


def check_epoch(prunable: Tensor, n: int, k: int, indices: Tensor, weights: Tensor) -> None:
    """Each other sample, k of the n prunable ones, none twice, with their weights, shuffled."""
    kept = prunable.numel() - n + k
    require(indices.shape == weights.shape == (kept,), f"it keeps other than {kept} samples")
    seen = torch.zeros_like(prunable)
    seen[indices] = True
    require(seen.sum() == kept, "a sample twice")
    require((seen & prunable).sum() == k, f"it keeps other than {k} of the prunable samples")
    wanted = torch.where(prunable[indices], n / k, 1.0).to(weights.dtype)
    require(torch.equal(weights, wanted), "a weight is not n/k or 1")
    check_even(indices)
    check_even(weights)


def check_even(values: Tensor) -> None:
    """The first half's mean is within six standard errors: else it is not shuffled."""
    half = values.numel() // 2
    off = values[:half].mean(dtype=torch.float64) - values.mean(dtype=torch.float64)
    require(off.abs() <= 6 * values.double().std() / half**0.5 + 1e-9, "it is not shuffled")
