"""Where an epoch's time goes, measured without making the host wait."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Phases:
    """Seconds spent in named phases: CUDA events on a GPU, the monotonic clock elsewhere.

    Args:
        device: whose time is measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._pairs: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
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

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last reading.

        Call it where the host has waited for the device anyway, at the end of an epoch: it waits
        for the last event.
        """
        for name, begin, end in self._pairs:
            end.synchronize()
            self._seconds[name] += begin.elapsed_time(end) / 1000
            self._spare += (begin, end)
        self._pairs.clear()
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds

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
