"""Methods held against full data and against training shorter, seed by seed."""

import pytest
from report_made import OTHER_SOURCE, write_run
from scipy import stats

from infobatch_fast.report.groups import main_source, sections
from infobatch_fast.report.page import Table, Text
from infobatch_fast.report.paired import AGAINST, comparison, paired, quantile
from infobatch_fast.report.read import read

FULL = {"delta": 0.0}
SHORT = {"delta": 0.0, "epochs": 7}
HARD = {"policy": "hard", "rescale": False}


def section_of(tmp_path, *specifications):
    """The section of runs of eight epochs given as (config, accuracy in percent, others)."""
    for number, (config, percent, *others) in enumerate(specifications):
        write_run(
            tmp_path / f"{number:02}",
            {"epochs": 8, **config},
            accuracy=percent / 100,
            **(others[0] if others else {}),
        )
    runs = read([tmp_path]).runs
    assert len(runs) == len(specifications)
    (section,) = sections(runs, main_source(runs)[0])
    return section


def table_of(section):
    table, text = comparison(section)
    assert isinstance(table, Table)
    assert isinstance(text, Text)
    assert table.title == AGAINST
    assert len({len(row) for row in (table.headers, *table.rows)}) == 1
    return [list(row) for row in table.rows], text.text


@pytest.mark.parametrize("freedom", [*range(1, 31), 99, 100, 1000])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
def test_the_quantile(freedom, confidence):
    exact = stats.t.ppf((1 + confidence) / 2, freedom)
    assert quantile(freedom, confidence) == pytest.approx(exact, rel=1e-9)


def test_the_whole_table_by_hand(tmp_path):
    section = section_of(
        tmp_path,
        ({**FULL, "seed": 0}, 90.0),
        ({**FULL, "seed": 1}, 91.0),
        ({**FULL, "seed": 2}, 92.0),
        # Differences 0.5, 0.7, 0.9: mean 0.7, deviation 0.2, half 4.3027 x 0.2 / root 3 = 0.4968.
        ({"seed": 0}, 90.5, {"epoch_seconds": 30}),
        ({"seed": 1}, 91.7, {"epoch_seconds": 60}),
        ({"seed": 2}, 92.9, {"epoch_seconds": 90}),
        ({**SHORT, "seed": 0}, 90.6),  # difference -0.1
        ({**SHORT, "seed": 1}, 91.5),  # 0.2: mean 0.05, deviation 0.2121, half 12.7062 x 0.15
        ({**SHORT, "seed": 3}, 99.0),  # a seed that nothing else has
    )
    rows, text = table_of(section)
    # Of eight epochs 2 to 7 keep 800 of 1000: 6.8 full epochs. Ratios of 0.85 x (0.5, 1, 1.5).
    against = "full data, 7 epochs"
    shorter = f"{against} (training shorter)"
    assert rows == [
        [
            *("InfoBatch r=0.5", "full data", "higher", "+0.70 ± 0.20", "+0.20 to +1.20", "3"),
            *("6.80", "85.0", "8.00", "0.850"),
        ],
        [
            *("InfoBatch r=0.5", against, "within noise", "+0.05 ± 0.21", "-1.86 to +1.96", "2"),
            *("6.80", "85.0", "7.00", "0.729"),
        ],
        [
            *(shorter, "full data", "within noise", "+0.55 ± 0.07", "-0.09 to +1.19", "2"),
            *("7.00", "87.5", "8.00", "0.875"),
        ],
    ]
    assert "SAME SEED" not in text
    assert "same seed and source" in text


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        ([0.0], "one seed: noise unknown"),
        ([-3.0], "one seed: noise unknown"),
        ([0.0, 0.0, 0.0], "within noise"),
        ([0.1, 0.1, 0.1], "higher"),
        ([-0.1, -0.1], "lower"),
        ([-0.2, -0.9], "within noise"),  # 12.7 x 0.35 is more than 0.55
        ([-0.50, -0.51, -0.52], "lower"),
        ([0.1, 0.2], "within noise"),  # the half is 0.64, and by 1.96 deviations would be 0.10
        ([0.05, 0.15, 0.25, 0.35], "within noise"),  # 3.18 x 0.129 / 2 = 0.205 is above 0.2
        ([0.1, 0.2, 0.3, 0.4], "higher"),  # and below 0.25
        ([1.0, 1.1, 1.2, 1.3], "higher"),
    ],
)
def test_verdicts(tmp_path, differences, verdict):
    specifications = []
    for seed, difference in enumerate(differences):
        specifications.append(({**FULL, "seed": seed}, 90.0 + seed))
        specifications.append(({"seed": seed}, 90.0 + seed + difference))
    (one,) = paired(section_of(tmp_path, *specifications))
    assert one.points == pytest.approx(differences)
    if len(differences) > 1:
        interval = stats.t.interval(
            0.95,
            len(differences) - 1,
            sum(differences) / len(differences),
            stats.sem(differences) or 1e-300,
        )
        assert one.interval == pytest.approx(interval, abs=1e-9)
    assert one.verdict == verdict


def test_a_single_seed_has_no_deviation_and_no_interval(tmp_path):
    rows, _ = table_of(section_of(tmp_path, (FULL, 90.0), ({}, 90.25)))
    assert [row[2:6] for row in rows] == [["one seed: noise unknown", "+0.25", "–", "1"]]


def test_without_a_common_seed_nothing_is_compared(tmp_path):
    section = section_of(tmp_path, (FULL, 90.0), ({"seed": 1}, 91.0), ({**SHORT, "seed": 2}, 85.0))
    rows, _ = table_of(section)
    assert [row[2:] for row in rows] == [["no seed in common", *"––", "0", *"––––"]] * 3


def test_no_table_where_there_is_nothing_to_be_held_against(tmp_path):
    assert comparison(section_of(tmp_path, ({}, 90.0), (HARD, 91.0))) == []


def test_full_data_alone_is_not_held_against_itself(tmp_path):
    assert comparison(section_of(tmp_path, (FULL, 90.0), ({**FULL, "seed": 1}, 91.0))) == []


def test_sources_are_not_mixed(tmp_path):
    other = {"about": {"source_hash": OTHER_SOURCE}}
    section = section_of(
        tmp_path,
        (FULL, 90.0),
        ({}, 91.0),
        (HARD, 95.0),
        (FULL, 80.0, other),
        ({}, 81.5, other),
        (SHORT, 70.0, other),
    )
    mark = " (OTHER SOURCE c3c3c3c3)"
    shorter = "full data, 7 epochs"
    rows, _ = table_of(section)
    assert [(row[0], row[1], row[3]) for row in rows] == [
        ("InfoBatch r=0.5", "full data", "+1.00"),
        ("hard r=0.5 + anneal", "full data", "+5.00"),
        (f"InfoBatch r=0.5{mark}", "full data", "+1.50"),
        (f"InfoBatch r=0.5{mark}", shorter, "+11.50"),
        (f"{shorter} (training shorter){mark}", "full data", "-10.00"),
    ]


def test_the_shorter_training_of_most_nearly_the_same_samples(tmp_path):
    section = section_of(
        tmp_path,
        ({"ratio": 0.5}, 90.0),  # 6.8 full epochs
        ({"ratio": 0.9}, 90.0),  # 5.84
        ({"ratio": 0.9, "seed": 1}, 90.0),
        ({**FULL, "epochs": 5}, 85.0),
        ({**FULL, "epochs": 6}, 86.0),
        ({**FULL, "epochs": 7}, 87.0),
        ({**FULL, "epochs": 7, "seed": 1}, 87.0),  # the only one of its seed
    )
    found = [(one.row.label, one.against, one.points) for one in paired(section)]
    assert found == [
        ("InfoBatch r=0.5", "full data, 7 epochs", [pytest.approx(3)]),
        (
            "InfoBatch r=0.9",
            "full data, 6 to 7 epochs",
            [pytest.approx(4), pytest.approx(3)],
        ),
    ]
    rows, _ = table_of(section)
    assert rows[1][5:9] == ["2", "5.84", "73.0", "6.50"]


def test_of_two_that_are_as_near_the_longer_is_taken(tmp_path):
    section = section_of(
        tmp_path,
        ({"ratio": 0.625}, 90.0),  # 6 x 0.75 + 2 = 6.5 full epochs
        ({**FULL, "epochs": 6}, 86.0),
        ({**FULL, "epochs": 7}, 87.0),
    )
    assert [one.against for one in paired(section)] == ["full data, 7 epochs"]


def test_runs_of_one_seed_count_once(tmp_path):
    section = section_of(
        tmp_path, (FULL, 90.0), ({}, 91.0), ({}, 93.0), ({**FULL, "seed": 1}, 90.0)
    )
    rows, text = table_of(section)
    assert rows[0][2:6] == ["one seed: noise unknown", "+2.00", "–", "1"]
    assert "one SAME SEED count once, by their mean" in text


def test_slow_runs_are_marked_in_the_ratio(tmp_path):
    watched = {"host_syncs": "count"}
    rows, _ = table_of(section_of(tmp_path, ({**FULL, **watched}, 90.0), ({}, 91.0)))
    assert rows[0][-1] == "0.850 (SLOWER)"
