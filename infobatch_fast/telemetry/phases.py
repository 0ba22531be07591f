"""Where an epoch's time goes, measured without making the host wait; and how scores lie."""

import math
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

ItemT = TypeVar("ItemT")

OTHER = "other"
# Of the trainer, in the order of an epoch: "step" is without the update within it, and "other" what
# is in none of them.
PHASES = ("choose", "wait", "step", "update", "startup", "evaluation", "checkpoint", OTHER)
PRUNING = ("choose", "update")  # what pruning adds
_MARKS = 2000


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
        self._spans: dict[str, _Span] = {}
        self._at: float | None = None
        self._event: torch.cuda.Event | None = None
        self._marks: deque[tuple[str, torch.cuda.Event]] = deque()
        self._spare: list[torch.cuda.Event] = []

    def __call__(self, name: str) -> AbstractContextManager[None]:
        """A `with` whose block is counted under a name, but for the phases inside it."""
        if not self.enabled:
            return nullcontext()
        return self._spans.get(name) or self._spans.setdefault(name, _Span(self, name))

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
        while self._marks:
            self._marks[0][1].synchronize()
            self._fold()
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
        # An epoch may have millions of steps: what the device has passed is added up.
        while len(self._marks) > _MARKS and self._marks[0][1].query():
            self._fold()

    def _fold(self) -> None:
        ending, event = self._marks.popleft()
        if self._event is not None:
            self._seconds[ending] += self._event.elapsed_time(event) / 1000
            self._spare.append(self._event)
        self._event = event


class _Span(AbstractContextManager):
    def __init__(self, phases: Phases, name: str) -> None:
        self._phases, self._name = phases, name

    def __enter__(self) -> None:
        self._phases._mark(self._phases._open[-1])
        self._phases._open.append(self._name)

    def __exit__(self, *error: object) -> None:
        self._phases._mark(self._phases._open.pop())


# Of losses, equal in the logarithm: 32 bins a decade.
SCORE_LOW, SCORE_HIGH, SCORE_BINS = 1e-2, 1e2, 128


@torch.no_grad()
def score_histogram(scores: Tensor) -> dict[str, Any]:
    """How the scores are distributed, for an epoch's record; the host waits for it.

    Args:
        scores: (N,) float32, losses.

    Returns:
        low and high, the ends of SCORE_BINS bins that are equal in the logarithm; counts, a list of
        the scores below low, those in each bin, and those from high on; and unseen, of NaN.
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
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
