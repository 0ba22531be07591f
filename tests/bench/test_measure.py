"""Interleaved timing by a clock that the tests move, intervals by hand, a benchmark's lines."""

import json
import math
import os
import statistics
from pathlib import Path

import harness as measure
import numpy as np
import pytest
import torch

from infobatch_fast.errors import UserError
from infobatch_fast.train.folder import source_hash

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what is added to it."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(measure.time, "perf_counter", lambda: Clock.now)
    return Clock


def test_interleave_calls_each_side_once_a_round(clock) -> None:
    calls: list[str] = []

    def side(name: str, seconds: float):
        def call() -> None:
            calls.append(name)
            clock.now += seconds

        return call

    shares: list[float] = []
    values = measure.interleave(
        {"a": side("a", 1.0), "b": side("b", 3.0), "c": side("c", 0.0)},
        CPU,
        seconds=38.0,
        rounds=(2, 100),
        warmup=1,
        after_round=shares.append,
    )
    # A round takes 4 s and the warm-up is not in the 38: the tenth round begins at 36.
    assert values == {"a": [1.0] * 10, "b": [3.0] * 10, "c": [0.0] * 10}
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 11
    assert all(sorted(round_) == ["a", "b", "c"] for round_ in rounds)
    assert len(set(rounds[1:])) > 2  # not always in the same order
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] <= 1


def test_interleave_at_least_and_at_most(clock) -> None:
    def call() -> None:
        clock.now += 10.0

    assert measure.interleave({"a": call}, CPU, seconds=0, rounds=(5, 9)) == {"a": [10.0] * 5}
    assert measure.interleave({"a": call}, CPU, seconds=1e9, rounds=(5, 9)) == {"a": [10.0] * 9}


def test_interleave_takes_a_timer() -> None:
    values = measure.interleave(
        {"a": lambda: "x"},
        CPU,
        seconds=0,
        rounds=(2, 2),
        timer=lambda call, device: len(str(call())),
    )
    assert values == {"a": [1, 1]}


def test_spread_against_numpy() -> None:
    values = list(np.random.default_rng(0).lognormal(size=37))
    result = measure.spread(values)
    assert result["count"] == 37
    for name, share in (("p20", 0.2), ("median", 0.5), ("p80", 0.8)):
        assert result[name] == pytest.approx(np.quantile(values, share))
    assert measure.spread([2.0]) == {"median": 2.0, "p20": 2.0, "p80": 2.0, "count": 1}


def test_rates() -> None:
    assert measure.rates([1.0, 2.0, 4.0], 8) == {
        "median": 4.0,
        "p20": pytest.approx(2.8),
        "p80": pytest.approx(6.4),
        "count": 3,
    }


def test_difference_is_of_pairs() -> None:
    # Both sides drift by far more than the difference: the pairs do not.
    drift = [100.0 * i for i in range(8)]
    extra = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    result = measure.difference([d + e for d, e in zip(drift, extra, strict=True)], drift)
    # Of 8 fair coins at most none falls on one side with 1/256, at most one with 9/256 > 2.5%.
    assert result == {"median": 4.5, "low": 1.0, "high": 8.0}
    nine = measure.difference([*extra, 9.0], [0.0] * 9)
    assert nine == {"median": 5.0, "low": 2.0, "high": 8.0}  # 10/512 < 2.5%


def test_difference_of_few_pairs_has_no_interval() -> None:
    five = measure.difference([2.0] * 5, [1.0] * 5)
    assert five == {"median": 1.0, "low": -math.inf, "high": math.inf}
    assert measure.difference([2.0] * 6, [1.0] * 6) == {"median": 1.0, "low": 1.0, "high": 1.0}


def test_difference_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        noise = generator.exponential(size=40)  # skewed: its median is log 2
        result = measure.difference(list(noise + 5.0), [5.0] * 40)
        hits += result["low"] <= math.log(2) <= result["high"]
    assert hits >= 0.95 * 400 - 2.5 * math.sqrt(400 * 0.95 * 0.05)
    assert hits < 400  # an interval that is never wrong is too wide


def test_wall_and_on_device_time_the_call(clock) -> None:
    def call() -> None:
        clock.now += 0.25

    assert measure.wall(call, CPU) == 0.25
    assert measure.on_device(call, CPU) == 0.25


def test_limits_count_bytes_and_flops(monkeypatch) -> None:
    took = {"copy_bytes_per_second": [4.0, 2.0], "matmul_flops_per_second": [1.0, 0.5]}

    def interleave(sides, device, **options):
        (name,) = sides
        sides[name]()
        return {name: took[name]}

    monkeypatch.setattr(measure, "interleave", interleave)
    # The best of the repetitions: 2 x 256 MiB in 2 s, 2 x 2048^3 in half a second.
    assert measure.limits(CPU, torch.float32) == {
        "copy_bytes_per_second": 2.0**28,
        "matmul_flops_per_second": 4.0 * 2048**3,
    }


def test_lines(tmp_path) -> None:
    path = tmp_path / "new" / "overhead.jsonl"
    lines = measure.Lines(path, "overhead", CPU, {"ratio": 0.5}, quick=True)
    assert path.read_text() == ""
    figures = measure.spread([1.0, 2.0, 3.0])
    returned = lines.add("choose", {"samples": 50}, "s", figures, {"gb_per_s": math.inf, "x": 2.0})
    assert measure.read_lines(path) == [returned]
    lines.add_absent("choose", {"samples": 60}, "no room")
    first, second = measure.read_lines(path)
    assert list(first) == list(measure.LINE)
    assert first["benchmark"] == "overhead"
    assert first["part"] == "choose"
    assert first["case"] == {"samples": 50}
    assert (first["unit"], first["median"], first["count"]) == ("s", 2.0, 3)
    assert first["more"] == {"gb_per_s": None, "x": 2.0}
    assert first["absent"] is None
    assert first["quick"] is True
    assert first["complete"] is second["complete"] is False
    lines.finish()
    assert [line["complete"] for line in measure.read_lines(path)] == [True, True]
    assert first["options"] == {"ratio": 0.5}
    assert first["source_hash"] == source_hash()
    assert first["device"]["type"] == "cpu"
    assert first["packages"]["torch"] == torch.__version__.split("+")[0]
    assert first["started"].endswith("+00:00")
    assert second["absent"] == "no room"
    assert {second[name] for name in ("unit", "median", "p20", "p80", "count")} == {None}
    assert os.listdir(path.parent) == ["overhead.jsonl"]


def test_lines_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"^cannot make the folder .*file/x"):
        measure.Lines(tmp_path / "file" / "x" / "a.jsonl", "overhead", CPU, {}, quick=False)


@pytest.mark.parametrize("content", ["{", "[]", '{"benchmark": "x"}', "\x00"])
def test_read_lines_names_the_broken_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.jsonl"
    measure.Lines(path, "overhead", CPU, {}, quick=False).add_absent("a", {}, "why")
    with open(path, "a") as file:
        file.write(content + "\n")
    with pytest.raises(UserError, match=rf"^line 2 of {path} is no benchmark's line$"):
        measure.read_lines(path)


def test_read_lines_of_what_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\xff")
    for path in (tmp_path / "a.jsonl", tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(UserError, match=r"^cannot read "):
            measure.read_lines(path)


@pytest.mark.gpu
def test_on_device_leaves_the_launches_out() -> None:
    device = torch.device("cuda")
    tiny = torch.zeros(1, device=device)

    def call() -> None:
        for _ in range(20):
            tiny.add_(1)

    for _ in range(3):
        call()
    device_seconds = statistics.median(measure.on_device(call, device) for _ in range(10))
    cycles = 100_000_000
    waited = measure.wall(lambda: torch.cuda._sleep(cycles), device)
    assert 0 < device_seconds < 1e-3
    assert waited > 0.02
    assert waited == pytest.approx(
        measure.on_device(lambda: torch.cuda._sleep(cycles), device), rel=0.2
    )


def test_json_has_no_infinity(tmp_path) -> None:
    path = tmp_path / "a.jsonl"
    lines = measure.Lines(path, "overhead", CPU, {}, quick=False)
    lines.add("a", {}, "s", {"median": math.inf, "p20": math.nan, "p80": 1.0, "count": 1})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    (line,) = (json.loads(row, parse_constant=refuse) for row in path.read_text().splitlines())
    assert line["median"] is None
    assert line["p20"] is None
