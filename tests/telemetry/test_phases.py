"""Phases by a clock that the tests move, and histograms of scores."""

import time

import numpy as np
import pytest
import torch

from infobatch_fast.telemetry import phases as telemetry
from infobatch_fast.telemetry.phases import SCORE_BINS, Phases, peak_memory, score_histogram
from infobatch_fast.telemetry.syncs import host_syncs

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 50.0

    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_every_moment_belongs_to_the_innermost_phase(clock) -> None:
    phases = Phases(CPU)
    phases.read()
    clock.now += 1  # other
    with phases("step"):
        clock.now += 10
        with phases("update"):
            clock.now += 100
        clock.now += 20
        with phases("update"):
            clock.now += 200
    clock.now += 2
    with phases("choose"):
        clock.now += 1000
    assert phases.read() == {"other": 3, "step": 30, "update": 300, "choose": 1000}
    clock.now += 5
    assert phases.read() == {"other": 5}


def test_a_reading_within_a_phase_and_before_the_first(clock) -> None:
    phases = Phases(CPU)
    clock.now += 7  # it begins with the first phase
    with phases("checkpoint"):
        clock.now += 1
        assert phases.read() == {"checkpoint": 1}
        clock.now += 2
    assert phases.read() == {"checkpoint": 2, "other": 0}


def test_a_phase_ends_with_an_exception(clock) -> None:
    phases = Phases(CPU)

    def fail() -> None:
        with phases("step"), phases("update"):
            clock.now += 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock.now += 4
    assert phases.read() == {"step": 0, "update": 1, "other": 4}


def test_each_counts_the_waiting_and_not_the_work(clock) -> None:
    phases = Phases(CPU)

    def items():
        for number in range(3):
            clock.now += 10
            yield number
        clock.now += 1

    seen = []
    for number in phases.each("wait", items()):
        seen.append(number)
        clock.now += 100
    assert seen == [0, 1, 2]
    assert phases.read() == {"wait": 31, "other": 300}


def test_disabled_measures_nothing(clock) -> None:
    phases = Phases(CPU, enabled=False)
    with phases("step"):
        clock.now += 1
    assert list(phases.each("wait", [1, 2])) == [1, 2]
    assert phases.read() == {}


class FakeEvent:
    """A CUDA event of a device whose time the test moves; it is over once the device has passed."""

    device_time = 0.0
    passed = -1.0
    made = 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        FakeEvent.made += 1

    def record(self) -> None:
        self.at = FakeEvent.device_time

    def synchronize(self) -> None:
        FakeEvent.passed = max(FakeEvent.passed, self.at)

    def elapsed_time(self, end: "FakeEvent") -> float:
        assert max(self.at, end.at) <= FakeEvent.passed
        return 1000 * (end.at - self.at)


def test_cuda_events_are_waited_for_at_the_end_alone(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "passed", -1.0)
    monkeypatch.setattr(FakeEvent, "made", 0)
    phases = Phases(torch.device("cuda"))
    for _ in range(100):
        with phases("step"):
            FakeEvent.device_time += 2
            with phases("update"):
                FakeEvent.device_time += 1
    assert FakeEvent.passed == -1.0  # no one has waited
    assert phases.read() == {"step": 200.0, "update": 100.0, "other": 0.0}
    FakeEvent.device_time += 8
    assert phases.read() == {"other": 8.0}
    assert FakeEvent.made == 401  # and used anew


def test_histogram_against_numpy() -> None:
    scores = np.random.default_rng(0).lognormal(0, 2, 5000).astype(np.float32)
    scores[:4] = [np.nan, 0.0, 0.01, 100.0]
    before = scores.copy()
    histogram = score_histogram(torch.from_numpy(scores))
    assert (histogram["low"], histogram["high"], histogram["unseen"]) == (0.01, 100.0, 1)
    expected, _ = np.histogram(scores[1:], np.geomspace(0.01, 100, SCORE_BINS + 1))
    below, *inside, above = histogram["counts"]
    assert (below, above) == ((scores < np.float32(0.01)).sum(), (scores >= 100).sum())
    assert np.abs(np.array(inside) - expected).sum() <= 5  # at the edges
    assert below + sum(inside) + above == 4999
    assert np.array_equal(scores, before, equal_nan=True)


def test_peak_memory_of_the_process() -> None:
    assert 50e6 < peak_memory(CPU) < 1e12


@pytest.mark.gpu
def test_phases_on_cuda_are_of_the_device() -> None:
    phases = Phases(torch.device("cuda"))
    torch.cuda._sleep(1_000_000_000)  # cycles, half a second: an idle card's clock still rises
    torch.cuda.synchronize()
    phases.read()
    start = time.perf_counter()
    with host_syncs(torch.device("cuda"), "forbid"):
        for _ in range(10):
            with phases("step"):
                torch.cuda._sleep(20_000_000)
                with phases("update"):
                    torch.cuda._sleep(10_000_000)
    torch.cuda.synchronize()
    total = time.perf_counter() - start
    seconds = phases.read()
    assert seconds["step"] == pytest.approx(2 * seconds["update"], rel=0.05)
    assert sum(seconds.values()) == pytest.approx(total, rel=0.02)


@pytest.mark.gpu
def test_histogram_on_cuda() -> None:
    scores = torch.rand(10_000) * 20
    assert score_histogram(scores.cuda())["unseen"] == 0
    ours, theirs = score_histogram(scores)["counts"], score_histogram(scores.cuda())["counts"]
    assert sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 8  # at the edges
