"""Shared by the tests: a way to see what an operation asks of the host."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Counts the reads of a tensor's value by the host: item(), bool(), int(), tolist() of one."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.count += name.startswith(("aten._local_scalar_dense", "aten.nonzero.default"))
        return function(*args, **(kwargs or {}))


@pytest.fixture
def host_reads():
    @contextmanager
    def watch() -> Iterator[HostReads]:
        with HostReads() as mode:
            yield mode

    return watch


@pytest.fixture
def no_sync():
    """A `with` in which torch raises for a host sync on CUDA; it does not see DALI's own."""

    @contextmanager
    def forbid() -> Iterator[None]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode")  # "a prototype"
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return forbid


# The tensors here are small: a second thread gains nothing, and stalls where cores are shared.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
