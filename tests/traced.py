"""The host syncs of a call, those of other libraries too, found in a trace of it."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

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
        events = json.loads(path.read_text())["traceEvents"]
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
