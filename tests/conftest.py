"""Shared by the tests."""

import pytest
import torch

# The tensors here are small: a second thread gains nothing, and stalls where cores are shared.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
