"""Shared by the tests."""

import gc
import os
import signal
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # which Triton reads once, when it is first imported

# Where nohup started the tests, they and all that they start would be deaf to it.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The tensors here are small: a second thread gains nothing, and stalls where cores are shared.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    # On a card with TF32 torch's compiler advises it, and looks it up in a way torch 2.9 to 2.11
    # warn of, as they do of `allow_tf32` below.
    for start in ("TensorFloat32 tensor cores", "Please use the new API settings to control TF32"):
        config.addinivalue_line("filterwarnings", f"ignore:{start}:UserWarning")
    # Workers that are forked beside DALI's threads touch none of theirs.
    config.addinivalue_line("filterwarnings", "ignore:This process .* is multi-threaded")
    # Importing torch 2.11's compiler calls its own deprecated `torch.jit.script_method`.
    config.addinivalue_line("filterwarnings", "ignore::DeprecationWarning:torch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def at_rest(request: pytest.FixtureRequest) -> Iterator[None]:
    """No batch of DALI's that a test left may be released in the next one's capture of a graph."""
    yield
    if torch.cuda.is_available() and request.node.get_closest_marker("gpu"):
        gc.collect()
        torch.cuda.synchronize()


@pytest.fixture(autouse=True)
def cudnn_as_before() -> Iterator[None]:
    """The trainer has cuDNN tune; what a test sets must not decide how the next one computes."""
    cudnn = torch.backends.cudnn
    names = ("benchmark", "deterministic", "allow_tf32")
    before = {name: getattr(cudnn, name) for name in names}
    yield
    for name, value in before.items():
        setattr(cudnn, name, value)
