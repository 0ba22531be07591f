"""Host syncs: counted and forbidden, and found in a trace with those of other libraries."""

import warnings
from collections import Counter
from typing import Any

import pytest
import torch

from infobatch_fast.data.loader import make_loader
from infobatch_fast.infobatch import InfoBatch
from infobatch_fast.telemetry.phases import Phases
from infobatch_fast.telemetry.syncs import HostSync, host_syncs, syncs_in_trace, trace_syncs
from infobatch_fast.train import loop as train
from infobatch_fast.train.models import make_model
from infobatch_fast.train.optim import make_optimizer
from infobatch_fast.train.step import TrainStep

CPU = torch.device("cpu")
READS = {
    "item": lambda x: x[0].item(),
    "bool": lambda x: bool(x[0] > 0),
    "int": lambda x: int(x.sum()),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "mask_put": lambda x: x.clone().__setitem__(x > 0, x[:3]),
    "unique": lambda x: x.unique(),
    "bincount": lambda x: x.bincount(),
    "equal": lambda x: x.equal(x),
    "allclose": lambda x: x.allclose(x),
    "repeat": lambda x: x.repeat_interleave(x),
    "unique_dim": lambda x: x.unique(dim=0),
    "unique_consecutive": lambda x: x.unique_consecutive(),
    "masked_select": lambda x: x.masked_select(x > 0),
}


@pytest.mark.parametrize("name", READS)
def test_reads_are_counted(name: str) -> None:
    x = torch.arange(4)
    with host_syncs(CPU, "count") as watch:
        (x + 1).sum()
        assert watch.count == 0
        READS[name](x)
        assert watch.count == 1
        READS[name](x)
    READS[name](x)
    assert watch.count == 2
    assert len(watch.places) == 1


@pytest.mark.parametrize("name", READS)
def test_reads_are_forbidden(name: str) -> None:
    with host_syncs(CPU, "forbid") as watch:
        with watch.allowed():
            READS[name](torch.arange(4))
        with pytest.raises(HostSync, match=r"^a host sync where none is allowed, by \w+"):
            READS[name](torch.arange(4))
    READS[name](torch.arange(4))


def test_allowed_is_not_counted() -> None:
    with host_syncs(CPU, "count") as watch:
        with watch.allowed():
            torch.ones(1).item()
        torch.ones(1).item()
    assert watch.places == {"_local_scalar_dense": 1}


def test_off_sees_nothing() -> None:
    with host_syncs(CPU, "off") as watch, watch.allowed():
        torch.ones(1).item()
    assert watch.count == 0


def test_an_unknown_action() -> None:
    with (
        pytest.raises(ValueError, match=r"^action must be one of off, count, forbid, got warn$"),
        host_syncs(CPU, "warn"),
    ):
        pass


class FakeCuda:
    """torch's sync debug mode, as far as it shows without a GPU."""

    def __init__(self, monkeypatch) -> None:
        self.modes: list[str] = []
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", self.set)

    def set(self, mode: str) -> None:
        self.modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)

    def sync(self) -> None:
        if self.modes[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        if self.modes[-1] == "warn":
            warnings.warn("called a synchronizing CUDA operation (Triggered ...)", stacklevel=2)


def test_debug_mode_is_counted_and_put_back(monkeypatch) -> None:
    cuda = FakeCuda(monkeypatch)
    with warnings.catch_warnings(record=True) as others:
        with host_syncs(torch.device("cuda"), "count") as watch:
            for _ in range(3):
                cuda.sync()  # the same line each time: a warning is shown once by default
            with watch.allowed():
                cuda.sync()
            warnings.filterwarnings("always", "another")
            warnings.warn("another", stacklevel=1)
        assert cuda.modes == ["warn", "default", "warn", "default"]
    assert [str(other.message) for other in others] == ["another"]
    assert watch.count == 3
    assert [place.split(":")[0] for place in watch.places] == ["test_syncs.py"]


def test_debug_mode_forbids_and_is_put_back(monkeypatch) -> None:
    cuda = FakeCuda(monkeypatch)
    with (
        pytest.raises(HostSync, match=r"^a host sync where none is allowed, at test_syncs.py:\d+$"),
        host_syncs(torch.device("cuda"), "forbid"),
    ):
        cuda.sync()
    assert cuda.modes == ["error", "default"]
    with (
        pytest.raises(RuntimeError, match=r"^something else$"),
        host_syncs(torch.device("cuda"), "forbid"),
    ):
        raise RuntimeError("something else")
    assert cuda.modes[-1] == "default"


def event(name: str, ts: float, dur: float = 1, tid: int = 7, cat: str = "cuda_runtime", ph="X"):
    return {"name": name, "ts": ts, "dur": dur, "tid": tid, "cat": cat, "ph": ph}


def test_syncs_in_a_trace() -> None:
    marker = event("infobatch_fast.trace_syncs", 100, 50, cat="user_annotation")
    events: list[dict[str, Any]] = [
        event("cudaStreamSynchronize", 99),  # before
        event("cudaStreamSynchronize", 101),
        event("cudaStreamSynchronize", 102),
        event("cudaEventSynchronize", 103),
        event("cudaMemcpy", 104),
        event("cudaFree", 105),
        event("cudaMalloc", 106),
        event("cudaMemset", 107),
        event("cudaStreamSynchronize", 108, cat="cuda_driver"),
        event("cudaMemcpyAsync", 110),  # these do not wait
        event("cudaLaunchKernel", 111),
        event("cudaStreamWaitEvent", 112),
        event("cudaMallocAsync", 113),
        event("cudaMemsetAsync", 114),
        event("mycudaStreamSynchronize", 115),
        event("cudaDeviceSynchronize", 120, tid=8),
        event("cudaDeviceSynchronize", 121, cat="kernel"),  # no call of the host's
        event("cudaDeviceSynchronize", 122, ph="i"),
        event("cudaDeviceSynchronize", 151),  # after
        # The same name on the device's row.
        event("infobatch_fast.trace_syncs", 130, 1, tid=1, cat="gpu_user_annotation"),
        marker,
    ]
    found = syncs_in_trace({"traceEvents": events})
    assert found.here == {
        "cudaStreamSynchronize": 2,
        "cudaEventSynchronize": 1,
        "cudaMemcpy": 1,
        "cudaFree": 1,
        "cudaMalloc": 1,
        "cudaMemset": 1,
    }
    assert found.elsewhere == {"cudaDeviceSynchronize": 1}
    events.remove(marker)
    with pytest.raises(ValueError, match=r"^the trace must hold the call it was made for$"):
        syncs_in_trace({"traceEvents": events})


def test_a_real_trace_has_the_call_in_it() -> None:
    calls = []
    found = trace_syncs(lambda: calls.append(torch.ones(3).sum().item()))
    assert calls == [3.0, 3.0]  # the first tunes in the thread that is traced
    assert found == (Counter(), Counter())  # a CPU waits for nothing


@pytest.mark.gpu
def test_a_trace_sees_a_sync_on_cuda() -> None:
    x = torch.ones(3, device="cuda")
    x.sum().item()
    assert trace_syncs(lambda: x + 1).here == {}
    found = trace_syncs(lambda: (x.sum().item(), x.sum().item()))
    assert found.here["cudaStreamSynchronize"] == 2


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dali", "torch"])
def test_a_run_forbids_host_syncs_from_its_first_step_on_cuda(kind: str, tmp_path) -> None:
    words = "--device cuda --preset paper --dataset synthetic --synthetic-samples 2000 --epochs 3"
    words += f" --no-compile --host-syncs forbid --loader {kind} --out {tmp_path / 'run'}"
    assert train.main(words.split()) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["dali", "torch"])
def test_one_sync_an_epoch_and_none_in_its_steps_on_cuda(kind: str) -> None:
    device = torch.device("cuda", 0)
    samples = 2000
    images = torch.randint(0, 256, (samples, 32, 32, 3), dtype=torch.uint8, device=device)
    labels = torch.randint(0, 10, (samples,), device=device)
    model = make_model("r18", 10, seed=0).to(device, memory_format=torch.channels_last)  # pyright: ignore
    infobatch = InfoBatch(samples, 8, device=device)
    step = TrainStep(
        model,
        make_optimizer("lars", model, lr=1.0, weight_decay=5e-4),
        infobatch,
        amp="bf16",
        label_smoothing=0.1,
        compile=False,
        phases=Phases(device),
    )
    loader, _ = make_loader(kind, images, labels, 200, mean=(0.5,) * 3, std=(0.25,) * 3)

    def steps(plan) -> None:
        for images, labels, batch in step.phases.each("wait", loader.epoch(plan)):
            with step.phases("step"):
                step(images, labels, batch, 0.1, 0.9)

    for epoch in range(3):  # what only a first epoch does may wait
        steps(infobatch.sample(epoch, 200))
        step.read_counts()
    with host_syncs(device, "count") as drawing:
        plan = infobatch.sample(3, 200)
    assert drawing.count == 1
    with host_syncs(device, "forbid"):
        steps(plan)
    step.read_counts()
    assert trace_syncs(lambda: steps(plan)).here == {}
    assert sum(trace_syncs(lambda: infobatch.sample(3, 200)).here.values()) == 1
