"""The captured step by graphs that replay on the CPU; on a card: tests/gpu/test_forms.py."""

import gc
from typing import Any

import pytest
import torch
from steps_made import FakeCuda, assert_same, everything, make_batch, make_step

from infobatch_fast.ranks import Share
from infobatch_fast.train.graph import MOST, GraphStep, obstacle
from infobatch_fast.train.optim import OPTIMIZERS
from infobatch_fast.train.step import WARM_UP


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


@pytest.mark.parametrize("ranks", [1, 2])
def test_replays_are_the_eager_steps(cuda: FakeCuda, ranks: int) -> None:
    eager, step = make_step(), make_step()
    assert eager.infobatch is not None
    assert step.infobatch is not None
    for infobatch in (eager.infobatch, step.infobatch):
        infobatch._share = Share(0, ranks, 16)
    captured = GraphStep(step)
    for seed in range(12):
        # Now and then the partial batch of a full epoch.
        images, labels, batch = make_batch(seed, 16 if seed % 3 else 5)
        lr, momentum = 0.01 * (seed + 1), 0.95 - 0.01 * seed
        step.infobatch._unmerged = False
        captured.capture()
        assert not step.infobatch._unmerged  # a merge is of all ranks, and a capture of each
        eager(images, labels, batch, lr, momentum)
        captured(images, labels, batch, lr, momentum)
        assert_same(everything(eager), everything(step))
        for tensor in (images, labels, *batch):  # the loader's buffers are used anew
            tensor.fill_(0)
        assert step.infobatch.recorded == eager.infobatch.recorded
        assert step.infobatch._unmerged == eager.infobatch._unmerged == (ranks == 2)
    assert eager.read_counts() == step.read_counts()
    full, partial = cuda.graphs
    assert (full.replays, partial.replays) == (8 - WARM_UP, 4 - WARM_UP)
    assert (full.of_pool, partial.of_pool) == (None, "pool")
    assert captured.captured
    assert cuda.told[:4] == cuda.told[4:]  # each at rest, and both in one stream
    assert cuda.told[3] == "the stream before"


@pytest.mark.parametrize("plain", [True, False])
def test_plain_replays_copy_images_and_labels_alone(cuda: FakeCuda, plain: bool) -> None:
    options: dict[str, Any] = {"infobatch": None} if plain else {}
    eager, step = make_step(**options), make_step(**options)
    captured = GraphStep(step)
    for seed in range(WARM_UP):
        eager(*make_batch(seed), 0.01, 0.9)
        captured(*make_batch(seed), 0.01, 0.9)
    captured.capture()
    (static,) = captured._static.values()
    for tensor in static:
        tensor.fill_(-1)
    images, labels, batch = make_batch(WARM_UP)
    eager(images, labels, batch, 0.01, 0.9)
    captured(images, labels, batch, 0.01, 0.9)
    copied = [torch.equal(*pair) for pair in zip(static, (images, labels, *batch), strict=True)]
    assert copied == [True, True, not plain, not plain]
    assert_same(*(list(one.model.state_dict().values()) for one in (eager, step)))


def test_odd_sizes_stay_eager(cuda: FakeCuda) -> None:
    eager, step = make_step(), make_step()
    captured = GraphStep(step)
    for size, pixels in ((16, 32), (16, 24), (5, 32), (9, 32)):
        for seed in range(WARM_UP + 2):
            images, labels, batch = make_batch(seed, size)
            images = images[:, :, :pixels, :pixels]
            captured.capture()
            eager(images, labels, batch, 0.01, 0.9)
            captured(images, labels, batch, 0.01, 0.9)
    assert [made.replays for made in cuda.graphs] == [2] * MOST
    assert_same(everything(eager), everything(step))
    assert gc.isenabled()


def test_nothing_is_captured_in_an_epoch_or_of_a_size_that_came_once(cuda: FakeCuda) -> None:
    captured = GraphStep(make_step())
    for size in range(16, 16 + 2 * WARM_UP):
        captured.capture()
        captured(*make_batch(0, size), 0.01, 0.9)
    for seed in range(2 * WARM_UP):
        captured(*make_batch(seed), 0.01, 0.9)
    assert cuda.graphs == []
    assert not captured.captured


def test_a_capture_that_fails_is_told_and_nothing_is_lost(cuda: FakeCuda) -> None:
    cuda.fails = KeyError("operation not permitted\n when stream is capturing")
    said: list[str] = []
    eager, step = make_step(), make_step()
    assert step.infobatch is not None
    captured = GraphStep(step, said.append)
    for seed in range(2 * WARM_UP):
        eager(*make_batch(seed), 0.01, 0.9)
        captured.capture()
        captured(*make_batch(seed), 0.01, 0.9)
    assert cuda.told[-1] == "the stream before"
    assert gc.isenabled()
    (line,) = said
    assert line.startswith("WARNING: no CUDA graph")
    assert "when stream is capturing" in line
    assert len(cuda.graphs) == 1
    assert not captured.captured
    assert step.infobatch.recorded == 2 * WARM_UP * 16
    assert_same(everything(eager), everything(step))
    fatal = GraphStep(step)
    fatal(*make_batch(0), 0.01, 0.9)  # its shape had its warm-up
    with pytest.raises(RuntimeError, match="previous error during capture"):
        fatal.capture()


def test_what_waits_for_the_collector_is_released_before_the_device_rests(cuda: FakeCuda) -> None:
    """A batch of DALI's that is let go sets a thread to wait for the device: never in a capture."""

    class Released:
        def __init__(self) -> None:
            self.cycle = self

        def __del__(self) -> None:
            cuda.told.append("released")

    captured = GraphStep(make_step())
    for seed in range(WARM_UP):
        captured(*make_batch(seed), 0.01, 0.9)
    gc.collect()
    gc.disable()  # so that it is the capture that finds it
    try:
        Released()
        captured.capture()
    finally:
        gc.enable()
    assert cuda.told[:3] == ["released", "synchronize", "rest"]


def test_an_obstacle_is_no_silent_fallback() -> None:
    with pytest.raises(ValueError, match=r"^step must be one .*: CUDA graphs need a CUDA device$"):
        GraphStep(make_step())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_that_holds_numbers_cannot_be_captured(name: str) -> None:
    class OnCuda:
        device = torch.device("cuda")

    step: Any = make_step(name)
    step.found_inf = OnCuda()
    assert (obstacle(step) is None) == (name in ("lars", "lamb"))
