"""Grouping: which runs share a mean, and the marks of those that do not."""

import pytest
from report_made import CPU, GPU, OTHER_SOURCE, PAPER, QUICK, SOURCE, write_run

from infobatch_fast.report.groups import main_source, mean, same_seeds, sections, state_of
from infobatch_fast.report.methods import ABLATION, FULL, REPORTED, Method, method_of
from infobatch_fast.report.read import read


def grouped(tmp_path, *specifications):
    """The sections of runs given as (config, other arguments of write_run), named by letters."""
    for number, (config, other) in enumerate(specifications):
        # Of equal accuracies and seeds they would be copies of one run.
        write_run(tmp_path / f"{number:02}", config, **{"accuracy": 0.8 + number / 1000, **other})
    runs = read([tmp_path]).runs
    assert len(runs) == len(specifications)
    return sections(runs, main_source(runs)[0])


def rows(section):
    return [(row.label, "".join(run.letter for run in row.runs)) for row in section.rows]


def test_means_and_deviations_by_hand():
    assert mean([95.52], 2) == "95.52"
    # Of 1, 2 and 6: mean 3, squares 4 + 1 + 9 = 14, over n - 1 is 7, root 2.6458.
    assert mean([1, 2, 6], 2) == "3.00 ± 2.65"
    assert mean([1, 2, 6]) == "3.00 ± 2.65"
    assert mean([0.0571, 0.0569]) == "0.0570 ± 0.0001"
    assert mean([231.1, 231.1]) == "231.10 ± 0.00"
    assert mean([0.0, 0.0]) == "0.00 ± 0.00"
    assert mean([1234.5]) == "1,234.50"


def test_the_reported_figures():
    figures = {method.label: tuple(figures) for method, figures in REPORTED.items()}
    assert figures == {
        "full data": (95.52, 231.10, None, None),
        "InfoBatch r=0.3": (95.50, 184.66, None, None),
        "InfoBatch r=0.5": (95.53, 148.44, 0.057, 2.48),
        "InfoBatch r=0.7": (95.17, 113.83, None, None),
    }
    assert dict(ABLATION.values()) == {
        "random": 95.52,
        "soft": 95.60,
        "soft + rescale": 95.34,
        "soft + anneal": 95.59,
        "soft + rescale + anneal": 95.53,
        "hard + anneal": None,
    }


@pytest.mark.parametrize(
    ("config", "method", "label"),
    [
        ({}, Method("soft", 0.5, 0.875, True), "InfoBatch r=0.5"),
        ({"ratio": 0.3}, Method("soft", 0.3, 0.875, True), "InfoBatch r=0.3"),
        ({"delta": 0.0, "ratio": 0.7}, FULL, "full data"),
        ({"ratio": 0.0}, FULL, "full data"),
        ({"policy": "none"}, FULL, "full data"),
        ({"delta": 0.5}, Method("soft", 0.5, 0.5, True), "InfoBatch r=0.5 delta=0.5"),
        ({"anneal": False}, Method("soft", 0.5, 1.0, True), "soft r=0.5 + rescale"),
        ({"delta": 1.0}, Method("soft", 0.5, 1.0, True), "soft r=0.5 + rescale"),
        ({"rescale": False}, Method("soft", 0.5, 0.875, False), "soft r=0.5 + anneal"),
        ({"rescale": False, "anneal": False}, Method("soft", 0.5, 1.0, False), "soft r=0.5"),
        (
            {"policy": "random", "rescale": False, "anneal": False},
            Method("random", 0.5, 1.0, False),
            "random r=0.5",
        ),
        ({"policy": "random"}, Method("random"), "random r=0.5 + rescale + anneal"),
        ({"policy": "hard"}, Method("hard", rescale=False), "hard r=0.5 + anneal"),
        (
            {"policy": "seta", "rescale": False},
            Method("seta", rescale=False),
            "seta r=0.5 + anneal",
        ),
        ({"policy": "repb"}, Method("repb"), "repb r=0.5 + rescale + anneal"),
        ({"score": "bls"}, Method("soft", score="bls"), "InfoBatch r=0.5, score bls"),
        (
            {"score": "loss", "ratio_schedule": "constant", "target_saving": None},
            Method("soft"),
            "InfoBatch r=0.5",
        ),
        (
            {"ratio_schedule": "pods", "delta": 0.5},
            Method("soft", delta=0.5, ratio_schedule="pods"),
            "InfoBatch r=0.5 delta=0.5, r by pods",
        ),
        (
            {"target_saving": 0.25, "ratio": 0.3},
            Method("soft", target_saving=0.25),
            "InfoBatch, 25% to save",
        ),
        (
            {"target_saving": 0.25, "ratio": 0.0},
            Method("soft", target_saving=0.25),
            "InfoBatch, 25% to save",
        ),
        (
            {"target_saving": 0.125, "policy": "hard", "rescale": False},
            Method("hard", rescale=False, target_saving=0.125),
            "hard, 12.5% to save + anneal",
        ),
        (
            {"target_saving": 0.29, "score": "bls", "anneal": False},
            Method("soft", delta=1.0, target_saving=0.29, score="bls"),
            "soft, 29% to save + rescale, score bls",
        ),
        ({"target_saving": 0.25, "delta": 0.0}, FULL, "full data"),
        ({"target_saving": 0.0}, FULL, "full data"),
    ],
)
def test_methods(tmp_path, config, method, label):
    write_run(tmp_path / "one", config, done=0)
    (run,) = read([tmp_path]).runs
    assert method_of(run) == method
    assert method.label == label


def test_all_of_the_ablation_and_the_reported_runs_are_reachable(tmp_path):
    configs = [{"delta": 0.0}, {"ratio": 0.3}, {"ratio": 0.5}, {"ratio": 0.7}]
    configs += [
        {"policy": policy, "rescale": rescale, "anneal": anneal}
        for policy, rescale, anneal in [
            ("random", False, False),
            ("soft", False, False),
            ("soft", True, False),
            ("soft", False, True),
            ("hard", True, True),  # its rescaling has no effect
        ]
    ]
    (section,) = grouped(tmp_path, *(({**QUICK, **c}, {}) for c in configs))
    assert {row.method for row in section.rows} == {*REPORTED, *ABLATION}
    assert section.further() == []


def test_seeds_and_what_does_not_matter_share_a_row(tmp_path):
    (section,) = grouped(
        tmp_path,
        ({"seed": 0}, {}),
        ({"seed": 1, "loader": "dali", "eval_every": 2, "checkpoint_every": 5}, {}),
        ({"seed": 2, "preset": "paper", "synthetic_samples": 7}, {}),
        ({"seed": 3, "telemetry": False}, {}),
        ({"seed": 4, "host_syncs": "count"}, {}),
    )
    assert rows(section) == [("InfoBatch r=0.5", "abcde")]


def test_equal_titles_get_what_tells_them_apart(tmp_path):
    found = grouped(
        tmp_path,
        ({"weight_decay": 0.0001, "compile": True}, {}),
        ({}, {}),
        ({"graph": True}, {}),  # of a record newer than the others
        ({"epochs": 5, "amp": "bf16"}, {}),  # told apart by its epochs
    )
    recipe = "batch 200, sgd, max lr 0.4"
    device = "; Test CPU (cpu, torch threads: 1)"
    assert [section.title for section in found] == [
        f"small on cifar10, 4 epochs, {recipe}, {apart}{device}"
        for apart in (
            "compile True, graph not recorded, weight_decay 0.0001",
            "compile False, graph not recorded, weight_decay 0.0005",
            "compile False, graph True, weight_decay 0.0005",
        )
    ] + [f"small on cifar10, 5 epochs, {recipe}{device}"]


def test_one_epoch_is_no_epochs(tmp_path):
    (section,) = grouped(tmp_path, ({"epochs": 1}, {"done": 0}))
    assert section.title.startswith("small on cifar10, 1 epoch, batch 200")
    assert state_of(section.runs[0], SOURCE) == "INCOMPLETE: 0 of 1 epoch"


def test_a_copy_counts_once(tmp_path):
    # The second and the fourth are the first's; the third has its seed, but is another run.
    (section,) = grouped(
        tmp_path,
        ({}, {"accuracy": 0.8}),
        ({}, {"accuracy": 0.8, "about": {"source_hash": OTHER_SOURCE}}),
        ({}, {"accuracy": 0.81}),
        ({}, {"accuracy": 0.8, "about": {"source_hash": OTHER_SOURCE}}),
        ({"seed": 1}, {"accuracy": 0.8}),  # a fixture's epochs alone: real ones take other times
    )
    assert rows(section) == [("InfoBatch r=0.5", "ace")]
    assert same_seeds(section.rows[0].runs) == [0]
    runs = read([tmp_path]).runs
    assert main_source(runs) == (SOURCE, False)
    assert [run.copy_of for run in runs] == [None, "a", None, "a", None]
    assert [state_of(run, SOURCE) for run in runs[:3]] == [
        "complete",
        "complete; copy of a, not counted; OTHER SOURCE",
        "complete",
    ]


def test_the_complete_one_of_two_copies_is_the_original(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    (tmp_path / "a" / "summary.json").unlink()
    first, second = read([tmp_path]).runs
    assert (first.copy_of, second.copy_of) == ("b", None)


def test_runs_that_have_not_begun_are_no_copies(tmp_path):
    write_run(tmp_path / "a", done=0)
    write_run(tmp_path / "b", {"ratio": 0.3}, done=0)
    assert [run.copy_of for run in read([tmp_path]).runs] == [None, None]


@pytest.mark.parametrize(
    "config",
    [{"model": "r18"}, {"weight_decay": 0.0}, {"amp": "bf16"}, {"compile": True}, {"epochs": 5}],
)
def test_another_setting_is_a_section_of_its_own(tmp_path, config):
    found = grouped(tmp_path, ({}, {}), (config, {}), ({"seed": 1}, {}))
    assert [rows(section) for section in found] == [
        [("InfoBatch r=0.5", "ac")],
        [("InfoBatch r=0.5", "b")],
    ]


@pytest.mark.parametrize("device", [GPU, {**CPU, "threads": 2}, {**CPU, "name": "Another CPU"}])
def test_another_device_is_a_section_of_its_own(tmp_path, device):
    found = grouped(tmp_path, ({}, {}), ({"seed": 1}, {"about": {"device": device}}))
    assert [rows(section) for section in found] == [
        [("InfoBatch r=0.5", "a")],
        [("InfoBatch r=0.5", "b")],
    ]
    assert found[0].device == "Test CPU (cpu, torch threads: 1)"


def test_synthetic_data_are_a_section_of_their_own_and_marked(tmp_path):
    found = grouped(tmp_path, ({}, {}), ({"seed": 1}, {"about": {"data": "synthetic"}}))
    assert [rows(section) for section in found] == [
        [("InfoBatch r=0.5", "a")],
        [("InfoBatch r=0.5", "b")],
    ]
    assert "SYNTHETIC data" in found[1].title
    assert "SYNTHETIC" not in found[0].title
    assert state_of(found[1].runs[0], SOURCE) == "complete; SYNTHETIC data"


def test_a_part_of_the_data_is_a_section_of_its_own_and_marked(tmp_path):
    found = grouped(
        tmp_path,
        ({}, {}),  # an older record
        ({"seed": 1, "data_fraction": 0.1}, {}),
        ({"seed": 2, "data_fraction": 1.0}, {}),
        ({"seed": 3, "data_fraction": 0.125}, {"about": {"data": "synthetic"}, "done": 1}),
    )
    assert [rows(section) for section in found] == [
        [("InfoBatch r=0.5", "ac")],
        [("InfoBatch r=0.5", "b")],
        [],
    ]
    assert [section.title.split(", ")[0] for section in found] == [
        "small on cifar10",
        "small on 10% OF THE DATA of cifar10",
        "small on 12.5% OF THE DATA of SYNTHETIC data (cifar10)",
    ]
    assert [state_of(section.runs[-1], SOURCE) for section in found] == [
        "complete",
        "complete; 10% OF THE DATA",
        "INCOMPLETE: 1 of 4 epochs; SYNTHETIC data; 12.5% OF THE DATA",
    ]
    assert all("data_fraction" not in section.others for section in found)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"score": "bls"}),
        ({"target_saving": 0.2}, {"target_saving": 0.25}),
        ({}, {"ratio_schedule": "pods"}),
    ],
)
def test_other_ways_to_prune_are_rows_of_their_own(tmp_path, before, after):
    (section,) = grouped(tmp_path, (before, {}), (after, {}), ({**after, "seed": 1}, {}))
    assert ["".join(run.letter for run in row.runs) for row in section.rows] == ["a", "bc"]


def test_the_ratio_does_not_matter_beside_a_target(tmp_path):
    target = {"target_saving": 0.2}
    (section,) = grouped(tmp_path, (target, {}), ({**target, "ratio": 0.3, "seed": 1}, {}))
    assert rows(section) == [("InfoBatch, 20% to save", "ab")]
    assert [row.label for row in section.further()] == ["InfoBatch, 20% to save"]


def test_an_incomplete_run_is_in_no_row(tmp_path):
    (section,) = grouped(tmp_path, ({}, {}), ({"seed": 1}, {"done": 3}), ({"seed": 2}, {}))
    (tmp_path / "02" / "summary.json").unlink()
    assert rows(section) == [("InfoBatch r=0.5", "ac")]
    runs = read([tmp_path]).runs
    (section,) = sections(runs, SOURCE)
    assert rows(section) == [("InfoBatch r=0.5", "a")]
    assert [run.letter for run in section.runs] == ["a", "b", "c"]
    assert [state_of(run, SOURCE) for run in runs] == [
        "complete",
        "INCOMPLETE: 3 of 4 epochs",
        "INCOMPLETE: no summary",
    ]


def test_another_source_has_a_marked_row(tmp_path):
    other = {"about": {"source_hash": OTHER_SOURCE}}
    (section,) = grouped(tmp_path, ({}, other), ({"seed": 1}, {}), ({"seed": 2}, {}))
    assert rows(section) == [
        ("InfoBatch r=0.5", "bc"),
        ("InfoBatch r=0.5 (OTHER SOURCE c3c3c3c3)", "a"),
    ]
    assert [state_of(run, SOURCE) for run in section.runs] == [
        "complete; OTHER SOURCE",
        "complete",
        "complete",
    ]


def test_the_main_source_is_the_majority_or_the_first_given(tmp_path):
    for number, source in enumerate([OTHER_SOURCE, SOURCE, SOURCE, OTHER_SOURCE]):
        write_run(tmp_path / str(number), done=0, about={"source_hash": source})
    runs = read([tmp_path]).runs
    assert main_source(runs) == (OTHER_SOURCE, True)
    assert main_source(runs[1:]) == (SOURCE, False)
    assert main_source(runs[:1]) == (OTHER_SOURCE, False)


@pytest.mark.parametrize(
    ("config", "other", "reported"),
    [
        ({}, {}, True),
        ({"amp": "fp16", "whole_batches": False, "seed": 4}, {}, True),
        ({"model": "r18"}, {}, False),
        ({"dataset": "cifar100"}, {}, False),
        ({"epochs": 199}, {}, False),
        ({"batch_size": 128}, {}, False),
        ({"optimizer": "sgd"}, {}, False),
        ({"max_lr": 5.1}, {}, False),
        ({"weight_decay": 1e-4}, {}, False),
        ({"label_smoothing": 0.0}, {}, False),
        ({}, {"about": {"data": "synthetic"}}, False),
        ({"data_fraction": 1.0}, {}, True),
        ({"data_fraction": 0.1}, {}, False),
    ],
)
def test_the_reported_setting(tmp_path, config, other, reported):
    (section,) = grouped(tmp_path, ({**PAPER, **config}, {"done": 0, **other}))
    assert section.reported == reported


def test_the_reported_setting_comes_first(tmp_path):
    found = grouped(tmp_path, (QUICK, {}), (PAPER, {"done": 1}))
    assert [section.reported for section in found] == [True, False]


def test_training_shorter_stands_in_the_section_of_the_pruned_runs(tmp_path):
    full = {"delta": 0.0}
    found = grouped(
        tmp_path,
        ({"epochs": 4, **full}, {}),  # a: shorter than b and c
        ({"epochs": 8}, {}),
        ({"epochs": 8, **full}, {}),
        ({"epochs": 9, **full}, {}),  # d: longer than all
        ({"epochs": 4, "max_lr": 1.0, **full}, {}),  # e: another setting
    )
    assert [rows(section) for section in found] == [
        [
            ("InfoBatch r=0.5", "b"),
            ("full data", "c"),
            ("full data, 4 epochs (training shorter)", "a"),
        ],
        [("full data", "d")],
        [("full data", "e")],
    ]
    (full_row,) = found[0].row(FULL)
    assert [run.letter for run in full_row.runs] == ["c"]
    assert [row.label for row in found[0].further()] == ["full data, 4 epochs (training shorter)"]


def test_same_seeds(tmp_path):
    (section,) = grouped(tmp_path, ({"seed": 1}, {}), ({"seed": 0}, {}), ({"seed": 1}, {}))
    assert same_seeds(section.runs) == [1]
    assert same_seeds(section.runs[:2]) == []


@pytest.mark.parametrize(
    ("config", "watched"),
    [
        ({}, False),
        ({"host_syncs": "count"}, True),
        ({"host_syncs": "forbid"}, True),
        ({"host_syncs": "count", "device": "cuda"}, False),
    ],
)
def test_host_syncs_are_slow_to_look_for_on_a_cpu(tmp_path, config, watched):
    write_run(tmp_path / "one", config)
    assert read([tmp_path]).runs[0].watched == watched
