"""Benchmarks in a report: units, marks, and headings that differ."""

import os
from pathlib import Path
from typing import TypeVar

import pytest
from report_made import write_lines

from infobatch_fast.report.benchmarks import benchmark_tables
from infobatch_fast.report.page import Heading, Table, Text
from infobatch_fast.report.read import read

Kind = TypeVar("Kind", Heading, Table, Text)


def blocks(path: Path, kind: type[Kind]) -> list[Kind]:
    return [b for b in benchmark_tables(read([path]).benchmarks) if isinstance(b, kind)]


def headings(path):
    return [heading.text for heading in blocks(path, Heading)]


def table(path, *more, case=None):
    rows = [{"more": of, "case": case or {}} for of in more]
    (found,) = blocks(write_lines(path / "a.jsonl", rows), Table)
    return found


@pytest.mark.parametrize(
    ("name", "value", "head", "cell"),
    [
        ("compute_limit_percent", 41.234, "compute limit (%)", "41.2"),
        ("choose_s", 0.00103, "choose (ms)", "1.03"),
        ("host_seconds", 1.25e-5, "host (us)", "12.5"),
        ("low_seconds", -2.5, "low (s)", "-2.50"),
        ("image_bytes", 3072, "image (bytes)", "3,072"),
        ("resident_images/s", 1234.5, "resident (images/s)", "1,234"),
        ("image_FLOP", 7.78e9, "image (FLOP)", "7,780,000,000"),
        ("pass_images", 8192, "pass (images)", "8,192"),
        ("group_steps", 2, "group (steps)", "2"),
        ("host_syncs", 1, "host syncs", "1"),
        ("update_wall_inside", False, "update wall inside", "no"),
        ("note", "best", "note", "best"),
        ("low", None, "low", "–"),
        ("percent", 3.0, "percent", "3.00"),
        ("low_seconds", None, "low (s)", "–"),
    ],
)
def test_heads_with_units(tmp_path, name, value, head, cell):
    found = table(tmp_path, {name: value})
    assert found.headers == ["median [p20, p80]", "count", head]
    assert found.rows == [["2.00 ms [1.50 ms, 2.50 ms]", "100", cell]]


def test_the_times_of_a_table_have_one_unit(tmp_path):
    found = table(
        tmp_path,
        {"low_seconds": -0.0004, "high_seconds": 1.5, "low_percent": 1.0},
        {"low_seconds": 0.002, "high_seconds": 0.003},
        case={"batch_size": 200},
    )
    heads = ["batch size", "median [p20, p80]", "count", "low (ms)", "high (ms)", "low (%)"]
    assert found.headers == heads
    assert [row[3:] for row in found.rows] == [["-0.400", "1,500", "1.00"], ["2.00", "3.00", "–"]]


def test_an_interval_is_explained_where_there_is_one(tmp_path):
    said = "the 95% interval from low to high, of the median of paired differences"
    path = write_lines(
        tmp_path / "a.jsonl",
        [{"more": {"low_percent": -0.5, "high_percent": 1.5}}, {"part": "b", "more": {"low_s": 1}}],
    )
    with_interval, without = blocks(path, Text)
    assert said in with_interval.text
    assert said not in without.text


def test_a_benchmark_that_was_stopped(tmp_path):
    path = write_lines(
        tmp_path / "a.jsonl", [{}, {"complete": False}, {"part": "update"}], quick=True
    )
    assert headings(path) == [
        "overhead: choose (QUICK RUN: too short to quote; STOPPED MIDWAY)",
        "overhead: update (QUICK RUN: too short to quote)",
    ]


def test_a_damaged_file(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{}, {}])
    path.write_text(path.read_text()[:-9])
    assert headings(path) == ["overhead: choose (FILE DAMAGED)"]


@pytest.mark.parametrize(
    ("row", "mark"),
    [
        ({"options": {"load_average": 4.5, "cores": 4}}, "4.50, above its 4 cores"),
        ({"options": {"load_average": 4.0, "cores": 4}}, None),
        ({"options": {"load_average": "4.5", "cores": 4}}, None),
        ({"options": {"cores": 2}, "more": {"load_average": 2.1}}, "2.10, above its 2 cores"),
        (
            {"options": {"load_average": 1e6}},
            f"1,000,000, above this machine's {os.cpu_count()} cores",
        ),
        ({"options": {"load_average": 0.5}}, None),
    ],
)
def test_a_busy_machine(tmp_path, row, mark):
    path = write_lines(tmp_path / "a.jsonl", [row])
    said = f" (BUSY MACHINE: load average {mark})" if mark else ""
    assert headings(path) == [f"overhead: choose{said}"]


def test_two_benchmarks_of_one_kind_have_different_headings(tmp_path):
    for folder in ("first", "second"):
        write_lines(tmp_path / folder / "overhead.jsonl", [{}])
    write_lines(tmp_path / "first" / "zero.jsonl", [{"benchmark": "throughput"}])
    assert headings(tmp_path) == [
        "overhead: choose, first/overhead.jsonl",
        "throughput: choose",
        "overhead: choose, second/overhead.jsonl",
    ]
    assert ["file first/zero.jsonl;" in text.text for text in blocks(tmp_path, Text)] == [
        False,
        True,
        False,
    ]
