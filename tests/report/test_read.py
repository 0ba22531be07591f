"""Records found and read: what is damaged gets one line, and the rest is reported."""

import json
import os
from pathlib import Path

import pytest
from report_made import FULL, line, write_run

from infobatch_fast.report.read import read
from infobatch_fast.report.runs import sections


def test_figures_of_a_run(tmp_path: Path) -> None:
    (run,) = read([write_run(tmp_path / "a")]).runs
    assert (run.name, run.complete, run.state) == ("a", True, "complete")
    assert (run.size, run.trained) == (1000, 3400)
    assert run.saved_share == pytest.approx(0.15)
    assert run.accuracy == pytest.approx(80.0)
    assert run.seconds == pytest.approx(60 * 3.4)
    assert run.pruning_seconds == pytest.approx(0.6 * 3.4)
    assert run.startup_seconds == pytest.approx(2.0)
    assert run.total_seconds == pytest.approx(60 * 3.4 + 8)
    assert run.device == "Test CPU, 1 thread"


def change(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_form_says_what_fell_back(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", {"host_syncs": "count"})
    change(folder / "summary.json", loader="TorchLoader", compiled=True, captured=False)
    (run,) = read([folder]).runs
    assert run.form == "TorchLoader, compiled, host syncs watched"


def test_seconds_an_epoch_leave_start_up_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a", FULL)
    rows = [json.loads(row) for row in (folder / "epochs.jsonl").read_text().splitlines()]
    rows[0] |= {"train_seconds": 900.0, "startup_seconds": 90.0}
    for row in rows[1:]:
        del row["startup_seconds"]  # as older records
    (folder / "epochs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run,) = read([folder]).runs
    assert run.epoch_seconds == pytest.approx(60)
    change(folder / "summary.json", epoch_seconds=55.5)
    (run,) = read([folder]).runs
    assert run.epoch_seconds == 55.5


def test_paths_are_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate(("x/a", "x/b", "y/a")):
        write_run(tmp_path / name, {"seed": seed})
    (tmp_path / "x" / "bench.jsonl").write_text(json.dumps(line()) + "\n")
    (tmp_path / "x" / "results.jsonl").write_text("{}\n")  # a summary of the runs beside it
    (tmp_path / "x" / "a" / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    inputs = read([Path("x/a"), tmp_path, Path("y")])
    assert [run.folder for run in inputs.runs] == [tmp_path / of for of in ("x/a", "x/b", "y/a")]
    assert [of.name for of in inputs.benchmarks] == ["bench.jsonl"]
    assert inputs.bad == {}


def test_a_folder_kept_shut_is_named_and_the_rest_reported(tmp_path, monkeypatch) -> None:
    write_run(tmp_path / "mine")
    (tmp_path / "shut").mkdir()
    within = Path.iterdir

    def iterdir(path: Path):
        if path.name == "shut":
            raise PermissionError(13, "Permission denied")
        return within(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    inputs = read([tmp_path])
    assert [run.name for run in inputs.runs] == ["mine"]
    assert [*inputs.bad] == [str(tmp_path / "shut")]


def test_an_incomplete_run(tmp_path: Path) -> None:
    write_run(tmp_path / "a", done=2)
    inputs = read([tmp_path])
    (run,) = inputs.runs
    assert inputs.bad == {}
    assert not run.complete
    assert run.saved_share == pytest.approx(0.1)


def test_a_torn_last_line_is_none(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", done=3) / "epochs.jsonl"
    whole = path.read_bytes()
    for cut in (1, 7, len(whole.splitlines()[-1])):
        path.write_bytes(whole[:-cut])
        inputs = read([tmp_path])
        assert inputs.bad == {}
        # Cut by its end alone, the line still says all.
        assert len(inputs.runs[0].epochs) == (3 if cut == 1 else 2)


def rows(path: Path, number: int, **changes: object) -> None:
    """Change one epoch's line."""
    lines = path.read_text().splitlines()
    lines[number] = json.dumps({**json.loads(lines[number]), **changes})
    path.write_text("\n".join([*lines, ""]))


EPOCH_DAMAGE = {
    "another type": {"kept": "800"},
    "another epoch": {"epoch": 3},
    "an epoch twice": {"epoch": 1},
}


@pytest.mark.parametrize("damage", EPOCH_DAMAGE.values(), ids=EPOCH_DAMAGE)
def test_damaged_epochs(tmp_path: Path, damage: dict[str, object]) -> None:
    """The run is reported as far as it can be read, and in no mean."""
    folder = write_run(tmp_path / "a")
    rows(folder / "epochs.jsonl", 1, **damage)
    inputs = read([tmp_path])
    (run,) = inputs.runs
    assert len(run.epochs) == 1
    assert not run.complete
    assert "DAMAGED" in run.state
    assert list(inputs.bad) == [str(folder)]
    assert "\n" not in inputs.bad[str(folder)]


@pytest.mark.parametrize("text", ["{", "[]", "1e999", '{"kept": NaN}', "\x00", "{" * 3000])
def test_a_line_that_is_no_object(tmp_path: Path, text: str) -> None:
    path = write_run(tmp_path / "a") / "epochs.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], text, *lines[3:], ""]))
    inputs = read([tmp_path])
    assert len(inputs.runs[0].epochs) == 2
    assert "line 3" in inputs.bad[str(tmp_path / "a")]


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("config.json", {"config": 1}, "config"),
        ("config.json", {"data": None}, "data"),
        ("summary.json", {"epochs": "4"}, "epochs"),
        ("summary.json", {"train_seconds": True}, "train_seconds"),
    ],
)
def test_damaged_records(tmp_path: Path, name: str, changes: dict, told: str) -> None:
    folder = write_run(tmp_path / "a")
    write_run(tmp_path / "b", {"seed": 1})
    change(folder / name, **changes)
    inputs = read([tmp_path])
    assert [run.name for run in inputs.runs] == ["b"]
    assert name in inputs.bad[str(folder)]
    assert told in inputs.bad[str(folder)]


@pytest.mark.parametrize("wrong", [{"ratio": "x"}, {"ratio": 1.5}, {"delta": None}, {"score": 1}])
def test_a_pruning_that_is_none(tmp_path: Path, wrong: dict) -> None:
    folder = write_run(tmp_path / "a")
    about = json.loads((folder / "config.json").read_text())
    change(folder / "config.json", config={**about["config"], **wrong})
    inputs = read([tmp_path])
    assert not inputs.runs
    assert "pruning" in inputs.bad[str(folder)]


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a")
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")  # would be waited for
    (write_run(tmp_path / "b") / "config.json").unlink()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\n")
    inputs = read([tmp_path, tmp_path / "nowhere"])
    assert not inputs.runs
    assert set(inputs.bad) == {
        str(tmp_path / name) for name in ("a", "b", "bytes.jsonl", "nowhere")
    }


def test_older_records(tmp_path: Path) -> None:
    """Those before data_fraction, policies' variants, start-up, phases and genuine's other name."""
    folder = write_run(tmp_path / "a", data="genuine")
    write_run(tmp_path / "b", {"seed": 1})
    about = json.loads((folder / "config.json").read_text())
    for name in ("data_fraction", "score", "ratio_schedule", "target_saving"):
        about["config"].pop(name)
    del about["samples"]
    (folder / "config.json").write_text(json.dumps(about))
    new = ("startup_seconds", "seconds", "joules", "phases", "score_histogram", "ratio")
    lines = (folder / "epochs.jsonl").read_text().splitlines()
    kept = [{k: v for k, v in json.loads(row).items() if k not in new} for row in lines]
    (folder / "epochs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    inputs = read([tmp_path])
    (section,) = sections(inputs.runs)
    assert inputs.bad == {}
    assert [run.complete for run in section.runs] == [True, True]


def test_benchmarks(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    good = [json.dumps(line()), json.dumps(line(part="update"))]
    path.write_text("\n".join([good[0], '{"benchmark": 1}', good[1], '{"torn']))
    inputs = read([path])
    (found,) = inputs.benchmarks
    assert [of.part for of in found.lines] == ["choose", "update"]
    assert found.damaged
    assert "line 2" in inputs.bad[str(path)]
    path.write_text("")
    assert list(read([path]).bad) == [str(path)]
