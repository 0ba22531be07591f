"""The captured step: what is copied, captured and replayed, by a graph that replays on the CPU."""

import gc
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from infobatch_fast.infobatch import Batch, InfoBatch
from infobatch_fast.telemetry.phases import Phases
from infobatch_fast.telemetry.syncs import host_syncs
from infobatch_fast.train import graph
from infobatch_fast.train.graph import MOST, WARM_UP, GraphStep, obstacle
from infobatch_fast.train.models import make_model
from infobatch_fast.train.optim import OPTIMIZERS, make_optimizer
from infobatch_fast.train.step import TrainStep


def make_step(optimizer: str = "lars", device: str = "cpu", amp: str = "off") -> TrainStep:
    model = make_model("small", 10, seed=1)
    model = model.to(device=device, memory_format=torch.channels_last)  # pyright: ignore
    return TrainStep(
        model,
        make_optimizer(optimizer, model, lr=0.1, weight_decay=5e-4),
        InfoBatch(64, 4, device=device),
        amp=amp,
        label_smoothing=0.1,
        compile=False,
        phases=Phases(torch.device(device)),
    )


def make_batch(seed: int, size: int = 16, device: str = "cpu") -> tuple[Tensor, Tensor, Batch]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (size,), generator=generator)
    indices = torch.randperm(64, generator=generator)[:size]
    weights = torch.where(torch.arange(size) % 2 == 0, 2.0, 1.0)
    batch = Batch(indices.to(device), weights.to(device))
    return images.to(device), labels.to(device), batch


def everything(step: TrainStep) -> list[Tensor]:
    assert step.infobatch is not None
    tensors = [*step.model.state_dict().values(), step.infobatch.scores, step.counts]
    for state in step.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return [tensor.detach().clone() for tensor in tensors]


class FakeGraph:
    """Captures the step without running it, and runs it on the captured tensors when replayed."""

    capturing: "FakeGraph | None" = None
    streams: ClassVar[list[str]] = []

    def __init__(self) -> None:
        self.body: Callable[[], None] | None = None
        self.replays = 0
        self.of_pool: Any = None

    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        assert self.body is not None
        self.replays += 1
        self.body()


@pytest.fixture
def fake_graphs(monkeypatch) -> list[FakeGraph]:
    made: list[FakeGraph] = []

    @contextmanager
    def capture(graph: FakeGraph, pool: Any, stream: Any, capture_error_mode: str):
        assert (stream, capture_error_mode) == ("own stream", "thread_local")
        assert not gc.isenabled()
        graph.of_pool = pool
        made.append(graph)
        FakeGraph.capturing = graph
        yield
        FakeGraph.capturing = None

    advance = TrainStep.advance

    def recorded(self: TrainStep, *arguments: Any) -> None:
        graph = FakeGraph.capturing
        if graph is None:
            return advance(self, *arguments)
        assert not arguments[-1].enabled  # a timing event in a graph cannot be read
        graph.body = lambda: advance(self, *arguments)

    monkeypatch.setattr(TrainStep, "advance", recorded)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(graph, "obstacle", lambda step: None)
    for name, value in {
        "device": lambda device: nullcontext(),
        "synchronize": lambda: None,
        "current_stream": lambda: "the stream before",
        "Stream": lambda device: "own stream",
        "set_stream": lambda stream: FakeGraph.streams.append(stream),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(graph, "QUIET", 0)
    monkeypatch.setattr(FakeGraph, "streams", [])
    return made


def test_replays_are_the_eager_steps(fake_graphs: list[FakeGraph]) -> None:
    eager, step = make_step(), make_step()
    captured = GraphStep(step, print)
    for seed in range(12):
        # Now and then the partial batch of a full epoch.
        batch = make_batch(seed, 16 if seed % 3 else 5)
        lr, momentum = 0.01 * (seed + 1), 0.95 - 0.01 * seed
        captured.capture()
        eager(*batch, lr, momentum)
        captured(*batch, lr, momentum)
        for one, other in zip(everything(eager), everything(step), strict=True):
            assert torch.equal(one.nan_to_num(7.5), other.nan_to_num(7.5))
    full, partial = fake_graphs
    assert (full.replays, partial.replays) == (8 - WARM_UP, 4 - WARM_UP)
    assert full.of_pool is None
    assert partial.of_pool == "pool"
    assert captured.captured


def test_the_batch_is_copied_not_kept(fake_graphs: list[FakeGraph]) -> None:
    eager, step = make_step(), make_step()
    captured = GraphStep(step, print)
    for seed in range(WARM_UP + 3):
        batch = make_batch(seed)
        eager(*batch, 0.05, 0.9)
        captured.capture()
        captured(*batch, 0.05, 0.9)
        for tensor in (*batch[:2], *batch[2]):  # the loader's buffers are used anew
            tensor.fill_(0)
    assert fake_graphs[0].replays == 3
    for one, other in zip(everything(eager), everything(step), strict=True):
        assert torch.equal(one.nan_to_num(7.5), other.nan_to_num(7.5))


def test_odd_sizes_stay_eager(fake_graphs: list[FakeGraph]) -> None:
    captured = GraphStep(make_step(), print)
    for size in (16, 5, 9, 7):
        for seed in range(WARM_UP + 2):
            captured(*make_batch(seed, size), 0.01, 0.9)
            captured.capture()
    assert [made.replays for made in fake_graphs] == [2] * MOST
    for seed in range(40):  # sizes that come once are never captured
        captured(*make_batch(seed, 17 + seed), 0.01, 0.9)
        captured.capture()
    assert len(fake_graphs) == MOST
    assert FakeGraph.streams == ["the stream before"] * MOST
    assert gc.isenabled()


def test_nothing_is_captured_in_an_epoch(fake_graphs: list[FakeGraph]) -> None:
    captured = GraphStep(make_step(), print)
    for seed in range(2 * WARM_UP):
        captured(*make_batch(seed), 0.01, 0.9)
    assert fake_graphs == []
    assert not captured.captured


def test_another_shape_is_another_graph(fake_graphs: list[FakeGraph]) -> None:
    eager, step = make_step(), make_step()
    captured = GraphStep(step, print)
    for seed in range(2 * (WARM_UP + 2)):
        images, labels, batch = make_batch(seed)
        images = images if seed % 2 else images[:, :, :16, :16]
        eager(images, labels, batch, 0.01, 0.9)
        captured.capture()
        captured(images, labels, batch, 0.01, 0.9)
    assert [made.replays for made in fake_graphs] == [2, 2]
    for one, other in zip(everything(eager), everything(step), strict=True):
        assert torch.equal(one.nan_to_num(7.5), other.nan_to_num(7.5))


def test_a_capture_that_fails_is_told_and_nothing_is_lost(
    fake_graphs: list[FakeGraph], monkeypatch
) -> None:
    @contextmanager
    def refuse(graph: FakeGraph, pool: Any, stream: Any, capture_error_mode: str):
        made.append(graph)
        try:
            yield
            raise KeyError("operation not permitted\n when stream is capturing")
        finally:
            raise RuntimeError("previous error during capture")

    made: list[FakeGraph] = []
    advance = TrainStep.advance

    def nothing_in_a_capture(self: TrainStep, *arguments: Any) -> None:
        if arguments[-1].enabled:
            advance(self, *arguments)

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    monkeypatch.setattr(TrainStep, "advance", nothing_in_a_capture)
    said: list[str] = []
    eager, step = make_step(), make_step()
    captured = GraphStep(step, said.append)
    for seed in range(2 * WARM_UP):
        eager(*make_batch(seed), 0.01, 0.9)
        captured.capture()
        captured(*make_batch(seed), 0.01, 0.9)
    assert FakeGraph.streams == ["the stream before"]
    assert gc.isenabled()
    assert said == [
        "WARNING: no CUDA graph, every step runs eagerly: "
        "'operation not permitted\\n when stream is capturing'"
    ]
    assert len(made) == 1
    assert not captured.captured
    for one, other in zip(everything(eager), everything(step), strict=True):
        assert torch.equal(one.nan_to_num(7.5), other.nan_to_num(7.5))
    fatal = GraphStep(step)
    fatal(*make_batch(0), 0.01, 0.9)  # its shape had its warm-up
    with pytest.raises(RuntimeError, match="previous error during capture"):
        fatal.capture()


def test_obstacles() -> None:
    assert obstacle(make_step()) == "CUDA graphs need a CUDA device"
    with pytest.raises(ValueError, match=r"^step must be one that a CUDA graph can hold: CUDA g"):
        GraphStep(make_step(), print)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_holds_numbers(name: str) -> None:
    class OnCuda:
        device = torch.device("cuda")

    step = make_step(name)
    step.found_inf = OnCuda()  # type: ignore[assignment]
    if name in ("lars", "lamb"):
        assert obstacle(step) is None
    else:
        assert "holds its learning rate or momentum as a number" in str(obstacle(step))


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["lars", "lamb"])
@pytest.mark.parametrize(("amp", "limit"), [("off", 1e-3), ("bf16", 0.02), ("fp16", 0.02)])
def test_fifty_steps_follow_the_eager_ones_on_cuda(optimizer: str, amp: str, limit: float) -> None:
    eager, step = make_step(optimizer, "cuda", amp), make_step(optimizer, "cuda", amp)
    captured = GraphStep(step, print)
    for seed in range(50):
        batch = make_batch(seed, 16 if seed % 3 else 5, "cuda")
        lr = 0.01 * (1 + seed % 5)
        for one in (eager, step):
            one.begin_epoch()
        eager(*batch, lr, 0.9)
        captured.capture()
        captured(*batch, lr, 0.9)
        assert step.read_counts().loss == pytest.approx(eager.read_counts().loss, rel=limit)
    assert len(captured._graphs) == MOST
    images, labels, batch = make_batch(50, device="cuda")
    with host_syncs(torch.device("cuda"), "forbid"):
        captured(images, labels, batch, 0.01, 0.9)
    eager(images, labels, batch, 0.01, 0.9)
    assert step.infobatch is not None
    assert eager.infobatch is not None
    seen = step.infobatch.scores.isfinite()
    assert torch.equal(seen, eager.infobatch.scores.isfinite())
    torch.testing.assert_close(
        step.infobatch.scores[seen], eager.infobatch.scores[seen], rtol=limit, atol=limit
    )


@pytest.mark.gpu
def test_a_non_finite_replay_changes_nothing_on_cuda() -> None:
    step = make_step("lars", "cuda", "bf16")
    captured = GraphStep(step, print)
    for seed in range(WARM_UP + 2):
        captured.capture()
        captured(*make_batch(seed, device="cuda"), 0.01, 0.9)
    assert step.infobatch is not None
    state = [*step.model.state_dict().values(), step.infobatch.scores]
    before = [tensor.clone() for tensor in state]
    images, labels, batch = make_batch(9, device="cuda")
    images[3, 1, 4, 4] = float("nan")
    captured(images, labels, batch, 0.01, 0.9)
    assert step.read_counts().skipped == 1
    for one, other in zip(before, state, strict=True):
        assert torch.equal(one.nan_to_num(7.5), other.nan_to_num(7.5))
