"""A small step with its batches, and CUDA graphs that replay on a CPU."""

import gc
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from infobatch_fast.infobatch import Batch, InfoBatch
from infobatch_fast.telemetry.phases import Phases
from infobatch_fast.train import graph
from infobatch_fast.train.models import make_model
from infobatch_fast.train.optim import make_optimizer
from infobatch_fast.train.step import TrainStep

SAMPLES = 64
ON = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]  # devices of a test of both


def make_step(optimizer: str = "lars", device: str = "cpu", **options: Any) -> TrainStep:
    torch.manual_seed(1)
    model: Any = make_model("small", 10, seed=1)
    slow = device == "cpu" and options.get("amp") == "fp16"  # convolutions: 20 ms a sample
    if options.pop("dense", slow):
        model = [nn.BatchNorm2d(3), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10)]
        model = nn.Sequential(*model)
    model = model.to(device=device, memory_format=torch.channels_last)
    plain: dict[str, Any] = {"amp": "off", "label_smoothing": 0.1, "compile": False}
    return TrainStep(
        model.train(),
        make_optimizer(optimizer, model, lr=0.1, weight_decay=5e-4),
        options.pop("infobatch", InfoBatch(SAMPLES, 4, device=device)),
        phases=Phases(torch.device(device)),
        **{**plain, **options},
    )


def make_batch(seed: int = 0, size: int = 16, device: str = "cpu") -> tuple[Tensor, Tensor, Batch]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (size,), generator=generator)
    indices = torch.randperm(SAMPLES, generator=generator)[:size]
    weights = torch.where(torch.arange(size) % 2 == 0, 2.0, 1.0)
    batch = Batch(indices.to(device), weights.to(device))
    return images.to(device), labels.to(device), batch


def spoilt_batch(
    seed: int, value: float = float("nan"), device: str = "cpu", size: int = 16
) -> tuple[Tensor, Tensor, Batch]:
    images, labels, batch = make_batch(seed, size, device)
    images[3, 1, 4, 4] = value
    return images, labels, batch


def everything(step: TrainStep) -> list[Tensor]:
    """Weights, buffers, scores, and then what the optimizer holds."""
    assert step.infobatch is not None
    tensors = [*step.model.state_dict().values(), step.infobatch.scores]
    for state in step.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return [tensor.detach().clone() for tensor in tensors]


def assert_same(one: Any, other: Any) -> None:
    """Bit for bit equal tensors, in whatever containers."""
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


class FakeGraph:
    """Captures the step without running it, and runs it on the captured tensors when replayed."""

    def __init__(self) -> None:
        self.body: Callable[[], None] = lambda: None
        self.replays = 0
        self.of_pool: Any = None

    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        self.replays += 1
        self.body()


class FakeCuda:
    """In the place of torch.cuda as `GraphStep` uses it.

    Attributes:
        graphs: captured, or begun to be.
        fails: with this, if it is set, a capture ends.
        told: what was called before and in the captures, in its order.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.graphs: list[FakeGraph] = []
        self.fails: Exception | None = None
        self.told: list[str] = []
        self._capturing: FakeGraph | None = None
        advance = TrainStep.advance

        def recorded(step: TrainStep, *arguments: Any) -> None:
            if self._capturing is None:
                return advance(step, *arguments)
            assert not arguments[-1].enabled  # a timing event in a graph cannot be read
            assert step.model.training  # its replays normalise as it does now
            infobatch = step.infobatch
            if infobatch is not None:  # the host's part of a step runs at the capture alone
                infobatch.count(len(arguments[1]))

            def body() -> None:
                recorded = infobatch.recorded if infobatch is not None else 0
                advance(step, *arguments)
                if infobatch is not None:
                    infobatch.recorded = recorded

            self._capturing.body = body

        monkeypatch.setattr(TrainStep, "advance", recorded)
        monkeypatch.setattr(graph, "obstacle", lambda step: None)
        monkeypatch.setattr(graph.time, "sleep", lambda seconds: self.told.append("rest"))
        for name, value in {
            "CUDAGraph": FakeGraph,
            "graph": self._capture,
            "device": nullcontext,
            "synchronize": lambda: self.told.append("synchronize"),
            "current_stream": lambda: "the stream before",
            "Stream": lambda device: object(),
            "set_stream": lambda stream: self.told.append(stream),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextmanager
    def _capture(self, graph: FakeGraph, pool: Any, stream: Any, capture_error_mode: str):
        assert capture_error_mode == "thread_local"
        assert not gc.isenabled()
        self.told.append(f"capture in {id(stream)}")
        graph.of_pool = pool
        self.graphs.append(graph)
        self._capturing = graph
        try:
            yield
            if self.fails is not None:
                raise self.fails
        finally:
            self._capturing = None
            if self.fails is not None:  # as torch's own end of a capture
                raise RuntimeError("previous error during capture")
