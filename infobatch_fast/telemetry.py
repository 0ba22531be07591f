"""Where an epoch's time goes, measured without making the host wait."""

import time
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_PAIRS = 1000


class Phases:
    """Seconds spent in named phases: CUDA events on a GPU, the monotonic clock elsewhere.

    Args:
        device: whose time is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._pairs: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._spare: list[torch.cuda.Event] = []

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count what the block does under a name; phases may follow each other, not nest."""
        if not self.cuda:
            start = time.perf_counter()
            try:
                yield
            finally:
                self._seconds[name] += time.perf_counter() - start
            return
        begin, end = self._event(), self._event()
        begin.record()
        try:
            yield
        finally:
            end.record()
            self._pairs.append((name, begin, end))
            # An epoch may have millions of steps: what the device has passed is added up.
            while len(self._pairs) > _PAIRS and self._pairs[0][2].query():
                self._add(*self._pairs.popleft())

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last reading.

        Call it where the host has waited for the device anyway, at the end of an epoch: it waits
        for the last event.
        """
        while self._pairs:
            self._pairs[0][2].synchronize()
            self._add(*self._pairs.popleft())
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds

    def _add(self, name: str, begin: torch.cuda.Event, end: torch.cuda.Event) -> None:
        self._seconds[name] += begin.elapsed_time(end) / 1000
        self._spare += (begin, end)

    def _event(self) -> torch.cuda.Event:
        return self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that torch held on the GPU, or on a CPU the most the process was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
