"""Where an epoch's time goes, measured without making the host wait; and how scores lie."""

import math
import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

ItemT = TypeVar("ItemT")

OTHER = "other"
# Of the trainer, in the order of an epoch: "step" is without the update within it, "merge" brings
# the scores of several processes together, and "other" is what is in none of them.
PHASES = ("choose", "wait", "step", "update", "merge", "startup", "evaluation", "checkpoint", OTHER)
PRUNING = ("choose", "update", "merge")  # what pruning adds


class Phases:
    """Where the time goes: each moment belongs to the innermost phase that was open, or to "other".

    So the phases add up to all the time that passed. On a GPU it is the time of the current stream,
    from CUDA events that no one waits for until `read`; elsewhere that of the monotonic clock.
    Where it is not enabled it measures nothing and costs nothing.
    """

    def __init__(self, device: torch.device, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self._cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = [OTHER]
        self._at: float | None = None
        self._event: torch.cuda.Event | None = None
        self._marks: list[tuple[str, torch.cuda.Event]] = []
        self._spare: list[torch.cuda.Event] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """A `with` whose block is counted under a name, but for the phases inside it."""
        if not self.enabled:
            yield
            return
        self._mark(self._open[-1])
        self._open.append(name)
        try:
            yield
        finally:
            self._mark(self._open.pop())

    def each(self, name: str, items: Iterable[ItemT]) -> Iterator[ItemT]:
        """The items, with the time that each takes to come counted under a name."""
        source = iter(items)
        while True:
            with self(name):
                try:
                    item = next(source)
                except StopIteration:
                    return
            yield item

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last reading.

        Call it where the host has waited for the device anyway, at the end of an epoch: it waits
        for the last event.
        """
        if not self.enabled:
            return {}
        self._mark(self._open[-1])
        for ending, event in self._marks:
            event.synchronize()
            if self._event is not None:
                self._seconds[ending] += self._event.elapsed_time(event) / 1000
                self._spare.append(self._event)
            self._event = event
        self._marks.clear()
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds

    def _mark(self, ending: str) -> None:
        """The time since the last mark belongs to the phase `ending`."""
        if not self._cuda:
            now = time.perf_counter()
            if self._at is not None:
                self._seconds[ending] += now - self._at
            self._at = now
            return
        event = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((ending, event))


# Of losses, equal in the logarithm: 32 bins a decade.
SCORE_LOW, SCORE_HIGH, SCORE_BINS = 1e-2, 1e2, 128


@torch.no_grad()
def score_histogram(scores: Tensor) -> dict[str, Any]:
    """How the scores (N,) are distributed, for an epoch's record; the host waits for it.

    In SCORE_BINS bins from low to high, equal in the logarithm; counts is a list of the scores
    below low, those in each bin, and those from high on; unseen counts NaN.
    """
    place = (scores / SCORE_LOW).log2_().mul_(SCORE_BINS / math.log2(SCORE_HIGH / SCORE_LOW))
    place = place.floor_().clamp_(-1, SCORE_BINS).nan_to_num_(SCORE_BINS + 1).add_(1).long()
    counts = torch.zeros(SCORE_BINS + 3, dtype=torch.int64, device=scores.device)
    *counts, unseen = counts.scatter_add_(0, place, torch.ones_like(place)).tolist()
    return {"low": SCORE_LOW, "high": SCORE_HIGH, "counts": counts, "unseen": unseen}


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch held on the GPU, or on a CPU the most the process was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
