"""Interleaved timing by a clock that the tests move, intervals by hand, and what a run leaves."""

import dataclasses
import json
import math
import os
import signal
from functools import partial

import harness
import kernels_bench
import numpy as np
import overhead
import pytest
import throughput
import torch
from harness import Absent, Bench, Options, Side

from infobatch_fast.errors import UserError
from infobatch_fast.report.lines import Line, read_lines
from infobatch_fast.train.folder import source_hash

CPU = torch.device("cpu")
TITLES = {"steps": "Steps", "rates": "Rates"}
ASKED = {"load_average": 0.0, "cores": 2}


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for what is added to it."""

    class Clock:
        now = 100.0

    monkeypatch.setattr(harness.time, "perf_counter", lambda: Clock.now)
    return Clock


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path / "a_bench.jsonl", CPU, ASKED, quick=False)


def lasting(clock, *seconds: float, **of) -> Side:
    """A side whose calls take these seconds in turn."""
    turns = iter(seconds * 100)

    def call() -> None:
        clock.now += next(turns)

    return Side(call, **of)


def test_each_side_is_called_once_a_round_in_an_order_drawn_anew(clock):
    calls, shares = [], []

    def timed(name, seconds):
        calls.append(name)
        clock.now += seconds
        return seconds

    took = {"a": 1.0, "b": 3.0, "c": 0.0}
    sides = {name: partial(timed, name, took[name]) for name in took}
    values = harness.interleave(sides, seconds=38.0, rounds=(2, 100), after_round=shares.append)
    # A round takes 4 s and the warm-up is not in the 38: the tenth round begins at 36.
    assert values == {"a": [1.0] * 10, "b": [3.0] * 10, "c": [0.0] * 10}
    rounds = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 11
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len(set(rounds[1:])) > 2
    assert shares == sorted(shares)
    assert 0 < shares[0] < shares[-1] <= 1


@pytest.mark.parametrize(("seconds", "count"), [(0, 5), (1e9, 9)])
def test_rounds_at_least_and_at_most(clock, seconds, count):
    call = partial(harness.wall, lasting(clock, 10.0).call, CPU)
    values = harness.interleave({"a": call}, seconds=seconds, rounds=(5, 9))
    assert values == {"a": [10.0] * count}


def test_difference_is_of_pairs():
    # Both sides drift by far more than the difference: the pairs do not.
    drift = [100.0 * i for i in range(8)]
    result = harness.difference([d + e for d, e in zip(drift, range(1, 9), strict=True)], drift)
    # Of 8 fair coins at most none falls on one side with 1/256, at most one with 9/256 > 2.5%.
    assert result == {"median": 4.5, "low": 1.0, "high": 8.0}
    nine = harness.difference(range(1, 10), [0.0] * 9)
    assert nine == {"median": 5.0, "low": 2.0, "high": 8.0}  # 10/512 < 2.5%
    few = harness.difference([2.0] * 5, [1.0] * 5)
    assert few == {"median": 1.0, "low": -math.inf, "high": math.inf}


def test_difference_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(1)
    hits = 0
    for _ in range(400):
        noise = generator.exponential(size=40)  # skewed: its median is log 2
        result = harness.difference(list(noise + 5.0), [5.0] * 40)
        hits += result["low"] <= math.log(2) <= result["high"]
    assert hits >= 0.95 * 400 - 2.5 * math.sqrt(400 * 0.95 * 0.05)
    assert hits < 400  # an interval that is never wrong is too wide


def test_rows_of_a_comparison(clock, bench):
    """Seconds of a repetition, rates, shares of the limits, and who is absent and why."""
    bench.limits = {"copy": 1000.0, torch.float32: 4e12}

    def refuse() -> Side:
        raise Absent("not here")

    def fails() -> None:
        raise ValueError("of its own")

    sides = {
        "a": lambda: lasting(clock, 8.0, repetitions=4, moved=100, more={"note": "x"}),
        "b": lambda: lasting(clock, 2.0, images=10, flop=4e12),
        "c": refuse,
        "d": lambda: Side(fails),
    }
    took = bench.compare("steps", {"samples": 50}, sides, seconds=(0, 0))
    assert took == {"a": [2.0] * 5, "b": [2.0] * 5}
    a, b, c, d = read_lines(bench.path, Line)[0]
    assert a.case == {"samples": 50, "side": "a"}
    assert (a.unit, a.median, a.p20, a.p80, a.count) == ("s", 2.0, 2.0, 2.0, 5)
    assert a.more["copy_limit_percent"] == pytest.approx(5.0)  # 100 B in 2 s of 1000 B/s
    assert a.more["note"] == "x"
    assert (b.unit, b.median) == ("images/s", 5.0)
    assert b.more["TFLOP/s"] == pytest.approx(2.0)
    assert b.more["compute_limit_percent"] == pytest.approx(50.0)
    assert (c.absent, c.median, c.unit) == ("not here", None, None)
    assert d.absent == "failed: ValueError: of its own"


def test_a_pair_has_its_difference(clock, bench):
    sides = {
        "with": lambda: lasting(clock, 3.0, 13.0, 23.0),  # both drift
        "without": lambda: lasting(clock, 2.0, 12.0, 22.0),
    }
    bench.compare_pair("steps", {}, sides, seconds=(0, 0), rounds=9)
    line = bench.find("steps", side="difference")
    assert line is not None
    assert (line.median, line.count) == (1.0, 9)
    assert line.more["low_seconds"] == line.more["high_seconds"] == pytest.approx(1.0)
    assert line.more["median_percent"] == pytest.approx(100 / 12)
    bench.compare_pair("rates", {}, {"with": sides["with"], "without": lambda: 1 / 0})  # type: ignore[dict-item]
    assert bench.find("rates", side="difference") is None
    assert bench.lines[-1].absent == "with or without is absent"


def test_lines_are_whole_and_say_what_of(bench):
    assert bench.path.read_text() == ""
    bench.add("steps", {"samples": 50}, "s", harness.spread([1.0, 2.0, 3.0]), {"x": math.inf})
    bench.add_absent("steps", {"samples": 60}, "no room")
    assert read_lines(bench.path, Line)[0] == bench.lines
    first, second = bench.lines
    assert (first.benchmark, first.part, first.more) == ("a", "steps", {"x": None})
    assert second.absent == "no room"
    assert first.source_hash == source_hash()
    assert first.packages["torch"] == torch.__version__.split("+")[0]
    assert not first.complete
    bench.finish()
    assert [line.complete for line in read_lines(bench.path, Line)[0]] == [True, True]
    assert os.listdir(bench.path.parent) == ["a_bench.jsonl"]

    def refuse(constant: str) -> None:  # JSON has no infinity
        raise AssertionError(constant)

    for row in bench.path.read_text().splitlines():
        assert json.loads(row, parse_constant=refuse).keys() == {
            field.name for field in dataclasses.fields(Line)
        }


def test_a_table_has_every_figure_and_tells_what_is_absent(clock, bench):
    for samples in (1000, 2000):
        sides = {"a": partial(lasting, clock, samples / 1000), "b": lambda: 1 / 0}
        bench.compare("steps", {"samples": samples}, sides, seconds=(0, 0))  # type: ignore[arg-type]
    for side in "abcde":
        bench.add("rates", {"model": "r50", "side": side}, "images/s", {"median": ord(side)})
    text = harness.tables(bench.lines, TITLES)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text if "|" in line]
    assert ["samples", "a"] in rows
    assert ["1,000", "1.00 s"] in rows
    assert ["2,000", "2.00 s"] in rows
    assert ["", "model r50"] in rows  # five sides: a row each
    assert ["e", "101 images/s"] in rows
    assert any("b, 2 rows" in line and "division by zero" in line for line in text)


def measure(bench: Bench, options: Options, stop: int | None = None) -> None:
    bench.compare("steps", {"samples": 5}, {"a": lambda: Side(lambda: None)}, seconds=(0, 0))
    if stop is not None:
        os.kill(os.getpid(), stop)
    bench.compare("rates", {}, {"a": lambda: Side(lambda: None, images=5)}, seconds=(0, 0))


def run(tmp_path, *words, stop=None) -> int:
    return harness.main(
        Options, "some", partial(measure, stop=stop), TITLES, ["--out", str(tmp_path), *words]
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_keeps_the_rows_and_draws_them(tmp_path, capsys, number):
    assert run(tmp_path, "--device", "cpu", stop=number) == 128 + number
    (line,) = read_lines(tmp_path / "some.jsonl", Line)[0]
    assert (line.part, line.complete) == ("steps", False)
    assert (tmp_path / "some.png").stat().st_size > 1000
    assert "1 rows are kept" in capsys.readouterr().err


def test_a_run_leaves_lines_and_a_plot_and_no_other_run_may_overwrite_them(tmp_path, capsys):
    assert run(tmp_path, "--quick", "--seed", "3") == 0
    lines = read_lines(tmp_path / "some.jsonl", Line)[0]
    assert [line.part for line in lines] == ["steps", "rates"]
    assert all(line.complete and line.quick for line in lines)
    assert lines[0].options["seed"] == 3
    assert "out" not in lines[0].options
    assert "too short to quote" in capsys.readouterr().out
    assert run(tmp_path) == 2
    assert "some." in capsys.readouterr().err  # what is in the way
    assert read_lines(tmp_path / "some.jsonl", Line)[0] == lines


def test_a_mistake_that_is_found_before_the_first_row_leaves_nothing(tmp_path):
    def measure(bench: Bench, options: Options) -> None:
        raise UserError("sizes must be fewer than the images, got 9")

    assert harness.main(Options, "some", measure, TITLES, ["--out", str(tmp_path / "new")]) == 2
    assert not (tmp_path / "new").exists()


MISTAKES = [
    (overhead, "--batch-size 0", "batch_size", "0"),
    (overhead, "--sizes 399", "sizes", "399"),
    (overhead, "--model r99", "model", "r99"),
    (overhead, "--seed -1", "seed", "-1"),
    (overhead, "--sizes many", "sizes", "many"),
    (throughput, "--workers 0", "workers", "0"),
    (throughput, "--files -1", "files", "-1"),
    (throughput, "--batch-sizes 8 -1", "batch_sizes", "-1"),
    (throughput, "--forms fast", "forms", "fast"),
    (throughput, "--models --batch-sizes --files 0", "files", "0"),
    (kernels_bench, "--sizes 999", "sizes", "999"),
    (kernels_bench, "--device tpu", "device", "tpu"),
    (kernels_bench, "--siezs 5", "siezs", ""),
]


@pytest.mark.parametrize(("script", "words", "name", "value"), MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(script, words, name, value, tmp_path, capsys):
    assert script.run([*words.split(), "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert name in error.replace("-", "_")
    assert value in error
    assert not (tmp_path / "new").exists()
