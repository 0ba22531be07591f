"""The trainer as a user runs it: records, resuming after a kill, and every mistake's one line."""

import contextlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import (
    TINY,
    arrays_of,
    assert_alike,
    epochs_of,
    fails,
    lines_of,
    resume,
    run,
    summary_of,
)
from torchvision.transforms.functional import normalize

import infobatch_fast
from infobatch_fast import InfoBatch
from infobatch_fast.data.synthetic import make_synthetic
from infobatch_fast.plan import Plan
from infobatch_fast.policies import POLICIES
from infobatch_fast.telemetry.phases import PHASES
from infobatch_fast.train import __main__ as command
from infobatch_fast.train import console, loop, main, records
from infobatch_fast.train import folder as record
from infobatch_fast.train.cli import Interrupts
from infobatch_fast.train.distributed import Ranks
from infobatch_fast.train.ledger import Ledger
from infobatch_fast.train.models import make_model
from infobatch_fast.train.records import RunRecord, Summary
from infobatch_fast.train.schedule import one_cycle

STEP = loop.TrainStep


def spawn(*arguments: object) -> subprocess.Popen:
    """The trainer in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "infobatch_fast.train", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert run("--out", folder) == 0
    return folder


def copied(finished: Path, to: Path) -> Path:
    """The run as it is when it is not finished yet."""
    shutil.copytree(finished, to)
    (to / "summary.json").unlink()
    return to


def test_what_a_run_leaves(finished: Path, capsys) -> None:
    arrays = [f"{name}.npy" for name in arrays_of(finished)]
    files = ["checkpoint.pt", "config.json", "epochs.jsonl", "model.pt", "summary.json"]
    assert sorted(os.listdir(finished)) == sorted([*arrays, *files])
    about = records.read(RunRecord, finished / records.CONFIG)
    assert (about.config["dataset"], about.data, about.device["type"]) == (
        *("synthetic", "synthetic"),
        "cpu",
    )
    assert about.samples == {"train": 120, "test": 24}
    assert about.source_hash == record.source_hash()
    assert about.packages["torch"] == torch.__version__.split("+")[0]
    assert not re.search(r'"/\w', (finished / records.CONFIG).read_text())  # no places
    summary, lines = summary_of(finished), lines_of(finished)
    assert records.read(Summary, finished / records.SUMMARY).samples_saved > 0
    kept = [line["kept"] for line in lines]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    # floor(4 * 0.875) = 3: of four epochs the second and the third prune.
    assert kept[0] == kept[3] == 120 > max(kept[1:3])
    for line in lines:
        n = line["prunable"]
        assert line["kept"] == 120 - n + (max(1, round(0.5 * n)) if n else 0)
        assert sum(line["score_histogram"]["counts"]) == 120
    of = {
        **{"epochs": 4, "samples_trained": sum(kept), "samples_saved": 480 - sum(kept)},
        **{"saved_share": 1 - sum(kept) / 480, "accuracy_last": lines[-1]["accuracy"]},
        **{"accuracy_best": max(line["accuracy"] for line in lines), "data": "synthetic"},
        **{"compiled": False, "captured": False, "by_kernels": False, "loader": "TorchLoader"},
        **{"update_timed": True, "host_syncs": None, "startup_seconds": 0},
    }
    assert {name: summary[name] for name in of} == pytest.approx(of)
    assert summary["nvml"]["absent"] == {"all": "the device is no GPU"}
    parts = ("train", "pruning", "startup", "evaluation", "checkpoint")
    assert summary["seconds"] >= sum(summary[f"{part}_seconds"] for part in parts)
    for line in [*lines, summary]:
        assert tuple(line["phases"]) == PHASES
        assert sum(line["phases"].values()) == pytest.approx(line["seconds"], rel=0.05)
        assert line["joules"] is None
    assert epochs_of(finished)[-1]["lr"] < 1e-3 < epochs_of(finished)[1]["lr"]
    assert resume(finished) == 0  # nothing to do: says it once more
    out = capsys.readouterr().out
    for name in ("accuracy", "time", "phases", "samples", "energy", "memory", "form", "run"):
        assert re.search(rf"^{name} +\S", out, re.M)
    assert "SYNTHETIC" in out.splitlines()[-1]


def test_evaluate_trains_nothing(finished: Path, tmp_path, capsys) -> None:
    data = make_synthetic(120, 24, 10, seed=0)
    model = make_model("small", 10)
    model.load_state_dict(torch.load(finished / "model.pt", weights_only=True))
    images = data.test_images.permute(0, 3, 1, 2).float() / 255
    images = normalize(images, list(data.mean), list(data.std))
    with torch.no_grad():
        right = (model.eval()(images).argmax(1) == data.test_labels).double().mean().item()
    assert summary_of(finished)["accuracy_last"] == pytest.approx(right, abs=1e-9)
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    for target in (finished, finished / "checkpoint.pt", finished / "model.pt"):
        assert main(["--evaluate", str(target), "--device", "cpu"]) == 0
        assert f"test accuracy {right:.2%}" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in finished.iterdir()}
    alone = tmp_path / "alone.pt"
    shutil.copy(finished / "model.pt", alone)
    assert run("--evaluate", alone, "--model", "small") == 0
    assert f"test accuracy {right:.2%}" in capsys.readouterr().out
    assert "does not fit r18" in fails(capsys, "--evaluate", alone, *TINY, "--model", "r18")
    torch.save({"a": 1}, alone)
    assert "weights" in fails(capsys, "--evaluate", alone)  # and nothing of data


def test_evaluation_is_in_fixed_batches_of_the_plain_network() -> None:
    sizes: list[int] = []

    class Model(torch.nn.Module):
        def forward(self, images):
            sizes.append(len(images))
            return torch.nn.functional.one_hot(torch.zeros(len(images), dtype=torch.int64), 10)

    data = make_synthetic(10, 2050, 10)
    share = (data.test_labels == 0).double().mean().item()
    tests = loop.for_testing(data, "auto", Ranks())
    assert loop.evaluate(Model(), tests, "off", Ranks()) == pytest.approx(share)
    assert sizes == [1000, 1000, 50]


def test_kill_9_then_resume_is_bit_for_bit(finished: Path, tmp_path) -> None:
    folder, target = tmp_path / "killed", tmp_path / "killed/checkpoint.pt"
    process = spawn(*TINY, "--out", folder, "--checkpoint-every", 4)
    seen: set[int] = set()
    # Kill it in the middle of an epoch: at its fourth checkpoint, of four steps each.
    while len(seen) < 4 and process.poll() is None:
        if target.exists():
            seen.add(target.stat().st_mtime_ns)
        time.sleep(0.001)  # on two cores it would else take one
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    with open(folder / "epochs.jsonl", "a") as file:  # as if killed while it added a line
        file.write('{"epoch": 99, "ke')
    assert resume(folder) == 0
    assert_alike(folder, finished)


# Where the signal comes: at the end of a step (counted from 1) or of an evaluation, or with the
# epoch's line; and the checkpoint that must come of it, as (epochs finished, steps of the next).
WHEN = {
    "step 4": (0, 4),
    "step 6": (0, 6),
    "step 9": (1, 3),
    "evaluate 2": (1, None),
    "epoch_line 3": (3, 0),
}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.mark.parametrize("when", WHEN)
def test_a_signal_at_any_moment(finished: Path, tmp_path, capsys, monkeypatch, when: str) -> None:
    place, count = when.split()
    number = SIGNALS[int(count) % 3]
    calls: list[str] = []

    def strike_in(name: str, owner, attribute: str) -> None:
        function = getattr(owner, attribute)

        def wrapped(*args, **kwargs):
            result = function(*args, **kwargs)
            calls.append(name)
            if name == place and calls.count(name) == int(count):
                os.kill(os.getpid(), number)
            return result

        monkeypatch.setattr(owner, attribute, wrapped)

    strike_in("step", STEP, "__call__")
    strike_in("evaluate", loop, "evaluate")
    strike_in("epoch_line", console, "epoch_line")
    folder = tmp_path / "stopped"
    assert run("--out", folder) == 128 + number
    assert capsys.readouterr().err.strip() == f"stopped; continue with --resume {folder}"
    monkeypatch.undo()
    state = record.load(folder / "checkpoint.pt")
    epoch, steps = WHEN[when]
    if steps is None:  # during the evaluation: all of the epoch's steps are done
        steps = math.ceil(state["plan"]["indices"].numel() / 20)
    assert (state["epoch"], state["number"]) == (epoch, steps)
    assert resume(folder) == 0
    assert_alike(folder, finished)


def test_what_nohup_ignores_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Interrupts():
        os.kill(os.getpid(), signal.SIGHUP)
    signal.signal(signal.SIGHUP, before)


def test_two_processes_do_not_train_in_one_folder(finished: Path, tmp_path, capsys) -> None:
    folder = copied(finished, tmp_path / "shared")
    fork = multiprocessing.get_context("fork")
    runs = fork.Event()

    def outlive() -> None:
        runs.set()
        time.sleep(60)

    child = fork.Process(target=outlive, daemon=True)
    with record.locked(folder):
        assert "another process" in fails(capsys, "--resume", folder)
        child.start()
        assert runs.wait(30)
    assert resume(folder) == 0  # as where a loader's process outlives a kill
    child.kill()


def test_a_folder_with_something_in_it_stays_as_it_is(tmp_path, capsys) -> None:
    (tmp_path / "config.json").write_text("of something else")
    assert fails(capsys, *TINY, "--out", tmp_path).startswith("out must be a new or empty folder")
    assert (tmp_path / "config.json").read_text() == "of something else"


def test_a_signal_while_data_are_read_is_no_damage(tmp_path, capsys, monkeypatch) -> None:
    def struck(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal comes first")

    monkeypatch.setattr(command, "load_cifar", struck)
    assert main(["--device", "cpu", "--data-dir", str(tmp_path)]) == 128 + signal.SIGTERM
    assert "SYNTHETIC" not in capsys.readouterr().out
    monkeypatch.setattr(torch, "load", struck)
    (tmp_path / "weights.pt").write_bytes(b"")
    assert main(["--evaluate", str(tmp_path / "weights.pt")]) == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    "words",
    [
        *("--seed 7", "--max-lr 0.1", "--weight-decay 0.25", "--label-smoothing 0.3", "--amp bf16"),
        *("--batch-size 24", "--mixup 0.2", "--ema 0.9", "--optimizer lars", "--delta 0.5"),
        *("--ratio 0.3", "--policy random", "--score bls"),
        *("--no-rescale", "--no-anneal", "--target-saving 0.2"),
    ],
)
def test_every_setting_reaches_the_training(finished: Path, tmp_path, words: str) -> None:
    assert run(*words.split(), "--out", tmp_path) == 0
    runs = finished, tmp_path
    one, other = (torch.load(run / "model.pt", weights_only=True)["fc.weight"] for run in runs)
    assert not torch.equal(one, other)


def test_rates_follow_the_progress(tmp_path, monkeypatch) -> None:
    steps: list[tuple[float, float]] = []
    call = STEP.__call__

    def schedule(self, images, labels, batch, lr, momentum) -> None:
        steps.append((lr, momentum))
        call(self, images, labels, batch, lr, momentum)

    monkeypatch.setattr(STEP, "__call__", schedule)
    words = "--policy random --no-anneal --target-saving 0.2 --epochs 2".split()
    assert run(*words, "--out", tmp_path / "run") == 0
    # 6 steps of 120 samples, then 4 of the 72 kept, as 48 of 240 are to be saved.
    progress = [k / 6 / 2 for k in range(6)] + [(1 + k / 4) / 2 for k in range(4)]
    assert steps == [one_cycle(done, max_lr=0.05) for done in progress]


def dense(classes: int) -> torch.nn.Module:
    """A CPU takes 20 ms for a sample's convolutions in float16."""
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, classes))


@pytest.mark.parametrize(
    ("optimizer", "lr", "amp"),
    [("adam", 0.003, "bf16"), ("lars", 3, "fp16"), ("lamb", 0.01, "off")],
)
def test_optimizers_and_autocast(tmp_path, optimizer: str, lr: float, amp: str) -> None:
    words = ["--optimizer", optimizer, "--amp", amp, "--max-lr", lr, "--epochs", 2, "--seed", 1]
    if amp == "fp16":
        words += ["--model", f"{__name__}:dense"]
    assert run(*words, "--out", tmp_path, "--eval-every", 5) == 0
    first, second = epochs_of(tmp_path)
    assert second["loss"] < first["loss"] < 3
    assert (first["accuracy"] is None, second["accuracy"] is None) == (True, False)


def test_full_data_and_ablations(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ways = {"full": ("--delta", 0), "none": ("--policy", "none"), "ratio": ("--ratio", 0)}
    for name, words in ways.items():
        assert run(*words, "--epochs", 2, "--out", name) == 0
        assert epochs_of(Path(name)) == epochs_of(Path("full"))
    assert [line["kept"] for line in epochs_of(Path("full"))] == [120, 120]
    words = ["--policy", "random", "--no-rescale", "--no-anneal", "--delta", "0.5"]
    assert run(*words, "--out", "random") == 0
    assert [line["kept"] for line in epochs_of(Path("random"))] == [120, 60, 60, 60]
    assert run("--delta", 0, "--epochs", 1) == 0
    (default,) = Path("runs").iterdir()
    assert re.match(r"synthetic-small-full-s0-\d{8}-\d{6}-\d+$", default.name)
    assert run("--whole-batches", "--batch-size", 32, "--out", "whole") == 0
    kept = [line["kept"] for line in epochs_of(Path("whole"))]
    assert kept[0] == kept[3] == 120
    assert all(count % 32 == 0 for count in kept[1:3])  # the last is full


def slowest(view):
    """A policy of the user's own."""
    return POLICIES["random"].choose(view)


def growing(ratio: float, epoch: int, first_full_epoch: int) -> float:
    """A schedule of the user's own."""
    return ratio * epoch / first_full_epoch


@pytest.mark.parametrize(
    "words",
    [
        "--policy repb --score bls --target-saving 0.1",
        "--policy ucb --ratio-schedule pods --epochs 6",
        "--policy soft --target-saving 0.2 --whole-batches",
        "--mixup 0.4 --ema 0.9",
        f"--policy {__name__}:slowest --ratio-schedule {__name__}:growing --epochs 3",
    ],
)
def test_records_are_of_the_plans_and_a_resumed_run_is_the_same(
    tmp_path, monkeypatch, words: str
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    plans: list[Plan] = []
    scores: list[torch.Tensor] = []
    sample, close = InfoBatch.sample, Ledger.close_epoch

    def drawn(self, *args):
        plans.append(sample(self, *args))
        return plans[-1]

    def closed(self, *args, **kwargs):
        scores.append(self.infobatch.scores.clone())
        return close(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(InfoBatch, "sample", drawn)
        patch.setattr(Ledger, "close_epoch", closed)
        assert run(*words.split(), "--out", whole) == 0
    lines, arrays, summary = epochs_of(whole), arrays_of(whole), summary_of(whole)
    kept = sum(torch.bincount(plan.indices, minlength=120) for plan in plans)
    for plan, line in zip(plans, lines, strict=True):
        drawn_as = (len(plan), plan.ratio, plan.num_prunable, plan.expected_saving)
        names = ("kept", "ratio", "prunable", "expected_saving")
        assert tuple(line[name] for name in names) == drawn_as
    assert arrays["kept"].tolist() == kept.tolist()  # type: ignore[union-attr]
    assert sum(arrays["kept"]) == summary["samples_trained"] < 120 * len(plans)
    assert summary["expected_saving"] == pytest.approx(summary["saved_share"], abs=0.06)
    np.testing.assert_array_equal(arrays["score_history"], torch.stack(scores).numpy())

    # A kill in the third epoch, after its checkpoint of two steps.
    class Killed(BaseException):
        pass

    steps, call = [], STEP.__call__
    last = sum(math.ceil(len(plan) / 20) for plan in plans[:2]) + 3

    def struck(self, *args):
        steps.append(1)
        if len(steps) == last:
            raise Killed
        call(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(STEP, "__call__", struck)
        with pytest.raises(Killed):
            run(*words.split(), "--checkpoint-every", 2, "--out", stopped)
    state = record.load(stopped / "checkpoint.pt")
    assert (state["epoch"], state["number"]) == (2, 2)
    assert resume(stopped) == 0
    assert_alike(stopped, whole)


def test_targets_and_schedules(tmp_path, capsys) -> None:
    words = ("--delta", 1, "--epochs", 6, "--target-saving", 0.4)
    assert run("--policy", "random", *words, "--out", tmp_path / "met") == 0
    assert summary_of(tmp_path / "met")["samples_saved"] == 288  # 0.4 * 6 * 120
    assert [line["kept"] for line in epochs_of(tmp_path / "met")] == [120, 62, 62, 63, 62, 63]
    assert "48.0% of the samples" in capsys.readouterr().out  # 0.4 / (5 / 6)
    assert run("--target-saving", 0.9, "--delta", 1, "--out", tmp_path / "most") == 0
    out = capsys.readouterr().out
    for told in ("cannot be reached: 3 of the 4 epochs", "0.9 asks epoch 2", "NOT REACHED"):
        assert out.count(told) == 1  # of the other epochs not
    pods = ("--policy", "hard", "--ratio-schedule", "pods", *words[:4])
    assert run(*pods, "--out", tmp_path / "pods") == 0
    ratios = [line["ratio"] for line in epochs_of(tmp_path / "pods")]
    shown = [float(ratio) for ratio in re.findall(r"  r (\S+)", capsys.readouterr().out)]
    assert shown == pytest.approx(ratios, abs=6e-4)
    assert len(set(shown)) > 2


def test_a_fraction_of_the_data(tmp_path, capsys, monkeypatch) -> None:
    whole = make_synthetic(120, 24, 10, seed=0)
    monkeypatch.setattr(command, "make_synthetic", lambda *args, **kwargs: whole)
    for seed in (0, 1):  # the same images for every seed
        folder = tmp_path / str(seed)
        words = ("--data-fraction", 0.25, "--batch-size", 10, "--epochs", 1, "--seed", seed)
        assert run(*words, "--out", folder) == 0
        assert arrays_of(folder)["labels"].tolist() == whole.part(0.25).labels.tolist()
        about = records.read(RunRecord, folder / records.CONFIG)
        assert about.samples == {"train": 30, "test": 24}
    assert epochs_of(tmp_path / "0")[0]["loss"] != epochs_of(tmp_path / "1")[0]["loss"]
    assert main(["--evaluate", str(folder), "--device", "cpu"]) == 0
    assert "on the 24 test images" in capsys.readouterr().out


def test_validation_and_label_noise(tmp_path, capsys, monkeypatch) -> None:
    whole = make_synthetic(120, 24, 10, seed=0)
    monkeypatch.setattr(command, "make_synthetic", lambda *args, **kwargs: whole)
    folder = tmp_path / "run"
    words = "--validation 20 --label-noise 0.3 --batch-size 10 --epochs 1 --seed 3".split()
    assert run(*words, "--out", folder) == 0
    assert "100 training and 20 held-out images" in (said := capsys.readouterr().out)
    assert "30% of the labels wrong" in said
    expected = whole.with_validation(20).with_label_noise(0.3, 3)
    assert arrays_of(folder)["labels"].tolist() == expected.labels.tolist()
    assert "picked on the held-out images" in said
    for more, images in (((), "20 held-out"), (("--validation", "0"), "24 test")):
        assert main(["--evaluate", str(folder), "--device", "cpu", *more]) == 0
        assert f"on the {images} images" in capsys.readouterr().out
    whole = replace(whole, test_images=whole.test_images * 0, test_labels=whole.test_labels * 0)
    assert run(*words, "--out", tmp_path / "other") == 0
    assert_alike(folder, tmp_path / "other")  # nothing is of the test set


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (
            "--max-lr 1e30 --epochs 9",
            r"\d+ (of 6 steps|steps in a row) had non-finite gradients in epoch \d",
        ),
        ("--weight-decay 1e30 --epochs 2", r"\d of 6 steps had non-finite gradients in epoch 1"),
    ],
)
def test_a_run_whose_steps_were_skipped_is_no_good_one(tmp_path, capsys, words, what) -> None:
    assert run(*words.split(), "--out", tmp_path / "run") == 1
    error = capsys.readouterr().err
    assert re.match(rf"error: {what}: lower --max-lr \(now .*\) or --weight-decay", error), error
    assert error.count("\n") == 1
    assert "good" not in error
    assert not (tmp_path / "run/summary.json").exists()


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("--ratio 1.5", "ratio 1.5"),
        ("--batch-size 121", "batch_size 120 121"),
        ("--data-fraction 1e-9", "batch_size data_fraction 1e-09 20"),
        ("--validation 110", "batch_size validation 110 20"),
        ("--validation 120", "validation 120"),
        ("--out {finished}", "out {finished} --resume"),
        ("--out file/run", "file/run"),
        ("--loader dali --out new", "DALI"),
        ("--compile --host-syncs count --out new", "host_syncs --compile count"),
        ("--resume absent", "resume absent config.json"),
        ("--resume {finished} --out new", "out new --resume"),
        ("--resume a --evaluate b", "resume evaluate a b"),
        ("--evaluate absent.pt", "checkpoint absent.pt"),
        ("--evaluate /dev/zero", "/dev/zero regular"),
        ("--device cuda", "device cuda"),
    ],
)
def test_mistakes(finished: Path, tmp_path, capsys, monkeypatch, words: str, names: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "infobatch_fast.data.dali", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    Path("file").write_text("")
    own = () if "--resume" in words or "--evaluate" in words else TINY
    message = fails(capsys, *own, *words.format(finished=finished).split())
    for name in names.format(finished=finished).split():
        assert name in message
    assert os.listdir() == ["file"]  # a folder that was made is taken back


def test_versions_are_told(capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"infobatch_fast {infobatch_fast.__version__}\n"


def test_what_does_not_fit_is_told_of(finished: Path, tmp_path, capsys) -> None:
    folder = copied(finished, tmp_path / "broken")
    path = folder / "checkpoint.pt"
    state, content = record.load(path), path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    path.write_bytes(flipped)
    for flag in ("--resume", "--evaluate"):
        assert "damaged" in fails(capsys, flag, folder)
    weights = bytearray((finished / "model.pt").read_bytes())
    weights[len(weights) // 2] ^= 4
    (folder / "model.pt").write_bytes(weights)
    assert "damaged" in fails(capsys, "--evaluate", folder / "model.pt")
    record.save(path, {**state, "config": {**state["config"], "ratio": 0.3}})
    assert "this run's configuration, got another ratio" in fails(capsys, "--resume", folder)
    model = {**state["step"]["model"], "fc.weight": torch.zeros(3, 3)}
    for broken in ({"step": {**state["step"], "model": model}}, {"history": [{}]}, {"step": 3}):
        record.save(path, {**state, **broken})
        assert str(path) in fails(capsys, "--resume", folder)
    record.save(path, {key: state[key] for key in ("version", "config", "epoch")})
    assert "does not fit this run: KeyError" in fails(capsys, "--resume", folder)
    (folder / "summary.json").write_text("{}")
    assert "summary.json" in fails(capsys, "--resume", folder)
    (folder / "config.json").write_text("{")
    assert "config.json is no JSON object" in fails(capsys, "--resume", folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")  # would be waited for
    assert "must be a regular file" in fails(capsys, "--resume", folder)
    assert "\\n" in fails(capsys, "--evaluate", tmp_path / "two\nlines")


@pytest.mark.parametrize("name", ["config.json", "epochs.jsonl", "checkpoint.pt", "summary.json"])
def test_a_disk_that_fills_up_keeps_what_was_written(
    finished: Path, tmp_path, capsys, monkeypatch, name: str
) -> None:
    folder, fsync = tmp_path / "full", os.fsync

    def full(number: int) -> None:
        if name in os.readlink(f"/proc/self/fd/{number}"):
            raise OSError(28, "No space left on device")
        fsync(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        message = fails(capsys, *TINY, "--out", folder)
    assert message == f"cannot write {folder / name}: No space left on device"
    if name == "config.json":  # nothing was recorded
        assert not folder.exists()
        return
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]
    assert lines_of(folder)[0]["epoch"] == 1
    assert resume(folder) == 0
    assert_alike(folder, finished)


def test_no_data(tmp_path, capsys, monkeypatch) -> None:
    def unreachable(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr("socket.socket.connect", unreachable)
    monkeypatch.setattr("torchvision.datasets.utils.download_url", unreachable)
    monkeypatch.delenv("INFOBATCH_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = "--device cpu --synthetic-samples 100 --epochs 1 --batch-size 50 --loader torch".split()
    words += ["--out", str(tmp_path / "run")]
    named = ["--preset", "quick", "--dataset", "cifar10"], ["--data-dir", str(tmp_path)]
    for more in (["--preset", "paper"], *named):
        assert "cifar-10" in fails(capsys, *words, *more)
        assert not (tmp_path / "run").exists()
    with monkeypatch.context() as patch:
        patch.setenv("INFOBATCH_DATA", str(tmp_path))
        assert "cifar-10" in fails(capsys, *words)
    assert main(words) == 0
    assert capsys.readouterr().out.count("SYNTHETIC") == 2
    assert json.loads((tmp_path / "run/config.json").read_text())["data"] == "synthetic"
    assert summary_of(tmp_path / "run")["data"] == "synthetic"


@pytest.mark.parametrize("words", [TINY, ["--help"], ["--version"]])
def test_an_output_that_takes_nothing(tmp_path, capsys, words) -> None:
    with open("/dev/full", "w") as full, contextlib.redirect_stdout(full):
        message = fails(capsys, *words, "--out", tmp_path / "run")
    assert message == "cannot write the output: No space left on device"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB"), "lower --batch-"),
        (PermissionError(13, "Permission denied", "theirs"), "look at theirs: Permission denied"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), "got DataLoader"),
    ],
)
def test_what_the_machine_refuses_is_one_line(capsys, monkeypatch, error, said) -> None:
    def refused(*args, **kwargs):
        raise error

    monkeypatch.setattr(command, "run", refused)
    assert said in fails(capsys)


@pytest.mark.parametrize("kind", ["count", "forbid"])
def test_host_syncs_are_counted_and_forbidden(tmp_path, capsys, monkeypatch, kind: str) -> None:
    words = ("--epochs", 2, "--delta", 1, "--checkpoint-every", 5, "--host-syncs", kind, "--out")
    assert run(*words, tmp_path / "silent") == 0
    # One each, to draw the epoch; saving is not counted.
    assert [line["host_syncs"] for line in lines_of(tmp_path / "silent")] == [1, 1]
    assert summary_of(tmp_path / "silent")["host_syncs"] == 2
    assert "host syncs 2 within 2 epochs" in capsys.readouterr().out

    def chatty(self, *args, **kwargs):
        step(self, *args, **kwargs)
        self.counts.sum().item()

    step = STEP.__call__
    monkeypatch.setattr(STEP, "__call__", chatty)
    code = run(*words, tmp_path / "chatty")
    if kind == "forbid":
        assert code == 1
        assert "host sync where none is allowed, by" in capsys.readouterr().err
        return
    for line in lines_of(tmp_path / "chatty"):
        assert line["host_syncs"] == 1 + math.ceil(line["kept"] / 20)


def test_resume_before_the_first_checkpoint_starts_over(finished: Path, tmp_path, capsys) -> None:
    folder = tmp_path / "early"
    folder.mkdir()
    shutil.copy(finished / "config.json", folder)
    shutil.copy(finished / "epochs.jsonl", folder)
    assert resume(folder) == 2  # their checkpoint is gone: the record stays
    assert "epochs and none" in capsys.readouterr().err
    assert lines_of(folder) == lines_of(finished)
    (folder / "epochs.jsonl").write_text("{")
    assert resume(folder) == 0
    assert "from the start, as no checkpoint was written yet" in capsys.readouterr().out
    assert_alike(folder, finished)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("bad = lambda view: view.seen", "policy mine:bad failed: TypeError: policy mine:bad must"),
        ("bad = lambda view: 1 / 0", "policy mine:bad failed: ZeroDivisionError: division by zero"),
        ("def bad(view): exit(3)", "policy mine:bad failed: SystemExit: 3"),
        ("bad = 3", "policy mine:bad must be a function of a View, got 3"),
        (
            "bad = lambda *_: 1.5",
            "ratio_schedule mine:bad must give ratios in [0, 1), got",
        ),
        ("def bad(*_): exit(3)", "ratio_schedule mine:bad failed: SystemExit: 3"),
    ],
)
def test_a_mistake_in_what_is_ones_own(tmp_path, capsys, monkeypatch, body, said) -> None:
    (tmp_path / "mine.py").write_text(body)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    flag = "--" + said.split()[0].replace("_", "-")
    assert said in fails(capsys, *TINY, flag, "mine:bad", "--out", "run")
    assert not Path("run").exists()


def test_too_few_epochs_to_prune_are_told(tmp_path, capsys) -> None:
    assert run("--epochs", 2, "--out", tmp_path / "run") == 0
    told = capsys.readouterr().out.splitlines()
    assert "WARNING: no epoch prunes: the first has no scores yet; take more --epochs" in told
