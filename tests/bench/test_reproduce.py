"""The reported tables anew: what is planned, what is trained of it, and what is kept of a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import reproduce
from reproduce import Options, make_plan, settle

from infobatch_fast.policies import POLICIES
from infobatch_fast.pruning import Pruning
from infobatch_fast.train import config, queue

FAKE = (sys.executable, str(Path(__file__).with_name("fake_trainer.py")))
CALL = "--table accuracy --dataset synthetic --preset quick --epochs 8".split()
FULL, SOFT = "synthetic-quick-e8-full-s0", "synthetic-quick-e8-soft-r{}-s0"
SHORTER = "synthetic-quick-e6-full-s0"  # 8 - 6 x 0.5 x 0.8 = 5.6 epochs
RUNS = [FULL, *(SOFT.format(ratio) for ratio in (0.3, 0.5, 0.7)), SHORTER]


def names(table: Any, **options: Any) -> list[str]:
    options |= {"preset": "paper", "out": Path("none")}
    plan = make_plan(settle(Options(table, **options), ()))
    assert len({planned.name for planned in plan}) == len(plan)
    return [planned.name.removeprefix("cifar10-paper-") for planned in plan]


@pytest.mark.parametrize(
    ("table", "expected"),
    [
        ("accuracy", "full soft-r0.3 soft-r0.5 soft-r0.7"),
        ("cost", "full soft-r0.3 soft-r0.5 soft-r0.7"),
        (
            "ablation",
            "random-r0.5-norescale-noanneal soft-r0.5-norescale-noanneal soft-r0.5-noanneal "
            "soft-r0.5-norescale soft-r0.5 hard-r0.5",
        ),
        (
            "policies",
            "full soft-save0.25-bls soft-save0.25-pods random-save0.25-norescale "
            + " ".join(f"{name}-save0.25" for name in POLICIES if name not in ("none", "random")),
        ),
    ],
)
def test_the_runs_of_a_table(table: str, expected: str) -> None:
    runs = {f"e200-{slug}-s0" for slug in expected.split()}
    assert set(names(table)) == runs | {"eX-full-s0"}


def test_the_runs_of_a_budget() -> None:
    runs = names("budget", epochs=16)
    assert [run for run in runs if "full" in run] == [f"e{n}-full-s0" for n in (16, 12, 10, 8)]
    of_half = {run.removesuffix("-s0") for run in runs if "0.5" in run or run.startswith("e12")}
    policies = ("soft", "hard", "ucb")
    assert of_half == {
        *(f"e16-{policy}-save0.5" for policy in policies),
        *(f"e12-{policy}-save0.333333" for policy in policies[1:]),
        *("e16-random-save0.5-norescale", "e12-full"),
    }
    # Half of four epochs is spent by two of full data.
    assert {"e2-full-s0", "e4-hard-save0.5-s0"} <= set(names("budget", epochs=4))


def test_all_tables_train_each_run_once_and_the_trainer_takes_their_commands() -> None:
    options = settle(Options(seeds=(3, 1), preset="paper", out=Path("none")), ())
    plan = make_plan(options)
    apart = {name for table in reproduce.TABLES for name in names(table, seeds=(3, 1))}
    assert {planned.name.removeprefix("cifar10-paper-") for planned in plan} == apart
    assert len(plan) == len(apart)
    tables = {planned.name.removeprefix("cifar10-paper-"): planned.tables for planned in plan}
    assert tables["e200-full-s3"] == ["accuracy", "cost", "policies", "budget"]
    assert tables["e200-soft-r0.5-s1"] == ["accuracy", "cost", "ablation"]
    for planned in plan:
        if planned.epochs is not None:
            taken = config.parse(planned.words, cuda=False).recorded()
            assert Pruning.of(taken).method == planned.pruning.method
            assert (taken["epochs"], f"s{taken['seed']}") == (planned.epochs, planned.name[-2:])
            assert planned.epochs == 200 or planned.tables == ["budget"]


@pytest.mark.parametrize(("epochs", "saving"), [(200, 0.25), (3, 0.25)])
def test_what_policies_save_is_possible(epochs: int, saving: float) -> None:
    prunings, main = reproduce.prunings_of("policies", epochs, ())
    assert main.target_saving == saving < (main.first_full_epoch(epochs) - 1) / epochs
    assert {pruning.target_saving for pruning in prunings[1:]} == {saving}


def test_ratios_scale_and_further_words_are_in_names_and_commands() -> None:
    options = Options(table="accuracy", ratios=(0.4,), scale=0.1, preset="paper")
    plan = make_plan(settle(options, ("--model", "r18")))
    assert [planned.name for planned in plan] == [
        f"cifar10-paper-scale0.1-{run}-s0"
        for run in ("e20-model-r18-full", "e20-model-r18-soft-r0.4", "eX-model-r18-full")
    ]
    assert " ".join(plan[1].words) == (
        "--preset paper --dataset cifar10 --seed 0 --epochs 20 --policy soft --ratio 0.4 "
        "--data-fraction 0.1 --model r18"
    )


@pytest.fixture
def call(tmp_path: Path, monkeypatch, capsys):
    """Call the command with the stand-in; returns the exit code and what it printed."""
    monkeypatch.setattr(queue, "TRAIN", FAKE)
    monkeypatch.setattr(queue, "REPORT", (sys.executable, "-S", "-c", "print('reported')"))
    monkeypatch.setenv("FAULTS", "{}")

    def call(*words: str, **faults: str) -> tuple[int, str]:
        monkeypatch.setenv("FAULTS", json.dumps(faults))
        code = reproduce.main([*CALL, "--out", str(tmp_path / "out"), *words])
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


def results(tmp_path: Path) -> dict[str, dict]:
    lines = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    return {line["name"]: line for line in map(json.loads, lines)}


def trained(said: str) -> list[str]:
    return re.findall(r"^\[\d/\d\] (synthetic\S+)$", said, re.M)


def test_a_call_and_a_second_which_trains_nothing(tmp_path: Path, call) -> None:
    code, said = call()
    assert (code, trained(said)) == (0, RUNS)
    assert "reported" in said
    lines = results(tmp_path)
    assert list(lines) == RUNS
    soft = lines[SOFT.format(0.5)]
    assert (soft["state"], soft["label"]) == ("done", "InfoBatch r=0.5")
    assert (soft["summary"]["accuracy_last"], soft["summary"]["samples_trained"]) == (0.5, 5600)
    assert lines[SHORTER]["summary"]["samples_trained"] == 6000
    assert str(tmp_path) not in json.dumps(lines)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code, said = call()
    assert (code, trained(said)) == (0, [])
    assert "nothing to train: all 5 runs are done" in said
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    code, said = call("--table", "ablation", "--dry-run")
    assert (code, said.count("--out")) == (0, 5)  # of six, one is done


def test_a_dry_run_writes_nothing_and_estimates(tmp_path: Path, call) -> None:
    code, said = call("--dry-run", "--seeds", "0", "4")
    assert (code, list(tmp_path.iterdir())) == (0, [])
    assert said.count("--policy soft --ratio 0.7") == 2
    # 10 s for 1,000 samples, which are a fiftieth; 8 passes less 8 x 0.875 x r x 0.8 of them.
    passes = 2 * (4 * 8 + 8 - 8 * 0.875 * 0.8 * (0.3 + 0.5 + 0.7 + 0.5))
    minutes = round(passes * 500 / 60)
    assert f"{minutes // 60} h {minutes % 60} min: {passes:.0f} passes over the data, 500 s" in said


@pytest.mark.parametrize("fault", ["exit 2", "kill", "no summary"])
def test_a_run_that_fails_is_survived_and_tried_again(tmp_path: Path, call, fault: str) -> None:
    bad = SOFT.format(0.5)
    code, said = call(**{"soft-r0.5": fault})
    assert (code, trained(said)) == (1, RUNS[:4])
    lines = results(tmp_path)
    assert [line["state"] for line in lines.values()] == "done done failed done planned".split()
    why = {"kill": "killed by SIGKILL", "no summary": "epoch 8/8"}.get(fault, "it broke")
    assert lines[bad]["reason"] == why
    assert f"not done   {bad}: {why}" in said
    assert "reported" in said
    code, said = call()
    again = f"{bad}, continued" if "exit" not in fault else bad
    assert code == 0
    assert re.findall(r"^\[3/5\] (synthetic.*)$", said, re.M) == [again]
    assert {line["state"] for line in results(tmp_path).values()} == {"done"}
    assert results(tmp_path)[bad]["resumed"] == ("exit" not in fault)


def test_a_mistake_of_the_first_run_stops_all(tmp_path: Path, call) -> None:
    code, said = call(**{"": "exit 2"})
    assert (code, trained(said)) == (2, [FULL])
    assert said.endswith("error: it broke\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_with_a_checkpoint(tmp_path: Path, call, number: int) -> None:
    folder = tmp_path / "out" / SOFT.format(0.3)
    threading.Thread(target=lambda: (hanging(folder), os.kill(os.getpid(), number))).start()
    code, said = call(**{"soft-r0.3": "hang"})
    assert code == 128 + number
    assert "1 of 5 runs are done" in said
    assert (folder / "checkpoint.pt").exists()
    assert results(tmp_path)[folder.name]["state"] == "interrupted"
    assert call()[0] == 0
    assert results(tmp_path)[folder.name]["resumed"]


def hanging(folder: Path) -> None:
    """Wait until the stand-in hangs in its third epoch."""
    lines = folder / "epochs.jsonl"
    for _ in range(400):
        if lines.exists() and lines.read_text().count("\n") == 3:
            return
        time.sleep(0.05)
    raise TimeoutError(folder)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_kill_leaves_no_orphan_and_loses_nothing(tmp_path: Path, call) -> None:
    words = [*CALL, "--out", "out"]
    code = f"import reproduce as r; r.queue.TRAIN = {FAKE}; r.main({words})"
    path = f"{Path(reproduce.__file__).parent}{os.pathsep}{Path(reproduce.__file__).parents[1]}"
    environment = {**os.environ, "PYTHONPATH": path, "FAULTS": '{"soft-r0.3": "hang"}'}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL
    )
    folder = tmp_path / "out" / SOFT.format(0.3)
    try:
        hanging(folder)
    finally:
        process.kill()
        process.wait()
    assert call()[0] == 0  # while the trainer may still be saving
    assert (folder / "checkpoint.pt").exists()
    assert results(tmp_path)[folder.name]["resumed"]


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--scale 0", "scale", "0.0"),
        ("--scale nan", "scale", "nan"),
        ("--ratios 0.5 1.5", "ratio", "1.5"),
        ("--epochs 10 --scale 0.1", "epochs", "10 x 0.1"),
        ("--table ablations", "table", "ablations"),
        ("--preset fast", "preset", "fast"),
        ("-- --seed=3", "--seed", "--seed=3"),
        ("-- --data_dir x", "--data-dir", "--data_dir"),
    ],
)
def test_mistakes_are_one_line(tmp_path: Path, call, words: str, name: str, value: str) -> None:
    code, said = call(*words.split())
    assert (code, said.count("\n")) == (2, 1)
    assert name in said
    assert value in said
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_record_is_one_line(tmp_path: Path, call) -> None:
    assert call("--ratios", "0.5")[0] == 0
    path = tmp_path / "out" / FULL / "summary.json"
    path.write_text("nonsense")
    code, said = call()
    assert (code, said.count("\n")) == (2, 1)
    assert str(path) in said
