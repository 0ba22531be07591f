"""Where the host waits for the device: counted, forbidden, or found in a trace."""

import json
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_MODES = {"off": "default", "count": "warn", "forbid": "error"}  # of torch's sync debug mode


class HostSync(RuntimeError):
    """The host waited for the device where that was forbidden."""


class HostSyncs:
    """What `host_syncs` saw: in `places` as "file.py:line" on a GPU, by operation on a CPU."""

    def __init__(self, cuda: bool, mode: str) -> None:
        self.places: Counter[str] = Counter()
        self._cuda, self._mode = cuda, mode
        self._watching = True

    @property
    def count(self) -> int:
        """Host syncs so far."""
        return self.places.total()

    @contextmanager
    def allowed(self) -> Iterator[None]:
        """A `with` in which the host may wait uncounted: to save a checkpoint, say."""
        self._switch(False)
        try:
            yield
        finally:
            self._switch(True)

    def _switch(self, watching: bool) -> None:
        self._watching = watching
        if self._cuda:
            torch.cuda.set_sync_debug_mode(self._mode if watching else "default")

    def _seen(self, place: str) -> None:
        if self._watching:
            self.places[place] += 1
            if self._mode == "error":
                raise HostSync(f"a host sync where none is allowed, by {place}")


@contextmanager
def host_syncs(device: torch.device, action: str) -> Iterator[HostSyncs]:
    """Watch where the host waits for the device.

    On a GPU it is torch's sync debug mode, which knows torch's own operations alone; what other
    libraries do is seen by `trace_syncs`. On a CPU nothing waits, and what is watched are the reads
    of a tensor's value, each of which would be a host sync on a GPU: those that are operations of
    torch, such as item() and nonzero(), but not tolist() and numpy().

    Args:
        device: watched.
        action: count; forbid: raise at the first; or off: see nothing.

    Raises:
        HostSync: at a host sync that was forbidden.
    """
    watch = HostSyncs(device.type == "cuda", _MODES[action])
    if action == "off":
        yield watch
        return
    if device.type != "cuda":
        with _HostReads(watch):
            yield watch
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")  # "is a prototype"
        warnings.filterwarnings("always", _SYNCHRONIZING)
        show = warnings.showwarning

        def count(message: Any, category: Any, file: str, line: int, *rest: Any) -> None:
            if _SYNCHRONIZING in str(message):
                watch._seen(f"{Path(file).name}:{line}")
            else:
                show(message, category, file, line, *rest)

        warnings.showwarning = count
        watch._switch(True)
        try:
            yield watch
        except RuntimeError as error:
            if _SYNCHRONIZING not in str(error):
                raise
            frames = traceback.extract_tb(error.__traceback__)
            where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"
            raise HostSync(f"a host sync where none is allowed, at {where}") from error
        finally:
            torch.cuda.set_sync_debug_mode("default")


_SYNCHRONIZING = "called a synchronizing CUDA operation"  # of torch's debug mode


class _HostReads(TorchDispatchMode):
    def __init__(self, watch: HostSyncs) -> None:
        super().__init__()
        self._watch = watch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS or (func in _INDEXED and _by_mask(args[1])):
            self._watch._seen(str(func).removeprefix("aten.").removesuffix(".default"))
        return func(*args, **(kwargs or {}))


_aten = torch.ops.aten
# item(), bool(), int(); and sizes that depend on values
_READS = {
    *(_aten._local_scalar_dense.default, _aten.equal.default, _aten.allclose.default),
    *(_aten.nonzero.default, _aten.masked_select.default, _aten.bincount.default),
    *(_aten._unique2.default, _aten.unique_dim.default, _aten.unique_consecutive.default),
    _aten.repeat_interleave.Tensor,
}
_INDEXED = {_aten.index.Tensor, _aten.index_put_.default}


def _by_mask(indices: Any) -> bool:
    return any(index is not None and index.dtype is torch.bool for index in indices)


_MARKER = "infobatch_fast.trace_syncs"

# Of the CUDA runtime; of the driver's own calls the profiler keeps launches and memory alone.
# cudaMemcpyAsync is none: where torch reads a value it is followed by cudaStreamSynchronize.
_WAITING = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
_WAITING_COPIES = ("cudaMemcpy", "cudaMemcpy2D", "cudaMemset", "cudaFree", "cudaMalloc")


def trace_syncs(call: Callable[[], object]) -> Counter[str]:
    """The host syncs of a call, by the name of what waited: those of other libraries too.

    Seen by torch's profiler are the calls of the CUDA runtime that wait by their nature, whoever
    makes them in this thread, where backward runs meanwhile; not a copy that waits because its
    memory is not pinned.

    Args:
        call: run twice, and traced the second time.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with (
        torch.autograd.set_multithreading_enabled(False),
        tempfile.TemporaryDirectory() as folder,
    ):
        # cuDNN keeps its plans by thread: this one has yet to tune those of the backward.
        call()
        # acc_events: without it torch 2.11 warns, though there is one cycle alone.
        with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
            with torch.profiler.record_function(_MARKER):
                call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return syncs_in_trace(json.loads(path.read_text())["traceEvents"])


def syncs_in_trace(events: list[dict[str, Any]]) -> Counter[str]:
    """The host syncs in the events of a profiler's trace, in `trace_syncs`'s second call."""
    calls = [event for event in events if event.get("ph") == "X"]
    (marker,) = (c for c in calls if c["name"] == _MARKER and c.get("cat") == "user_annotation")
    end = marker["ts"] + marker["dur"]
    return Counter(
        call["name"]
        for call in calls
        if call.get("cat") == "cuda_runtime"
        and call["tid"] == marker["tid"]
        and marker["ts"] <= call["ts"] <= end
        and (call["name"] in _WAITING_COPIES or call["name"].startswith(_WAITING))
    )
