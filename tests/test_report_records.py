"""Reading: what is found, and the one line that each broken record gets."""

import json
import os

import pytest
from report_made import CPU, write_lines, write_run

from infobatch_fast.report_records import read


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
    assert found.benchmarks == {}
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
    assert list(found.benchmarks) == [runs / "here.jsonl", runs / "bench" / "overhead.jsonl"]
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
    "device of config.json: name is missing": lambda run: change(
        run / "config.json", device={"type": "cpu"}
    ),
    "samples of config.json: train must be a whole number of at least 1, got 0": lambda run: change(
        run / "config.json", samples={"train": 0}
    ),
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
    "epochs.jsonl has 4 epochs, but config.json 3": lambda run: change_config(run, epochs=3),
    "epochs.jsonl: kept must be at most the 1000 training samples": lambda run: change_epoch(
        run, 3, kept=1001
    ),
    "line 1 of epochs.jsonl: phases must be seconds by phase or null": lambda run: change_epoch(
        run, 1, phases={"step": "long"}
    ),
    "line 1 of epochs.jsonl: score_histogram must be a histogram or null": lambda run: change_epoch(
        run, 1, score_histogram={"low": 1, "high": 1, "counts": [0] * 9, "unseen": 0}
    ),
    "epochs.jsonl: score_histogram must have as many bins in each epoch": lambda run: change_epoch(
        run, 1, score_histogram={"low": 1, "high": 2, "counts": [0] * 9, "unseen": 0}
    ),
    "cannot read epochs.jsonl: 'utf-8' codec": lambda run: (run / "epochs.jsonl").write_bytes(
        b"\xff\xfe"
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


LINES = {
    "it holds no lines yet": [],
    "line 1: median must be a number or null, got '1'": [{"median": "1"}],
    "line 1: case must be an object, got []": [{"case": []}],
    "line 2: it has neither figures nor a reason": [{}, {"median": None}],
    "line 1: it holds a NaN or an infinity": [{"more": {"share": float("nan")}}],
    "line 1: median must be a number or null, got nan": [{"median": float("nan")}],
    "device of line 1: type is missing": [{"device": {"name": "x"}}],
}


@pytest.mark.parametrize("message", LINES)
def test_broken_lines(tmp_path, message):
    path = write_lines(tmp_path / "a.jsonl", LINES[message])
    write_lines(tmp_path / "b.jsonl", [{"device": CPU}])
    found = read([tmp_path])
    assert found.bad == [(str(path), message)]
    assert list(found.benchmarks) == [tmp_path / "b.jsonl"]


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
            f"line 1 of {tmp_path / 'cut.jsonl'} is no benchmark's line",
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
