"""Reading: what is found, and the one line that each broken record gets."""

import json
import os
from dataclasses import fields

import pytest
from report_made import CPU, SOURCE, write_lines, write_run

from infobatch_fast.report import rules
from infobatch_fast.report.groups import state_of
from infobatch_fast.report.lines import Line
from infobatch_fast.report.read import read


def change(path, **values):
    value = json.loads(path.read_text())
    value.update(values)
    path.write_text(json.dumps(value))


def change_config(run, **values):
    about = json.loads((run / "config.json").read_text())
    change(run / "config.json", config={**about["config"], **values})


def change_epoch(run, number, **values):
    lines = (run / "epochs.jsonl").read_text().splitlines()
    lines[number - 1] = json.dumps({**json.loads(lines[number - 1]), **values})
    (run / "epochs.jsonl").write_text("\n".join(lines) + "\n")


def drop(path, name):
    value = json.loads(path.read_text())
    del value[name]
    path.write_text(json.dumps(value))


def test_a_record_as_read(tmp_path):
    write_run(tmp_path / "one", {"seed": 3}, accuracy=0.8125, epoch_seconds=60.0)
    found = read([tmp_path / "one"])
    assert found.bad == []
    assert found.benchmarks == []
    (run,) = found.runs
    assert (run.letter, run.name, run.samples, run.complete) == ("a", "one", 1000, True)
    # 1000 + 3 x 800 samples of 4000; minutes 1 + 3 x 0.8, wall 1.6 s more an epoch.
    assert run.trained == 3400
    assert run.saved_share == pytest.approx(0.15)
    assert run.minutes == pytest.approx(3.4)
    assert run.device_hours == pytest.approx((3.4 * 60 + 4 * 1.6) / 3600)
    assert run.evaluated[-1]["accuracy"] == 0.8125
    assert run.phases is not None
    assert run.phases["step"] == pytest.approx(0.89 * 204)
    assert run.no_energy() == "the device is no GPU"


def test_an_older_record_lacks_the_new_keys(tmp_path):
    write_run(tmp_path / "old", new=False)
    (run,) = read([tmp_path / "old"]).runs
    assert run.samples == 1000
    assert run.saved_share == pytest.approx(0.15)
    assert run.phases is None
    # Training, pruning, evaluation and checkpoints: 204 s and 4 x 1.5 s.
    assert run.device_hours == pytest.approx(210 / 3600)
    assert run.no_energy() == "not recorded"


def test_an_incomplete_run_counts_its_epochs_so_far(tmp_path):
    write_run(tmp_path / "part", done=2)
    write_run(tmp_path / "none", done=0)
    (tmp_path / "none" / "epochs.jsonl").unlink()
    part, none = read([tmp_path / "part", tmp_path / "none"]).runs
    assert not part.complete
    assert part.minutes == pytest.approx(1.8)
    assert part.trained == 1800
    assert part.phases is not None
    assert part.phases["wait"] == pytest.approx(0.1 * 108)
    assert part.device_hours == pytest.approx((108 + 3.2) / 3600)
    assert part.no_energy() == "the run is incomplete"
    assert (none.trained, none.minutes, none.saved_share, none.phases) == (0, 0, None, None)


def test_folders_of_folders_and_what_is_named_twice(tmp_path):
    runs = tmp_path / "runs"
    write_run(runs / "b")
    write_run(runs / "a")
    write_lines(runs / "bench" / "overhead.jsonl", [{}])
    write_lines(runs / "here.jsonl", [{}])
    (runs / "empty").mkdir()
    (runs / "notes.txt").write_text("")
    (tmp_path / "link").symlink_to(runs / "a")
    found = read(
        [runs, runs / "a", tmp_path / "link", runs / "bench", runs / "bench" / "overhead.jsonl"]
    )
    assert [(run.letter, run.name) for run in found.runs] == [("a", "a"), ("b", "b")]
    assert [b.name for b in found.benchmarks] == ["runs/here.jsonl", "bench/overhead.jsonl"]
    assert found.bad == []


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path):
    write_run(tmp_path / "x" / "one")
    write_run(tmp_path / "y" / "one")
    write_run(tmp_path / "y" / "two")
    found = read([tmp_path / "x", tmp_path / "y"])
    assert [run.name for run in found.runs] == ["x/one", "y/one", "two"]


def test_letters_go_on_after_z(tmp_path):
    for number in range(28):
        write_run(tmp_path / f"{number:02}", done=0)
    letters = [run.letter for run in read([tmp_path]).runs]
    assert letters[0] == "a"
    assert letters[25:] == ["z", "aa", "ab"]


BROKEN = {
    "config.json is missing": lambda run: (run / "config.json").unlink(),
    "config.json is no JSON object: Expecting": lambda run: (run / "config.json").write_text("{"),
    "config.json is no JSON object: it holds a list": lambda run: (run / "config.json").write_text(
        "[]"
    ),
    "config.json: source_hash is missing": lambda run: drop(run / "config.json", "source_hash"),
    "config.json: source_hash must be a hash, got '$x$'": lambda run: change(
        run / "config.json", source_hash="$x$"
    ),
    "config.json: config must be an object, got 3": lambda run: change(
        run / "config.json", config=3
    ),
    "config of config.json: epochs must be a whole number of at least 1, got 0": lambda run: (
        change_config(run, epochs=0)
    ),
    "config of config.json: ratio must be a number in [0, 1], got '0.5'": lambda run: change_config(
        run, ratio="0.5"
    ),
    "config of config.json: rescale must be true or false, got 1": lambda run: change_config(
        run, rescale=1
    ),
    "config of config.json: model must be a name, got '$\\\\frac$'": lambda run: change_config(
        run, model="$\\frac$"
    ),
    "config of config.json: amp must be a plain value": lambda run: change_config(run, amp=[1]),
    "config of config.json: score must be a name, got 3": lambda run: change_config(run, score=3),
    "config of config.json: ratio_schedule must be a name, got ''": lambda run: change_config(
        run, ratio_schedule=""
    ),
    "config of config.json: target_saving must be a number in [0, 1] or null": lambda run: (
        change_config(run, target_saving=1.5)
    ),
    "config of config.json: data_fraction must be a number in (0, 1], got 0": lambda run: (
        change_config(run, data_fraction=0)
    ),
    "config.json: classes must be a list of texts or null, got [1]": lambda run: change(
        run / "config.json", classes=[1]
    ),
    "summary.json: expected_saving must be a number in [0, 1] or null, got 2": lambda run: change(
        run / "summary.json", expected_saving=2
    ),
    "summary.json: target_saving must be a number in [0, 1] or null, got -1": lambda run: change(
        run / "summary.json", target_saving=-1
    ),
    "device of config.json: name is missing": lambda run: change(
        run / "config.json", device={"type": "cpu"}
    ),
    "samples of config.json: train must be a whole number of at least 1, got 0": lambda run: change(
        run / "config.json", samples={"train": 0}
    ),
    "epochs.jsonl has 4 epochs, but config.json 3": lambda run: change_config(run, epochs=3),
    "epochs.jsonl: kept must be at most the 1000 training samples": lambda run: change_epoch(
        run, 3, kept=1001
    ),
    "epochs.jsonl: score_histogram must have as many bins in each epoch": lambda run: change_epoch(
        run, 1, score_histogram={"low": 1, "high": 2, "counts": [0] * 9, "unseen": 0}
    ),
    "epochs.jsonl must be a regular file": lambda run: (
        (run / "epochs.jsonl").unlink(),
        os.mkfifo(run / "epochs.jsonl"),
    ),
    "summary.json: train_seconds is missing": lambda run: drop(
        run / "summary.json", "train_seconds"
    ),
    "summary.json: accuracy_last must be 0.8 as in epochs.jsonl, got 0.9": lambda run: change(
        run / "summary.json", accuracy_last=0.9
    ),
    "summary.json: samples_trained must be 3400 as in epochs.jsonl, got 1": lambda run: change(
        run / "summary.json", samples_trained=1
    ),
    "summary.json: epochs must be 4 as in epochs.jsonl, got 3": lambda run: change(
        run / "summary.json", epochs=3
    ),
    "summary.json: nvml must be an object": lambda run: change(
        run / "summary.json", nvml={"absent": {"joules": 3}}
    ),
    "config.json is no JSON object: maximum recursion": lambda run: (
        run / "config.json"
    ).write_text("[" * 100_000),
    "config.json is no JSON object: 'utf-8' codec": lambda run: (run / "config.json").write_bytes(
        b"\xff\xfe"
    ),
}
DAMAGED = {
    "line 4 of epochs.jsonl is no JSON object: ": lambda run: (run / "epochs.jsonl").write_text(
        (run / "epochs.jsonl").read_text()[:-30]
    ),
    "line 2 of epochs.jsonl: kept must be a whole number of at least 1, got 1.5": lambda run: (
        change_epoch(run, 2, kept=1.5)
    ),
    "line 2 of epochs.jsonl: kept must be a whole number of at least 1, got True": lambda run: (
        change_epoch(run, 2, kept=True)
    ),
    "line 3 of epochs.jsonl is no JSON object: NaN is no number": lambda run: change_epoch(
        run, 3, loss=float("nan")
    ),
    "line 3 of epochs.jsonl is no JSON object: Infinity is no": lambda run: change_epoch(
        run, 3, train_seconds=float("inf")
    ),
    "line 1 of epochs.jsonl: accuracy must be a number in [0, 1] or null, got 80": lambda run: (
        change_epoch(run, 1, accuracy=80)
    ),
    "line 1 of epochs.jsonl: train_seconds must be a number of at least 0, got -1": lambda run: (
        change_epoch(run, 1, train_seconds=-1)
    ),
    "line 2 of epochs.jsonl: epoch must be 2, got 3": lambda run: change_epoch(run, 2, epoch=3),
    "line 1 of epochs.jsonl: phases must be seconds by phase or null": lambda run: change_epoch(
        run, 1, phases={"step": "long"}
    ),
    "line 1 of epochs.jsonl: score_histogram must be a histogram or null": lambda run: change_epoch(
        run, 1, score_histogram={"low": 1, "high": 1, "counts": [0] * 9, "unseen": 0}
    ),
    "line 1 of epochs.jsonl: ratio must be a number in [0, 1] or null, got '1'": lambda run: (
        change_epoch(run, 1, ratio="1")
    ),
    "line 1 of epochs.jsonl: expected_saving must be a number in [0, 1] or null": lambda run: (
        change_epoch(run, 1, expected_saving=-0.1)
    ),
    "line 3 of epochs.jsonl is no JSON object: 'utf-8' codec": lambda run: (
        run / "epochs.jsonl"
    ).write_bytes((run / "epochs.jsonl").read_bytes().replace(b'{"epoch": 3', b"\xff")),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_run_gets_a_line_and_the_rest_is_read(tmp_path, message):
    broken = write_run(tmp_path / "broken")
    write_run(tmp_path / "sound")
    BROKEN[message](broken)
    found = read([tmp_path])
    ((path, why),) = found.bad
    assert path == str(broken)
    assert why.startswith(message), why
    assert [(run.letter, run.name) for run in found.runs] == [("a", "sound")]


@pytest.mark.parametrize("message", DAMAGED)
def test_of_damaged_epochs_the_others_are_kept(tmp_path, message):
    damaged = write_run(tmp_path / "damaged")
    write_run(tmp_path / "sound", accuracy=0.9)
    DAMAGED[message](damaged)
    found = read([tmp_path])
    ((path, why),) = found.bad
    assert path == str(damaged)
    assert why.startswith(message), why
    assert why.endswith("; the rest is reported")
    run, sound = found.runs
    assert (run.damaged, run.complete, sound.complete) == (True, False, True)
    assert run.summary is None
    number = int(message[5])
    left = [epoch for epoch in range(1, 5) if epoch != number]
    if "epoch must be" not in message:
        assert [line["epoch"] for line in run.epochs] == left
        assert run.minutes == pytest.approx(sum((1, 0.8, 0.8, 0.8)[epoch - 1] for epoch in left))
        assert [line["epoch"] for line in run.unbroken] == left[: number - 1]
    assert state_of(run, SOURCE).startswith("INCOMPLETE: its record is DAMAGED, ")


def test_epochs_that_are_gone(tmp_path):
    for name, missing in (("a", {1, 2}), ("b", {3}), ("c", {0, 1, 2, 3})):
        path = write_run(tmp_path / name, accuracy=0.5) / "epochs.jsonl"
        rows = path.read_text().splitlines(keepends=True)
        path.write_text("".join(row for number, row in enumerate(rows) if number not in missing))
    found = read([tmp_path])
    rest = "; the rest is reported"
    assert [why for _, why in found.bad] == [
        f"line 2 of epochs.jsonl: epoch must be 2, got 4{rest}",
        f"epochs.jsonl has 3 epochs, but summary.json 4{rest}",
        f"epochs.jsonl has 0 epochs, but summary.json 4{rest}",
    ]
    assert [[line["epoch"] for line in run.epochs] for run in found.runs] == [[1, 4], [1, 2, 3], []]
    assert [len(run.unbroken) for run in found.runs] == [1, 3, 0]
    assert [state_of(run, SOURCE) for run in found.runs] == [
        f"INCOMPLETE: its record is DAMAGED, {count} of 4 epochs can be read" for count in (2, 3, 0)
    ]


def test_several_damaged_lines_are_counted(tmp_path):
    path = write_run(tmp_path / "a") / "epochs.jsonl"
    path.write_text(path.read_text().replace('"kept"', "kept"))
    ((_, why),) = read([tmp_path]).bad
    assert why.startswith("line 1 of epochs.jsonl is no JSON object: Expecting property name")
    assert why.endswith(", and 3 more lines; the rest is reported")


def test_without_telemetry_the_training_holds_the_pruning(tmp_path):
    write_run(tmp_path / "quiet", {"telemetry": False, "device": "cuda"})
    found = read([tmp_path])
    assert found.bad == []
    (run,) = found.runs
    assert run.complete
    assert run.minutes == pytest.approx(3.4)
    assert run.saved_share == pytest.approx(0.15)
    assert (run.pruning_seconds, run.phases, run.figure("joules")) == (None, None, None)
    assert run.no_energy() == "telemetry is off"


def test_telemetry_that_was_off_for_some_epochs(tmp_path):
    run = write_run(tmp_path / "one", new=False)
    change_epoch(run, 1, pruning_seconds=None, train_seconds=60.0)
    change(run / "summary.json", pruning_seconds=None)
    (run,) = read([tmp_path]).runs
    assert run.complete
    assert run.pruning_seconds is None
    assert run.minutes == pytest.approx(3.4)
    assert run.device_hours == pytest.approx(210 / 3600)


LINES = {
    "it holds no lines yet": [],
    "line 1: median must be a number or null, got '1'": [{"median": "1"}],
    "line 1: case must be an object, got []": [{"case": []}],
    "line 1: it has neither figures nor a reason": [{"median": None}, {"median": None}],
    "line 1 is no JSON object: NaN is no number of JSON": [{"more": {"share": float("nan")}}],
    "line 1: complete must be true or false, got 1": [{"complete": 1}],
    "device of line 1: type is missing": [{"device": {"name": "x"}}],
}


@pytest.mark.parametrize("message", LINES)
def test_broken_lines(tmp_path, message):
    path = write_lines(tmp_path / "a.jsonl", LINES[message])
    write_lines(tmp_path / "b.jsonl", [{"device": CPU}])
    found = read([tmp_path])
    assert found.bad == [(str(path), message)]
    assert [benchmark.name for benchmark in found.benchmarks] == [f"{tmp_path.name}/b.jsonl"]


def test_the_rules_are_of_all_that_a_line_has(tmp_path):
    assert set(rules.LINE) == {field.name for field in fields(Line)}
    path = write_lines(tmp_path / "a.jsonl", [{}])
    drop(path, "complete")
    assert read([path]).bad == [(str(path), "line 1: complete is missing")]


def test_of_damaged_lines_the_others_are_kept(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"part": part} for part in "abcd"])
    a, b, c, d = path.read_text().splitlines(keepends=True)
    path.write_text(a + b.replace("0.002", "1e999") + c.replace('"case"', '"cas"') + d[:-30])
    found = read([path])
    (benchmark,) = found.benchmarks
    assert [line["part"] for line in benchmark.lines] == ["a"]
    assert benchmark.damaged
    assert found.bad == [
        (
            str(path),
            "line 2: median must be a number or null, got inf, and 2 more lines; "
            "the rest is reported",
        )
    ]
    path.write_text(a + b.replace('"more": {}', '"more": {"low_seconds": 1e999}') + c)
    assert read([path]).bad == [(str(path), "line 2: it holds an infinity; the rest is reported")]


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for folder in ("x", "y/x", "z"):
        write_lines(tmp_path / folder / "a.jsonl", [{}])
    found = read([tmp_path / "x", tmp_path / "y" / "x", tmp_path / "z"])
    assert [b.name for b in found.benchmarks] == [
        f"{tmp_path.name}/x/a.jsonl",
        "y/x/a.jsonl",
        "z/a.jsonl",
    ]


def test_a_folder_of_runs_with_their_results(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name, {"seed": ord(name)})
    (tmp_path / "results.jsonl").write_text('{"name": "a"}\n')
    found = read([tmp_path])
    assert ([run.name for run in found.runs], found.bad) == (["a", "b"], [])
    (tmp_path / "others.jsonl").write_text('{"name": "a"}\n')
    assert [path for path, _ in read([tmp_path]).bad] == [str(tmp_path / "others.jsonl")]


def test_other_places(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "some.txt").write_text("")
    (tmp_path / "cut.jsonl").write_text('{"benchmark": "overh')
    run = write_run(tmp_path / "run")
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "x.jsonl")
    names = ("missing", "empty", "some.txt", "cut.jsonl", "run/epochs.jsonl", "pipe")
    found = read([*(tmp_path / name for name in names), run])
    assert found.bad == [
        (str(tmp_path / "missing"), "there is no such file or folder"),
        (str(tmp_path / "empty"), "it holds no run and no benchmark's .jsonl file"),
        (
            str(tmp_path / "some.txt"),
            "it is no run's folder, no .jsonl file, and no folder of these",
        ),
        (
            str(tmp_path / "cut.jsonl"),
            "line 1 is no JSON object: Unterminated string starting at: line 1 column 15 (char 14)",
        ),
        (str(run / "epochs.jsonl"), "it is part of a run's record: name the folder"),
        (str(tmp_path / "pipe" / "x.jsonl"), "x.jsonl must be a regular file"),
    ]
    assert [run.name for run in found.runs] == ["run"]


def test_a_difference_has_a_median_alone(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"p20": None, "p80": None, "count": None}])
    assert read([path]).bad == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tmp_path):
    closed = write_run(tmp_path / "closed")
    write_run(tmp_path / "open")
    closed.chmod(0)
    try:
        found = read([tmp_path])
    finally:
        closed.chmod(0o700)
    assert found.bad == [(str(closed), "Permission denied")]
    assert [run.name for run in found.runs] == ["open"]
