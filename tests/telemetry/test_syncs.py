"""Host syncs: counted and forbidden, and found in a trace with those of other libraries."""

import warnings
from collections import Counter

import pytest
import torch
from traced import trace_syncs

from infobatch_fast.telemetry.syncs import HostSync, host_syncs

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
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
def test_reads_are_counted_and_forbidden(name: str) -> None:
    x, read = torch.arange(4), READS[name]
    with host_syncs(CPU, "count") as watch:
        (x + 1).sum()
        assert watch.count == 0
        read(x)
        with watch.allowed():
            read(x)
        read(x)
    read(x)
    assert watch.count == 2
    assert len(watch.places) == 1
    with host_syncs(CPU, "off") as watch:
        read(x)
    assert watch.count == 0
    with host_syncs(CPU, "forbid") as watch:
        with watch.allowed():
            read(x)
        with pytest.raises(HostSync, match=r"^a host sync where none is allowed, by \w+"):
            read(x)


class FakeCuda:
    """torch's sync debug mode, as far as it shows without a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_debug_mode_is_counted_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    with warnings.catch_warnings(record=True) as others:
        with host_syncs(CUDA, "count") as watch:
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


def test_off_leaves_the_debug_mode_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    with host_syncs(CUDA, "off") as watch, watch.allowed():
        pass
    assert cuda.modes == []


def test_debug_mode_forbids_and_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda(monkeypatch)
    with pytest.raises(HostSync, match=r", at test_syncs.py:\d+$"), host_syncs(CUDA, "forbid"):
        cuda.sync()
    assert cuda.modes == ["error", "default"]
    with pytest.raises(RuntimeError, match=r"^something else$"), host_syncs(CUDA, "forbid"):
        raise RuntimeError("something else")
    assert cuda.modes[-1] == "default"


def test_a_real_trace_has_the_call_in_it() -> None:
    calls = []
    assert trace_syncs(lambda: calls.append(torch.ones(3).sum().item())) == Counter()
    assert calls == [3.0, 3.0]  # the first tunes, in the thread that is traced


@pytest.mark.gpu
def test_a_trace_sees_a_sync_on_cuda() -> None:
    x = torch.ones(3, device="cuda")
    assert trace_syncs(lambda: x + 1) == Counter()
    found = trace_syncs(lambda: (x.sum().item(), x.sum().item()))
    assert found["cudaStreamSynchronize"] == 2
