"""The reported tables anew: what is planned, what is trained of it, and what is kept of a kill."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import reproduce
import reproduce_estimate
import reproduce_plan
import reproduce_records
import reproduce_runs
import torch
from report_made import write_run
from reproduce_child import Ended, run_child
from reproduce_estimate import pace_of_runs, samples_of, seconds_left, words_of
from reproduce_plan import (
    FULL,
    TABLES,
    Planned,
    Training,
    make_plan,
    make_setting,
    merged,
    most_saving,
    name_of,
    resolve,
    settings_words,
    shorter,
    target_saving,
)

from infobatch_fast.errors import UserError
from infobatch_fast.policies import POLICIES
from infobatch_fast.report.read import read
from infobatch_fast.train import config
from infobatch_fast.train import folder as record
from infobatch_fast.train import loop as train
from infobatch_fast.train.cli import Interrupted, Interrupts

BENCH = Path(reproduce.__file__)
TIMES = re.compile(r"seconds$|images_per_second|^phases$")
EXTRA = "--synthetic-samples 200 --batch-size 20 --max-lr 0.05 --loader torch".split()
CALL = "--table accuracy --dataset synthetic --preset quick --device cpu --epochs 8".split()
PAPER = make_setting("cifar10", "paper", "cpu", None, 1.0, None, ())
START = "--preset paper --dataset cifar10 --seed 0"


def plan_of(*tables: str, seeds: tuple[int, ...] = (0,), setting=PAPER) -> list[Planned]:
    return make_plan(setting, tables, seeds)


def words_by_name(plan: list[Planned]) -> list[tuple[str, str]]:
    """The method of each name, and its command."""
    return [
        (
            p.name.removeprefix("cifar10-paper-r50-"),
            "" if p.epochs is None else " ".join(settings_words(PAPER, p)),
        )
        for p in plan
    ]


def test_plan_of_accuracy_and_cost() -> None:
    plan = plan_of("accuracy")
    assert words_by_name(plan) == [
        ("e200-full-s0", f"{START} --epochs 200 --delta 0.0 --device cpu"),
        ("e200-soft-r0.3-s0", f"{START} --epochs 200 --policy soft --ratio 0.3 --device cpu"),
        ("e200-soft-r0.5-s0", f"{START} --epochs 200 --policy soft --ratio 0.5 --device cpu"),
        ("eX-full-s0", ""),
        ("e200-soft-r0.7-s0", f"{START} --epochs 200 --policy soft --ratio 0.7 --device cpu"),
    ]
    assert [p.after for p in plan] == [None] * 3 + ["cifar10-paper-r50-e200-soft-r0.5-s0", None]
    assert words_by_name(plan_of("cost")) == words_by_name(plan)
    assert [p.tables for p in plan_of("cost", "accuracy")] == [("accuracy", "cost")] * 5


def test_plan_of_the_ablation() -> None:
    def line(flags: str) -> str:
        return f"{START} --epochs 200 --policy {flags} --device cpu"

    assert words_by_name(plan_of("ablation")) == [
        (
            "e200-random-r0.5-norescale-noanneal-s0",
            line("random --ratio 0.5 --no-rescale --no-anneal"),
        ),
        ("e200-soft-r0.5-norescale-noanneal-s0", line("soft --ratio 0.5 --no-rescale --no-anneal")),
        ("e200-soft-r0.5-noanneal-s0", line("soft --ratio 0.5 --no-anneal")),
        ("e200-soft-r0.5-norescale-s0", line("soft --ratio 0.5 --no-rescale")),
        ("e200-soft-r0.5-s0", line("soft --ratio 0.5")),
        ("eX-full-s0", ""),
        ("e200-hard-r0.5-norescale-s0", line("hard --ratio 0.5 --no-rescale")),
    ]


def test_plan_of_the_policies() -> None:
    plan = plan_of("policies")
    trained = dict(words_by_name(plan))
    policies = [name for name in POLICIES if name != "none"]
    assert {"soft", "random", "hard"} <= set(policies)
    flags = {name: "" for name in policies} | {"random": " --no-rescale"}
    expected = {
        f"e200-{name}-save0.25{rest.replace(' --no-', '-no')}-s0": (
            f"{START} --epochs 200 --policy {name} --target-saving 0.25{rest} --device cpu"
        )
        for name, rest in flags.items()
    }
    target = f"{START} --epochs 200 --policy soft --target-saving 0.25"
    assert trained == expected | {
        "e200-full-s0": f"{START} --epochs 200 --delta 0.0 --device cpu",
        "e150-full-s0": f"{START} --epochs 150 --delta 0.0 --device cpu",
        "e200-soft-save0.25-bls-s0": f"{target} --score bls --device cpu",
        "e200-soft-save0.25-pods-s0": f"{target} --ratio-schedule pods --device cpu",
    }
    assert all(p.after is None for p in plan)


def test_all_tables_train_each_run_once() -> None:
    plan = plan_of(*TABLES, seeds=(3, 1))
    names = [p.name for p in plan]
    assert len(set(names)) == len(names)
    apart = {name for table in TABLES for name in [p.name for p in plan_of(table, seeds=(3, 1))]}
    assert set(names) == apart
    assert [p.seed for p in plan] == [3] * (len(plan) // 2) + [1] * (len(plan) // 2)
    tables = {p.name.removeprefix("cifar10-paper-r50-"): p.tables for p in plan}
    assert tables["e200-full-s3"] == ("accuracy", "cost", "policies")
    assert tables["e200-soft-r0.5-s1"] == ("accuracy", "cost", "ablation")
    assert tables["eX-full-s1"] == ("accuracy", "cost", "ablation")
    assert tables["e150-full-s3"] == ("policies",)


def test_the_trainer_takes_every_command() -> None:
    for planned in plan_of(*TABLES):
        if planned.epochs is not None:
            settings = reproduce_plan.expected_config(PAPER, planned)
            assert (settings.seed, settings.epochs) == (0, planned.epochs)
            assert settings.delta == planned.training.delta
            if planned.training.delta:
                t = planned.training
                assert (settings.policy, settings.rescale, settings.anneal, settings.score) == (
                    (t.policy, t.rescale, t.anneal, t.score)
                )
                assert (settings.ratio_schedule, settings.target_saving) == (
                    (t.ratio_schedule, t.target_saving)
                )


def test_names_are_made_of_the_settings() -> None:
    def name(scale: float = 1.0, extra: tuple[str, ...] = (), preset: str = "quick") -> str:
        setting = make_setting("cifar100", preset, "cpu", 40, scale, None, extra)
        return name_of(setting, Training("hard", 0.3), 7, setting.epochs)

    assert name() == "cifar100-quick-small-e40-hard-r0.3-s7"
    assert name(0.25) == "cifar100-quick-small-scale0.25-e10-hard-r0.3-s7"
    assert name(preset="paper") == "cifar100-paper-r50-e40-hard-r0.3-s7"
    hashed = name(extra=("--batch-size", "64"))
    assert re.fullmatch(r"cifar100-quick-small-e40-hard-r0\.3-s7-[0-9a-f]{8}", hashed)
    assert hashed != name(extra=("--batch-size", "65"))
    assert "-r18-" in name(extra=("--model", "r18"))


def test_scale_is_in_every_command() -> None:
    setting = make_setting("cifar10", "paper", "cpu", None, 0.1, Path("there"), ())
    assert (setting.epochs, setting.samples) == (20, 5000)
    first = plan_of("accuracy", setting=setting)[0]
    words = reproduce_plan.command_words(setting, first, Path("here"), begun=False)
    assert " ".join(words) == (
        f"{START} --epochs 20 --delta 0.0 --data-fraction 0.1 --device cpu "
        "--data-dir there --out here"
    )
    again = reproduce_plan.command_words(setting, first, Path("here"), begun=True)
    assert " ".join(again) == "--resume here --data-dir there"


@pytest.mark.parametrize(
    ("epochs", "delta", "target"),
    [
        (200, 0.875, 0.25),  # of at most 174/200
        (2, 0.875, 0.25),
        (8, 0.375, 0.125),  # of at most 2/8, which is not above a quarter
        (10, 0.2, 0.05),
        (7, 0.25, 0.0714),
    ],
)
def test_the_target_is_below_what_the_epochs_allow(epochs, delta, target) -> None:
    assert target_saving(epochs, delta) == target < most_saving(epochs, delta)


def test_the_most_that_is_saved() -> None:
    assert most_saving(200) == 174 / 200  # 175 epochs prune but the first
    assert most_saving(200, 1.0) == 199 / 200
    assert most_saving(2) == 0.5
    assert most_saving(1) == 0.0
    assert target_saving(2) == 0.25


def test_training_shorter_is_planned_after_the_run_it_depends_on() -> None:
    plan = plan_of("accuracy", seeds=(0, 1))
    main = "cifar10-paper-r50-e200-soft-r0.5-s1"
    found = resolve(PAPER, plan, {main: 0.3512}.get)
    by_name = {p.name: p for p in found}
    assert by_name["cifar10-paper-r50-e130-full-s1"].epochs == 130  # 200 x 0.6488 = 129.76
    assert by_name["cifar10-paper-r50-e130-full-s1"].training == FULL
    assert by_name["cifar10-paper-r50-eX-full-s0"].epochs is None
    assert len(found) == len(plan)
    # Where next to nothing was saved it is the run on full data, and is not trained twice.
    same = resolve(PAPER, plan, {main: 0.001}.get)
    assert len(same) == len(plan) - 1
    assert [shorter(8, share) for share in (0.0, 0.24, 0.5, 0.99)] == [8, 6, 4, 1]


def test_runs_of_one_name_are_one() -> None:
    a, b = (Planned("n", (t,), FULL, 0, 3) for t in ("policies", "accuracy"))
    assert merged([a, b]) == [Planned("n", ("accuracy", "policies"), FULL, 0, 3)]


def test_the_estimate(tmp_path: Path) -> None:
    # Of 1000 samples, 4 epochs: 1000 in the first and the last, 800 between; 60 s a full epoch.
    runs = read(
        [
            write_run(tmp_path / "a", {"epochs": 4}),
            write_run(tmp_path / "b", {"epochs": 4, "model": "r18"}),
            write_run(tmp_path / "c", {"epochs": 4, "seed": 1}, done=2),
        ]
    ).runs
    device = runs[0].about["device"]
    pace = pace_of_runs(runs, "small", device)
    assert pace is not None
    assert pace.source == "1 finished run of small here"
    assert pace.seconds == pytest.approx(3600 * runs[0].device_hours / runs[0].trained)
    assert pace_of_runs(runs, "r50", device) is None
    assert pace_of_runs(runs, "small", {**device, "name": "another"}) is None

    full, soft = (Planned("n", (), t, 0, 200) for t in (FULL, Training()))
    assert samples_of(PAPER, full, 0.0) == 10_000_000
    assert soft.training.saving(200) == pytest.approx(0.87 * 0.5 * 0.8)
    assert samples_of(PAPER, soft, 0.348) == 6_520_000
    assert seconds_left(PAPER, soft, 0.001, 0.348, 0.75) == pytest.approx(1630)
    assert Training(target_saving=0.25).saving(200) == 0.25
    assert Training("random", anneal=False).saving(200) == pytest.approx(0.995 * 0.5)
    assert [words_of(s) for s in (0.2, 40, 61, 3599, 3600, 11_100)] == [
        *("1 s", "40 s", "1 min", "1 h 0 min", "1 h 0 min", "3 h 5 min")
    ]


def test_a_few_steps_are_timed(capsys) -> None:
    reproduce_estimate.main("--preset quick --device cpu --batch-size 8".split())
    seconds, batch = json.loads(capsys.readouterr().out)
    assert batch == 8
    assert 1e-6 < seconds < 10
    settings = config.parse(["--preset", "quick"], cuda=False)
    # Where there is no time, a step of two.
    assert reproduce_estimate.time_steps(settings, torch.device("cpu"), 0.0)[1] == 2


class InProcess:
    """The trainer without its two seconds of imports; some of its runs fail."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.failing: dict[str, Ended] = {}
        self.reports: list[list[str]] = []

    def __call__(self, command, interrupts, on_line, log=None) -> Ended:
        words = list(command[len(reproduce.TRAIN) :])
        assert tuple(command[: len(reproduce.TRAIN)]) == reproduce.TRAIN
        self.calls.append(words)
        for part, ended in self.failing.items():
            if part in words[-1]:
                return ended
        on_line("epoch 1/8  kept")
        return Ended(train.main(words), [])

    @property
    def names(self) -> list[str]:
        return [Path(words[-1]).name for words in self.calls]


@pytest.fixture
def trainer(monkeypatch) -> InProcess:
    trainer = InProcess()
    monkeypatch.setattr(reproduce_runs, "run_child", trainer)
    monkeypatch.setattr(reproduce.report, "run", lambda words, say: trainer.reports.append(words))
    timed = Ended(0, ["[0.002, 20]"])
    monkeypatch.setattr(reproduce_estimate, "run_child", lambda *rest: timed)
    return trainer


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a call that nothing disturbed."""
    out = tmp_path_factory.mktemp("reproduce") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce_runs, "run_child", InProcess())
        patch.setattr(reproduce_estimate, "run_child", lambda *rest: Ended(1, []))
        assert reproduce.main([*CALL, "--out", str(out), "--", *EXTRA]) == 0
    return out


def call(out: Path, *words: str) -> int:
    return reproduce.main([*CALL, *words, "--out", str(out), "--", *EXTRA])


def results(out: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len({line["name"] for line in lines}) == len(lines)
    return {short(line["name"]): line for line in lines}


def short(name: str) -> str:
    return re.sub(r"^synthetic-quick-small-|-[0-9a-f]{8}$", "", name)


def results_of(folder: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """What a run's results are but for times."""
    lines = [json.loads(line) for line in (folder / record.EPOCHS).read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if not TIMES.search(k)} for line in lines]
    return kept, torch.load(folder / record.WEIGHTS, weights_only=True)


def test_what_a_call_leaves(whole: Path) -> None:
    lines = results(whole)
    assert len(lines) == 5
    soft = lines["e8-soft-r0.5-s0"]
    folder = whole / soft["name"]
    summary = json.loads((folder / "summary.json").read_text())
    about = json.loads((folder / "config.json").read_text())
    assert soft["tables"] == ["accuracy"]
    assert soft["state"] == "done"
    assert soft["reason"] is None
    for name in ("accuracy_last", "accuracy_best", "pruning_seconds", "seconds", "saved_share"):
        assert soft[name] == pytest.approx(summary[name])
    assert soft["samples_trained"] == summary["samples_trained"]
    minutes = (summary["train_seconds"] + summary["pruning_seconds"]) / 60
    assert soft["minutes"] == pytest.approx(minutes)
    assert soft["device_hours"] == pytest.approx(summary["seconds"] / 3600)
    for name in ("commit", "source_hash", "device", "packages", "data"):
        assert soft[name] == about[name]
    assert soft["data"] == soft["dataset"] == "synthetic"
    assert (soft["model"], soft["epochs"], soft["scale"], soft["data_fraction"]) == (
        ("small", 8, 1.0, 1.0)
    )
    assert soft["method"] == {
        "policy": "soft",
        "ratio": 0.5,
        "delta": 0.875,
        "rescale": True,
        "anneal": True,
        "score": "loss",
        "ratio_schedule": "constant",
        "target_saving": None,
    }
    assert soft["command"] == [
        *("python", "-m", "infobatch_fast.train", "--preset", "quick", "--dataset", "synthetic"),
        *("--seed", "0", "--epochs", "8", "--policy", "soft", "--ratio", "0.5"),
        *("--device", "cpu", *EXTRA),
    ]
    [epochs] = {line["epochs"] for name, line in lines.items() if name != "e8-full-s0"} - {8}
    assert epochs == round(8 * (1 - soft["saved_share"])) < 8
    assert lines[f"e{epochs}-full-s0"]["saved_share"] == 0
    assert str(whole) not in (whole / "results.jsonl").read_text()
    report = (whole / "report" / "report.md").read_text()
    assert all(f"InfoBatch r={ratio}" in report for ratio in (0.3, 0.5, 0.7))
    assert "(training shorter)" in report


def test_a_second_call_trains_nothing(whole: Path, trainer, monkeypatch, capsys) -> None:
    monkeypatch.setattr(reproduce, "measured_pace", lambda *rest: pytest.fail("it calibrated"))
    before = {p: p.read_bytes() for p in whole.rglob("*") if p.is_file() and "report" not in str(p)}
    assert call(whole) == 0
    assert trainer.calls == []
    assert "nothing to train: all 5 runs are done" in capsys.readouterr().out
    names = [line["name"] for line in results(whole).values()]
    folders = [str(whole / name) for name in names]
    assert trainer.reports == [[*folders, "--out", str(whole / "report")]]
    assert before == {path: path.read_bytes() for path in before}


def test_more_tables_train_only_what_is_missing(whole, tmp_path, trainer, capsys) -> None:
    out = shutil.copytree(whole, tmp_path / "out")
    assert call(out, "--table", "policies", "--dry-run") == 0
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if "e8-full-s0" in line)
    assert "| done" in row
    assert "from 5 finished runs of small here" in shown
    assert "--target-saving 0.25 --score bls" in shown
    assert trainer.calls == []


def test_a_dry_run_writes_nothing(tmp_path: Path, trainer, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(Path("out"), "--dry-run", "--seeds", "0", "4") == 0
    assert trainer.calls == []
    assert list(tmp_path.iterdir()) == []
    shown = capsys.readouterr().out
    assert shown.count("--policy soft --ratio 0.7") == 2
    assert "after synthetic-quick-small-e8-soft-r0.5-s4-" in shown
    assert "full data for as many whole epochs" in shown
    # 200 samples x 8 epochs, less 6/8 x r x 0.8 of them; the last as many as r = 0.5.
    samples = 1600 + 1312 + 1120 + 928 + 1120
    assert f"{2 * samples:,} samples at 2.00 ms each" in shown
    assert f"{round(2 * samples * 0.002)} s for 10 runs" in shown


def test_a_run_that_fails_is_survived(tmp_path: Path, trainer, capsys) -> None:
    trainer.failing = {"soft-r0.5": Ended(1, ["epoch 1", "error: it diverged", "  "])}
    assert call(tmp_path / "out") == 1
    shown = capsys.readouterr()
    assert [short(name) for name in trainer.names] == [
        *("e8-full-s0", "e8-soft-r0.3-s0", "e8-soft-r0.5-s0", "e8-soft-r0.7-s0")
    ]
    assert shown.err.splitlines()[-1] == "error: 2 runs of 5 not done"
    lines = results(tmp_path / "out")
    failed = lines["e8-soft-r0.5-s0"]
    assert (failed["state"], failed["reason"]) == ("failed", "it diverged")
    assert failed["accuracy_last"] is None
    assert failed["minutes"] is None
    done = [line["name"] for line in lines.values() if line["state"] == "done"]
    assert [Path(word).name for word in trainer.reports[0][:-2]] == done
    waiting = lines["eX-full-s0"]
    assert waiting["state"] == "planned"
    assert waiting["reason"] == f"it follows {failed['name']}, which is not done"
    assert waiting["epochs"] is waiting["command"] is None
    assert lines["e8-soft-r0.7-s0"]["state"] == "done"
    table = shown.out[shown.out.index("Not done") :]
    assert "| failed  | it diverged" in table

    trainer.failing, trainer.calls = {}, []
    assert call(tmp_path / "out") == 0
    assert len(trainer.calls) == 2
    assert short(trainer.names[0]) == "e8-soft-r0.5-s0"
    assert {line["state"] for line in results(tmp_path / "out").values()} == {"done"}


def test_a_damaged_checkpoint_of_the_first_run_left_is_survived(
    whole: Path, tmp_path: Path, trainer, capsys
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    first, other = (next(out.glob(f"*-{name}-s0-*")) for name in ("e8-full", "e8-soft-r0.7"))
    (first / "summary.json").unlink()
    (first / "checkpoint.pt").write_bytes(b"damaged" * 99)
    shutil.rmtree(other)
    assert call(out) == 1
    assert trainer.names == [first.name, other.name]
    lines = {line["name"]: line for line in results(out).values()}
    assert lines[first.name]["state"] == "failed"
    assert lines[other.name]["state"] == "done"
    assert len(trainer.reports) == 1


def test_a_mistake_of_the_first_run_stops_all(tmp_path: Path, trainer, capsys) -> None:
    trainer.failing = {"": Ended(2, ["error: max_lr must be lower"])}
    assert call(tmp_path / "out") == 2
    assert len(trainer.calls) == 1
    assert capsys.readouterr().err == "error: max_lr must be lower\n"
    # A later one is survived: what the others need is there.
    trainer.failing, trainer.calls = {"soft": Ended(2, ["error: no room"])}, []
    assert call(tmp_path / "out") == 1
    assert len(trainer.calls) == 4
    reasons = {name: line["reason"] for name, line in results(tmp_path / "out").items()}
    assert reasons["e8-full-s0"] is None
    assert reasons["e8-soft-r0.7-s0"] == "no room"


def test_a_folder_of_other_settings(whole, tmp_path, trainer, capsys) -> None:
    out = shutil.copytree(whole, tmp_path / "out")
    name = results(out)["e8-soft-r0.3-s0"]["name"]
    path = out / name / "config.json"
    about = json.loads(path.read_text())
    about["config"] |= {"max_lr": 0.06, "telemetry": False}
    path.write_text(json.dumps(about))
    capsys.readouterr()
    assert call(out) == 2
    assert trainer.calls == []
    error = capsys.readouterr().err
    assert f"{out / name} must be a run of the planned settings" in error
    assert error.endswith("it has max_lr 0.06 instead of 0.05\n")


def test_a_record_that_is_damaged(whole, tmp_path, trainer, monkeypatch, capsys) -> None:
    out = shutil.copytree(whole, tmp_path / "out")
    folder = out / results(out)["e8-soft-r0.3-s0"]["name"]
    (folder / "epochs.jsonl").write_text("nonsense\n")
    assert call(out) == 2
    assert f"{folder} must have a whole record" in capsys.readouterr().err
    (folder / "summary.json").unlink()  # one that is not finished is continued
    waited: list[Path] = []
    monkeypatch.setattr(reproduce_runs, "wait_for", lambda path, say: waited.append(path))
    assert call(out) == 0
    assert waited == [folder]
    assert trainer.calls == [["--resume", str(folder)]]
    assert results_of(folder)[0] == results_of(whole / folder.name)[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--scale 0", "scale must be in (0, 1], got 0.0"),
        ("--scale 1.01", "scale must be in (0, 1], got 1.01"),
        ("--scale nan", "scale must be in (0, 1], got nan"),
        ("--seeds", "seeds must hold at least one, got none"),
        ("--seeds 1 2 1", "seeds must differ, got 1 2 1"),
        ("--seeds 0 -1", "seeds must be in [0, 2**63), got 0 -1"),
        ("--epochs 0", "epochs must be at least 1, got 0"),
        ("--table ablations", "did you mean ablation?"),
        ("--dataset cifar", "dataset must be one of cifar10, cifar100, synthetic"),
        ("--table accuracy --epochs 1", "epochs times scale must be at least 2"),
        (
            "--epochs 10 --scale 0.1",
            "epochs times scale must be at least 2, as the first prunes nothing, got 10 x 0.1",
        ),
        ("-- --seed 3", "the words after -- must leave --seed to the plan, got --seed"),
        ("-- --data_dir=x", "the words after -- must leave --data-dir to the plan"),
        ("-- --nonsense 3", "--nonsense"),
        ("-- --batch-size 0", "batch_size must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line(tmp_path, trainer, monkeypatch, capsys, words, message) -> None:
    monkeypatch.chdir(tmp_path)
    base = ["--dataset", "synthetic", "--preset", "quick", "--device", "cpu"]
    assert reproduce.main([*base, *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert trainer.calls == []
    assert list(tmp_path.iterdir()) == []


def test_a_missing_data_set(tmp_path, trainer, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INFOBATCH_DATA", str(tmp_path / "none"))
    download = "infobatch_fast.data.cifar.download_archive"
    monkeypatch.setattr(download, lambda *rest: (_ for _ in ()).throw(OSError("no network")))
    assert reproduce.main("--table cost --preset paper --device cpu".split()) == 2
    assert "data_dir" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    words = "--table cost --preset quick --device cpu --dry-run".split()
    assert reproduce.main([*words, "--scale", "0.5", "--", *EXTRA]) == 0
    shown = capsys.readouterr().out
    assert "SYNTHETIC" in shown
    assert "0.5 of the epochs and of the data: NOT the reported experiments" in shown
    assert "synthetic-quick-small-scale0.5-e5-full-s0" in shown


def script(text: str) -> list[str]:
    """A command that is told of signals, in Python."""
    start = "import os, signal, sys, time\nsay = lambda t: print(t, flush=True)\n"
    return [sys.executable, "-S", "-c", start + text]


def test_a_child_and_its_log(tmp_path: Path) -> None:
    lines: list[str] = []
    log = tmp_path / "log"
    with Interrupts() as interrupts:
        ended = run_child(
            script("say('one'); print('error: two', file=sys.stderr); sys.exit(3)"),
            *(interrupts, lines.append, log),
        )
        assert (ended.code, lines) == (3, ["one", "error: two"])
        assert ended.why == "two"
        ended = run_child(script("sys.stdout.write('half')"), interrupts, lines.append, log)
        assert ended == Ended(0, ["half"])
        assert log.read_text() == "one\nerror: two\nhalf\n"
        killed = run_child(script("os.kill(os.getpid(), 9)"), interrupts, lines.append)
        assert killed.why == "killed by SIGKILL"
        assert run_child(script("sys.exit(4)"), interrupts, lines.append).why == (
            "it said nothing (exit code 4)"
        )
        with pytest.raises(UserError, match="cannot write"):
            run_child(script(""), interrupts, lines.append, tmp_path / "none" / "log")


SAVES = """
def handle(number, frame):
    global seen
    seen += 1
    say(f"saved {number}")
    if seen == LAST: sys.exit(128 + number)
seen = 0
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, handle)
say("ready")
while True: signal.pause()
"""


@pytest.mark.parametrize(("number", "last"), [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_signals_are_passed_on(tmp_path: Path, number: int, last: int) -> None:
    def on_line(line: str) -> None:
        if line == "ready" or (last == 2 and line.startswith("saved")):
            os.kill(os.getpid(), number)

    with Interrupts() as interrupts, pytest.raises(Interrupted) as stop:
        run_child(script(SAVES.replace("LAST", str(last))), interrupts, on_line, tmp_path / "log")
    assert stop.value.code == 128 + number
    assert (tmp_path / "log").read_text().splitlines()[:2] == ["ready", f"saved {number}"]


def test_a_child_ends_with_what_shows_it(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    ends = f"signal.signal(15, lambda *a: (open({str(saved)!r}, 'w'), sys.exit(0)))\n"

    def deaf(line: str) -> None:
        raise KeyError(line)

    with Interrupts() as interrupts, pytest.raises(KeyError, match="ready"):
        run_child(script(ends + "say('ready')\nsignal.pause()"), interrupts, deaf)
    assert saved.exists()


def test_waiting_for_a_run_that_is_locked(tmp_path: Path) -> None:
    said: list[str] = []
    reproduce_records.wait_for(tmp_path / "none", said.append)
    reproduce_records.wait_for(tmp_path, said.append)
    assert said == []
    text = f"import fcntl\nn = os.open({str(tmp_path)!r}, 0); fcntl.flock(n, 2)\nsay('has it')\n"
    text += "sys.stdin.readline(); open(os.path.join(sys.argv[1], 'end'), 'w')"
    holder = subprocess.Popen(
        [*script(text), str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    holder.stdout.readline()

    def say(line: str) -> None:
        said.append(line)
        assert holder.stdin is not None
        holder.stdin.write(b"\n")
        holder.stdin.flush()

    reproduce_records.wait_for(tmp_path, say)
    assert (tmp_path / "end").exists()
    holder.communicate()
    assert said == [f"waiting    for another process that trains in {tmp_path}"]


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    child = f"""
import fcntl
def handle(number, frame): open({str(tmp_path / "saved")!r}, "w"); sys.exit()
signal.signal(signal.SIGTERM, handle)
fcntl.flock(os.open({str(tmp_path)!r}, 0), fcntl.LOCK_EX)
say("ready")
while True: signal.pause()
"""
    parent = f"""
from infobatch_fast.train.cli import Interrupts
from reproduce_child import run_child
with Interrupts() as interrupts: run_child({script(child)!r}, interrupts, print)
"""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", parent],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{BENCH.parent}:{BENCH.parents[1]}"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.kill()
    process.communicate()
    said: list[str] = []
    reproduce_records.wait_for(tmp_path, said.append)  # as another call does
    assert (tmp_path / "saved").exists()


@pytest.mark.slow
def test_kills_change_no_results(whole: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = shutil.copytree(whole, tmp_path / "out")
    name = results(out)["e8-soft-r0.7-s0"]["name"]
    shutil.rmtree(out / name)
    words = [*CALL, "--out", str(out), "--", *EXTRA]

    process = subprocess.Popen(
        [sys.executable, BENCH, *words], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    shown = [line for line in iter(process.stdout.readline, "") if _killed(process, line)]
    process.communicate()
    assert shown
    assert process.returncode == -signal.SIGKILL
    assert (out / name / record.CHECKPOINT).exists()
    assert not (out / name / record.SUMMARY).exists()

    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if re.search(r"\[5/5\] epoch [3-6]/8", line) and interrupts.received is None:
            os.kill(os.getpid(), signal.SIGINT)

    with Interrupts() as interrupts, pytest.raises(Interrupted) as stop:
        reproduce.run(words, interrupts, say)
    assert stop.value.code == 130
    assert str(stop.value) == "stopped; 4 of 5 runs are done; the same command continues"
    assert f"[5/5] {name}, continued" in said
    line = results(out)[short(name)]
    assert line["state"] == "interrupted"
    assert re.fullmatch("[3-7] of 8 epochs are done", line["reason"])
    assert not (out / name / record.SUMMARY).exists()

    monkeypatch.setattr(reproduce.report, "run", lambda words, say: None)
    assert reproduce.main(words) == 0
    (epochs, weights), (expected, same) = results_of(out / name), results_of(whole / name)
    assert epochs == expected
    assert weights.keys() == same.keys()
    assert all(torch.equal(weights[key], same[key]) for key in same)
    assert results(out)[short(name)]["state"] == "done"
    log = (out / f"{name}.log").read_text()
    assert "continue with --resume" in log
    assert "epoch 8/8" in log


def _killed(process: subprocess.Popen[str], line: str) -> bool:
    """Whether this line was the moment to kill the benchmark, and its trainer with it."""
    if not re.search(r"\[5/5\] epoch 2/8", line):
        return False
    [child] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for number in (int(child), process.pid):
        os.kill(number, signal.SIGKILL)
    return True
