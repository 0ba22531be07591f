"""What needs a card; most bodies run on a CPU too, by stand-ins, so that they are known to run."""

import pytest
import torch


@pytest.fixture
def like_for_like(cudnn_as_before: None) -> None:
    """The same algorithm each time and float32 without TF32: what is left to differ is the form."""
    cudnn = torch.backends.cudnn
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = True, False, False
