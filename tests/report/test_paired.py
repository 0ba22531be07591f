"""What a training cost and saved, against figures worked out by hand."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from report_made import FULL, GPU, write_run

from infobatch_fast.report.page import Table
from infobatch_fast.report.paired import (
    Paired,
    against_full,
    against_shorter,
    by_budget,
    quantile,
    seeds_needed,
    trainings,
)
from infobatch_fast.report.read import read
from infobatch_fast.report.runs import sections
from infobatch_fast.report.tables import budget_table


@pytest.mark.parametrize(
    ("freedom", "value"),  # of a printed table of Student's t
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)],
)
def test_quantile(freedom: int, value: float) -> None:
    assert quantile(freedom) == pytest.approx(value, abs=5e-4)


@pytest.mark.parametrize(
    ("deviation", "seeds"),
    # 2.447 * 0.2 / sqrt(7) = 0.185, but 2.571 * 0.2 / sqrt(6) = 0.210; 3.182 * 0.1 / 2 = 0.159.
    [(0.0, 2), (0.1, 4), (0.2, 7), (1.0, 99)],
)
def test_seeds_needed(deviation: float, seeds: int) -> None:
    assert seeds_needed(deviation) == seeds
    assert seeds_needed(deviation, least=200) == 200
    half = quantile(seeds - 1) * deviation / math.sqrt(seeds)
    assert half <= 0.2


def lossy(tmp_path: Path, mine: Sequence[float], theirs: Sequence[float], **about: object) -> None:
    for seed, accuracy in enumerate(mine):
        write_run(tmp_path / f"mine{seed}", {"seed": seed}, accuracy=accuracy, **about)  # pyright: ignore[reportArgumentType]
    for seed, accuracy in enumerate(theirs):
        write_run(tmp_path / f"full{seed}", {"seed": seed, **FULL}, accuracy=accuracy)


def compared(tmp_path: Path) -> tuple[Paired | None, Paired | None]:
    """The one pruned training of the one section, against full data and training shorter."""
    (section,) = sections(read([tmp_path]).runs)
    rows = trainings(section)
    (pruned,) = [row for row in rows if not row.pruning.full_data]
    return against_full(pruned, rows), against_shorter(pruned, rows)


@pytest.mark.parametrize(
    ("mine", "points", "half", "verdict", "more"),
    [
        # -2, -3, -1: deviation 1, half 4.303 / sqrt(3)
        ([0.80, 0.79, 0.81], -2.0, 2.484, "undecided", 96),
        # -2, -2.1, -1.9: deviation 0.1
        ([0.80, 0.799, 0.801], -2.0, 0.248, "lower", 1),
        ([0.84, 0.839, 0.841], 2.0, 0.248, "higher", 1),
        # 0.05, -0.05, 0.05, -0.05: deviation 0.0577, half 3.182 * 0.0577 / 2
        ([0.8205, 0.8195, 0.8205, 0.8195], 0.0, 0.0919, "equal", 0),
        # -1, 0: deviation 0.7071, half 12.706 * 0.7071 / sqrt(2)
        ([0.81, 0.82], -0.5, 6.353, "undecided", None),
    ],
)
def test_differences(
    tmp_path: Path, mine: list[float], points: float, half: float, verdict: str, more: int | None
) -> None:
    lossy(tmp_path, mine, [0.82] * len(mine))
    full, shorter = compared(tmp_path)
    assert full is not None
    assert shorter is None
    assert full.mean == pytest.approx(points)
    assert full.half == pytest.approx(half, abs=2e-3)
    assert full.verdict == verdict
    if more is not None:
        assert full.more == more
    # Three of four epochs keep 800 of 1000, in that share of the time.
    assert full.saved == pytest.approx(0.15)
    assert full.time == pytest.approx(0.15)


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    lossy(tmp_path, [0.80], [0.82])
    full, _ = compared(tmp_path)
    assert full is not None
    assert (full.half, full.more, full.verdict) == (None, None, "undecided")
    assert full.mean == pytest.approx(-2.0)


def test_only_equal_seeds_are_paired(tmp_path: Path) -> None:
    lossy(tmp_path, [0.80, 0.70, 0.70], [0.82])
    full, _ = compared(tmp_path)
    assert full is not None
    assert dict(full.points) == {0: pytest.approx(-2.0)}


def test_one_seed_run_twice_counts_once(tmp_path: Path) -> None:
    lossy(tmp_path, [0.80, 0.81], [0.82, 0.82])
    write_run(tmp_path / "again", {"seed": 0}, accuracy=0.78)
    full, _ = compared(tmp_path)
    assert full is not None
    assert dict(full.points) == {0: pytest.approx(-3.0), 1: pytest.approx(-1.0)}


def test_no_time_across_devices_nor_from_a_watched_run(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"seed": 0})
    write_run(tmp_path / "b", {"seed": 0, **FULL}, device=GPU)
    write_run(tmp_path / "c", {"seed": 1, "host_syncs": "count"})
    write_run(tmp_path / "d", {"seed": 1, **FULL})
    full, _ = compared(tmp_path)
    assert full is not None
    assert len(full.points) == 2
    assert full.time is None


def test_time_is_the_median_over_seeds(tmp_path: Path) -> None:
    """A busy machine makes one of three seeds take ten times as long."""
    for seed, busy in enumerate((1, 10, 1)):
        write_run(tmp_path / f"mine{seed}", {"seed": seed}, epoch_seconds=60.0 * busy)
        write_run(tmp_path / f"full{seed}", {"seed": seed, **FULL})
    full, _ = compared(tmp_path)
    assert full is not None
    assert full.time == pytest.approx(0.15)
    assert full.times.min() == pytest.approx(1 - 8.5)


def test_training_shorter_is_the_nearest_within_an_epoch(tmp_path: Path) -> None:
    lossy(tmp_path, [0.80, 0.80, 0.80], [])  # 3,400 samples each
    write_run(tmp_path / "one", {"epochs": 1, "seed": 0, **FULL}, accuracy=0.5)
    write_run(tmp_path / "three", {"epochs": 3, "seed": 0, **FULL}, accuracy=0.79)
    write_run(tmp_path / "two", {"epochs": 2, "seed": 1, **FULL}, accuracy=0.5)
    full, shorter = compared(tmp_path)
    assert full is None
    assert shorter is not None
    assert dict(shorter.points) == {0: pytest.approx(1.0)}
    assert "3 epochs" in shorter.against
    assert shorter.saved == pytest.approx(1 - 3.4 / 3)


@pytest.mark.parametrize(
    ("epochs", "rivals", "full", "shorter"),
    [
        # 1,000 + 640 for each epoch that prunes: the first and the last eighth do not.
        (24, (16, 12), None, "full data, 16 epochs"),  # 16,800 samples, 800 more than those of 16
        (24, (24, 17, 16, 12), "full data", "full data, 17 epochs"),
        (18, (16, 13, 12), "full data, 16 epochs", "full data, 13 epochs"),  # 12,600
        (15, (16, 10), "full data, 16 epochs", "full data, 10 epochs"),  # 10,680
        (15, (16, 20, 15), "full data", None),
        (16, (), None, None),
    ],
)
def test_rivals_of_a_run_of_more_or_fewer_epochs(
    tmp_path: Path, epochs: int, rivals: Sequence[int], full: str | None, shorter: str | None
) -> None:
    write_run(tmp_path / "mine", {"epochs": epochs, "policy": "hard", "ratio": 0.9})
    for of in rivals:
        write_run(tmp_path / f"full{of}", {"epochs": of, **FULL})
    assert [of and of.against for of in compared(tmp_path)] == [full, shorter]


def test_trainings_on_equally_many_samples(tmp_path: Path) -> None:
    # Of eight full epochs' 8,000 samples: three epochs of a pruned run of four save 400 r each.
    for seed in (0, 1):
        write_run(tmp_path / f"a{seed}", {"epochs": 8, "seed": seed, **FULL}, accuracy=0.9)
        write_run(tmp_path / f"b{seed}", {"epochs": 4, "seed": seed, **FULL}, accuracy=0.8)
        write_run(tmp_path / f"c{seed}", {"epochs": 3, "seed": seed, **FULL}, accuracy=0.7)
        for name, ratio in (("soft", 0.4), ("hard", 0.5), ("random", 0.5), ("ucb", 0.99)):
            how = {"policy": name, "ratio": ratio, "seed": seed}
            write_run(tmp_path / f"{name}{seed}", how, accuracy=0.75 + seed / 100)
    (section,) = sections(read([tmp_path]).runs)
    (group,) = by_budget(trainings(section))
    near = [("soft", 3520), ("hard", 3400), ("random", 3400)]  # one missed its target by a little
    assert [(row.pruning.policy, round(8000 * share)) for share, row, _ in group] == near
    for _, _, full in group:
        assert full is not None
        assert list(full.points) == pytest.approx([-15, -14])
    assert budget_table(section) == []  # of one share the first table says all
    for seed in (0, 1):
        write_run(tmp_path / f"d{seed}", {"policy": "seta", "ratio": 0.99, "seed": seed})
    (section,) = sections(read([tmp_path]).runs)
    table = next(block for block in budget_table(section) if isinstance(block, Table))
    assert [row[0] for row in table.rows] == ["44.0%", "42.5%", "42.5%", "35.1%", "35.1%"]


@pytest.mark.parametrize(
    "other",
    [
        {"config": {"max_lr": 0.2}},
        {"config": {"data_fraction": 0.5}},
        {"data": "synthetic"},
        {"data": "files"},
        {"data_hash": "d4" * 8},
        {"config": {"validation": 5000}},
        {"source_hash": "c3" * 32},
        {"done": 3},
    ],
)
def test_what_is_not_alike_is_not_compared(tmp_path: Path, other: dict) -> None:
    write_run(tmp_path / "mine")
    changes = {**other, "config": {**FULL, **other.get("config", {})}}
    write_run(tmp_path / "full", **changes)
    for section in sections(read([tmp_path]).runs):
        rows = trainings(section)
        assert all(against_full(row, rows) is None for row in rows)


def test_a_title_tells_settings_apart_by_what_both_records_know(tmp_path: Path) -> None:
    write_run(tmp_path / "now", {"newer": 0.2, "max_lr": 0.3})
    write_run(tmp_path / "older", source_hash="c3" * 32, data_hash=None)
    titles = [section.title for section in sections(read([tmp_path]).runs)]
    for title in titles:
        assert ", max_lr 0." in title
        assert ", source " in title
        assert "newer" not in title
        assert "data_hash" not in title
    for of in ("a1" * 8, "b2" * 8):
        write_run(tmp_path / of, data_hash=of)
    titles = [section.title for section in sections(read([tmp_path]).runs)]
    assert sum("data_hash" in title for title in titles) == 2  # what has none is not told


@pytest.mark.parametrize(("dataset", "told"), [("cifar100", True), ("folder", False)])
def test_files_are_doubted_where_some_are_published(tmp_path: Path, dataset, told) -> None:
    write_run(tmp_path / "run", {"dataset": dataset}, data="files")
    (section,) = sections(read([tmp_path]).runs)
    assert ("not known to be the published" in section.title) == told


@pytest.mark.parametrize(
    "same",
    [
        {"loader": "dali"},
        {"telemetry": False},
        {"preset": "paper"},
        {"synthetic_classes": 7, "train_size": 64},
        {"policy": "none"},
        {"target_saving": 0.2, "ratio": 0.7},
    ],
)
def test_what_makes_no_other_experiment_is_compared(tmp_path: Path, same: dict) -> None:
    """Also full data, however it was asked for."""
    write_run(tmp_path / "mine")
    write_run(tmp_path / "full", {**FULL, **same}, accuracy=0.82, data="genuine")
    full, _ = compared(tmp_path)
    assert full is not None
    assert full.mean == pytest.approx(-2.0)


def test_the_committed_results() -> None:
    """As the README has them: -1.47 points against full data, -0.23 against training shorter."""
    root = Path(__file__).parents[2] / "bench" / "results" / "policies-cpu-amd-epyc"
    (section,) = sections(read([root]).runs)
    rows = {row.pruning.label: row for row in trainings(section)}
    row = rows["InfoBatch, 25% to save"]
    full, shorter = (of(row, [*trainings(section)]) for of in (against_full, against_shorter))
    assert full is not None
    assert shorter is not None
    assert (full.mean, full.verdict) == (pytest.approx(-1.47, abs=0.01), "lower")
    assert (shorter.mean, shorter.verdict) == (pytest.approx(-0.23, abs=0.01), "undecided")
    assert shorter.saved == pytest.approx(0, abs=1e-9)
    assert len(section.runs) == 33
