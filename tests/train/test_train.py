"""The trainer as a user runs it: records, resuming after a kill, and every mistake's one line."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torchvision.transforms.functional import normalize

from infobatch_fast import InfoBatch
from infobatch_fast.data.cifar import make_synthetic
from infobatch_fast.kernels import reference
from infobatch_fast.plan import Plan
from infobatch_fast.policies import POLICIES
from infobatch_fast.telemetry.phases import PHASES, Nvml
from infobatch_fast.train import checkpoint
from infobatch_fast.train import folder as record
from infobatch_fast.train import loop as train
from infobatch_fast.train.config import Config
from infobatch_fast.train.folder import source_hash
from infobatch_fast.train.ledger import SECONDS, Diverged, Progress
from infobatch_fast.train.models import make_model
from infobatch_fast.train.schedule import one_cycle

TINY = (
    "--device cpu --dataset synthetic --synthetic-samples 300 --batch-size 25 --epochs 4 "
    "--max-lr 0.05"
).split()
STEP = train.TrainStep
TIMES = re.compile(r"seconds$|images_per_second|^phases$|^spent$")


def run_main(*arguments: object) -> int:
    return train.main([*TINY, "--loader", "torch", *map(str, arguments)])


def spawn(*arguments: object) -> subprocess.Popen:
    """The trainer in a process of its own, with its default loader and threads."""
    return subprocess.Popen(
        [sys.executable, "-m", "infobatch_fast.train", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def epochs_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not TIMES.search(k)} for line in lines]


def assert_equal(one, other, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            if not (isinstance(key, str) and TIMES.search(key)):
                assert_equal(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), where
        for i, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one.nan_to_num(7.0), other.nan_to_num(7.0)), where
    else:
        assert one == other, where


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that nothing disturbed, in a process of its own."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    process = spawn(*TINY, "--out", folder)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    (folder.parent / "output").write_text(out)
    return folder


def test_what_a_run_leaves(finished: Path) -> None:
    assert sorted(os.listdir(finished)) == [
        "checkpoint.pt",
        "config.json",
        "epochs.jsonl",
        "kept.npy",
        "labels.npy",
        "model.pt",
        "pictured.npy",
        "pictures.npy",
        "score_history.npy",
        "scores.npy",
        "summary.json",
        "tracked.npy",
    ]
    about = json.loads((finished / "config.json").read_text())
    assert about["config"]["dataset"] == "synthetic"
    assert about["data"] == "synthetic"
    assert about["packages"]["torch"] == torch.__version__.split("+")[0]
    assert about["source_hash"] == source_hash()
    assert about["device"]["type"] == "cpu"
    assert str(finished) not in json.dumps(about)
    assert not re.search(r'"/\w', json.dumps(about))
    summary = json.loads((finished / "summary.json").read_text())
    epochs = [json.loads(line) for line in (finished / "epochs.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in epochs] == [1, 2, 3, 4]
    kept = [line["kept"] for line in epochs]
    assert kept[0] == 300
    assert max(kept[1:3]) < 300  # ceil(4 * 0.875) = 4: the rest prune
    for line in epochs:
        n = line["prunable"]
        assert line["kept"] == 300 - n + (max(1, round(0.5 * n)) if n else 0)
    assert summary["epochs"] == 4
    assert summary["samples_trained"] == sum(kept)
    assert summary["samples_saved"] == 1200 - sum(kept)
    assert summary["saved_share"] == pytest.approx(1 - sum(kept) / 1200)
    assert summary["accuracy_last"] == epochs[-1]["accuracy"]
    assert summary["accuracy_best"] == max(line["accuracy"] for line in epochs)
    assert summary["data"] == "synthetic"
    for name in ("train_seconds", "evaluation_seconds", "pruning_seconds", "checkpoint_seconds"):
        assert summary[name] >= sum(line[name] for line in epochs) - 1e-9
        assert summary[name] > 0
    assert summary["pruning_seconds"] < summary["train_seconds"]
    assert summary["seconds"] >= sum(summary[name] for name in SECONDS[1:])
    for line in [*epochs, summary]:
        assert tuple(line["phases"]) == PHASES
        assert sum(line["phases"].values()) == pytest.approx(line["seconds"], rel=0.02)
        within = sum(line["phases"][name] for name in ("wait", "step"))
        assert within <= line["train_seconds"] <= line["seconds"]
        assert line["joules"] is None
        assert line["host_syncs"] is None
    for line in epochs:
        assert sum(line["score_histogram"]["counts"]) == 300
    assert summary["nvml"]["absent"] == {"all": "the device is no GPU"}
    assert summary["update_timed"] is True
    assert about["samples"] == {"train": 300, "test": 60}


@pytest.mark.parametrize(
    ("tests", "free", "batch"),
    [
        (10_000, 2**37, 5000),  # 8192 at most, in two equal batches
        (10_000, 2**33, 500),
        (10_000, 2**20, 250),
        (60, 2**37, 60),
        (10_001, 2**37, 5001),
    ],
)
def test_evaluation_is_as_large_as_memory_likes(monkeypatch, tests, free, batch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2**38))
    assert train.evaluation_batch(tests, torch.device("cuda", 0)) == batch
    assert train.evaluation_batch(10_000, torch.device("cpu")) == 1000
    assert train.evaluation_batch(1001, torch.device("cpu")) == 501


def test_what_a_user_reads(finished: Path) -> None:
    lines = (finished.parent / "output").read_text().splitlines()
    assert lines[0].startswith("preset     quick")
    assert "--preset paper" in lines[0]
    text = "\n".join(lines)
    assert "delta x ratio x share = 0.875 x 0.5 x share = 43.8% x share" in text
    assert (
        len(re.findall(r"^epoch \d/4  kept \S+/300  loss \S+  lr \S+  accuracy", text, re.M)) == 4
    )
    assert "SYNTHETIC" in lines[-1]
    assert re.search(r"accuracy +\S+% after the last epoch; best \S+% \(epoch \d", text)
    assert re.search(r"trained on \S+ of 1,200; saved \d+ \(\S+%\)", text)
    assert re.search(r"^phases     choose \d\.\d\d s \(.*%\), wait .*, step .*, other", text, re.M)
    assert "energy     not measured: the device is no GPU" in text


def test_learning_rate_and_losses_are_those_of_the_run(finished: Path) -> None:
    epochs = epochs_of(finished)
    assert epochs[0]["lr"] == pytest.approx(0.05 * 0.9, rel=0.2)
    assert epochs[-1]["lr"] < 1e-3 < epochs[1]["lr"]
    assert epochs[-1]["loss"] < epochs[0]["loss"]


def test_evaluate_trains_nothing(finished: Path, tmp_path, capsys) -> None:
    accuracy = json.loads((finished / "summary.json").read_text())["accuracy_last"]
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    for target in (finished, finished / "checkpoint.pt", finished / "model.pt"):
        assert train.main(["--evaluate", str(target), "--device", "cpu"]) == 0
        assert f"test accuracy {accuracy:.2%}" in capsys.readouterr().out
    assert before == {path.name: path.read_bytes() for path in finished.iterdir()}
    shutil.copy(finished / "model.pt", tmp_path / "alone.pt")
    arguments = ["--evaluate", str(tmp_path / "alone.pt"), *TINY]
    assert train.main([*arguments, "--model", "small"]) == 0
    assert f"test accuracy {accuracy:.2%}" in capsys.readouterr().out
    assert "does not fit r18" in fails(capsys, *arguments, "--model", "r18")


def test_kill_9_then_resume_is_bit_for_bit(finished: Path, tmp_path) -> None:
    folder = tmp_path / "killed"
    process = spawn(*TINY, "--out", folder, "--checkpoint-every", 3)
    deadline = time.monotonic() + 240
    target = folder / "checkpoint.pt"
    seen: set[int] = set()
    # Kill it in the middle of an epoch: at its fifth checkpoint, of three steps each.
    while len(seen) < 5 and process.poll() is None and time.monotonic() < deadline:
        if target.exists():
            seen.add(target.stat().st_mtime_ns)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    state = checkpoint.load(target)
    assert len(state["history"]) == state["epoch"]
    # As if it had gone on for a while after the checkpoint.
    with open(folder / "epochs.jsonl", "a") as file:
        file.write('{"epoch": 99}\n')
    resumed = spawn("--resume", folder)
    out, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, err
    assert f"from step {state['number']} of epoch {state['epoch'] + 1}" in out
    assert epochs_of(folder) == epochs_of(finished)
    mine, theirs = checkpoint.load(target), checkpoint.load(finished / "checkpoint.pt")
    for one in (mine, theirs):
        one["config"].pop("checkpoint_every")
    assert_equal(mine, theirs)
    weights = [torch.load(path / "model.pt", weights_only=True) for path in (folder, finished)]
    assert_equal(weights[0], weights[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_process(finished: Path, tmp_path, number: signal.Signals) -> None:
    folder = tmp_path / "stopped"
    process = spawn(*TINY, "--out", folder, "--checkpoint-every", 1)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("epoch 1/4"):
            process.send_signal(number)
            break
    _, err = process.communicate(timeout=120)
    assert process.returncode == 128 + number
    assert err.strip() == f"stopped; continue with --resume {folder}"
    assert not (folder / "summary.json").exists()
    resumed = spawn("--resume", folder)
    _, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, err
    assert epochs_of(folder) == epochs_of(finished)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A run that nothing disturbed, in this process."""
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert run_main("--out", folder) == 0
    return folder


# Where the signal comes: at the end of a step (counted from 1) or of an evaluation, or with the
# epoch's line; and the checkpoint that must come of it, as (epochs finished, steps of the next).
WHEN = {
    "step 4": (0, 4),
    "step 10": (0, 10),
    "step 15": (1, 3),
    "evaluate 2": (1, None),
    "say 3": (3, 0),
}


@pytest.mark.parametrize("when", WHEN)
def test_a_signal_at_any_moment(
    undisturbed: Path, tmp_path, capsys, monkeypatch, when: str
) -> None:
    place, count = when.split()
    calls = {"step": 0, "evaluate": 0, "say": 0}

    def strike(name: str) -> None:
        calls[name] += 1
        if name == place and calls[name] == int(count):
            os.kill(os.getpid(), signal.SIGTERM)

    def after(name, function):
        def wrapped(*args, **kwargs):
            if name != "step":
                strike(name)
            result = function(*args, **kwargs)
            if name == "step":
                strike(name)
            return result

        return wrapped

    monkeypatch.setattr(STEP, "__call__", after("step", STEP.__call__))
    monkeypatch.setattr(train, "evaluate", after("evaluate", train.evaluate))
    monkeypatch.setattr(train.console, "epoch_line", after("say", train.console.epoch_line))
    folder = tmp_path / "stopped"
    assert run_main("--out", folder) == 128 + signal.SIGTERM
    assert capsys.readouterr().err.strip() == f"stopped; continue with --resume {folder}"
    monkeypatch.undo()
    state = checkpoint.load(folder / "checkpoint.pt")
    epoch, number = WHEN[when]
    assert state["epoch"] == epoch
    if number is None:  # during the evaluation: all of the epoch's steps are done
        number = -(-state["plan"]["indices"].numel() // 25)
    assert state["number"] == number
    assert train.main(["--resume", str(folder)]) == 0
    assert epochs_of(folder) == epochs_of(undisturbed)
    mine, theirs = (checkpoint.load(path / "checkpoint.pt") for path in (folder, undisturbed))
    assert_equal(mine, theirs)


def test_two_processes_do_not_train_in_one_folder(undisturbed: Path, tmp_path, capsys) -> None:
    folder = tmp_path / "shared"
    shutil.copytree(undisturbed, folder)
    (folder / "summary.json").unlink()
    with record.locked(folder):
        assert fails(capsys, "--resume", folder) == f"another process is training in {folder}"
    assert train.main(["--resume", str(folder)]) == 0


def test_of_two_starts_in_one_folder_one_runs(tmp_path) -> None:
    folder = tmp_path / "race"
    both = [spawn(*TINY, "--loader", "torch", "--seed", seed, "--out", folder) for seed in (0, 1)]
    errors = [process.communicate(timeout=300)[1] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], errors
    seed = codes.index(0)
    assert json.loads((folder / "config.json").read_text())["config"]["seed"] == seed
    assert checkpoint.load(folder / "checkpoint.pt")["config"]["seed"] == seed
    assert (folder / "summary.json").exists()


def test_a_signal_while_data_are_read_is_no_damage(tmp_path, capsys, monkeypatch) -> None:
    def struck(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("the signal comes first")

    monkeypatch.setattr("infobatch_fast.data.cifar.download_archive", struck)
    assert train.main(["--device", "cpu", "--data-dir", str(tmp_path)]) == 128 + signal.SIGTERM
    assert "SYNTHETIC" not in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(torch, "load", struck)
    (tmp_path / "weights.pt").write_bytes(b"")
    assert train.main(["--evaluate", str(tmp_path / "weights.pt")]) == 128 + signal.SIGTERM


def test_what_is_no_file_is_not_waited_for(finished: Path, tmp_path, capsys) -> None:
    folder = tmp_path / "pipes"
    shutil.copytree(finished, folder)
    (folder / "summary.json").unlink()
    (folder / "checkpoint.pt").unlink()
    os.mkfifo(folder / "checkpoint.pt")
    for flag in ("--resume", "--evaluate"):
        assert "must be a regular file" in fails(capsys, flag, folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert "must be a regular file" in fails(capsys, "--resume", folder)
    assert "must be a regular file" in fails(capsys, "--evaluate", "/dev/zero")
    assert "\\n" in fails(capsys, "--evaluate", tmp_path / "two\nlines")


def test_settings_reach_what_they_are_for(tmp_path, monkeypatch) -> None:
    seen: dict[str, list] = {}

    def spy(name: str) -> None:
        function = getattr(train, name)

        def wrapped(*args, **kwargs):
            seen.setdefault(name, []).append((args, kwargs))
            return function(*args, **kwargs)

        monkeypatch.setattr(train, name, wrapped)

    for name in ("InfoBatch", "make_loader", "make_model", "make_optimizer", "TrainStep"):
        spy(name)
    steps: list[tuple[float, float]] = []
    call = STEP.__call__

    def schedule(self, images, labels, batch, lr, momentum) -> None:
        steps.append((lr, momentum))
        call(self, images, labels, batch, lr, momentum)

    monkeypatch.setattr(STEP, "__call__", schedule)
    arguments = "--seed 7 --ratio 0.4 --delta 0.5 --policy random --no-rescale --no-anneal "
    arguments += "--score bls --ratio-schedule pods --target-saving 0.2 "
    arguments += "--optimizer lars --weight-decay 0.25 --label-smoothing 0.3 --amp bf16 --epochs 2"
    assert run_main(*arguments.split(), "--out", tmp_path / "run") == 0
    [(args, kwargs)] = seen["InfoBatch"]
    assert args[:5] == (300, 2, 0.4, 0.5, 7)
    assert kwargs == {
        "policy": "random",
        "rescale": False,
        "anneal": False,
        "score": "bls",
        "ratio_schedule": "pods",
        "target_saving": 0.2,
    }
    [(args, kwargs)] = seen["make_loader"]
    assert (args[0], args[3], kwargs["seed"]) == ("torch", 25, 7)
    assert seen["make_model"][0] == (("small", 10), {"seed": 7})
    [(args, kwargs)] = seen["make_optimizer"]
    assert (args[0], kwargs) == ("lars", {"lr": 0.05, "weight_decay": 0.25})
    [(_, kwargs)] = seen["TrainStep"]
    assert (kwargs["amp"], kwargs["label_smoothing"], kwargs["compile"]) == ("bf16", 0.3, False)
    # 12 steps of 300 samples, then 8 of the 180 kept, as 120 of 600 are to be saved; the rate by
    # progress.
    progress = [k / 12 / 2 for k in range(12)] + [(1 + k / 8) / 2 for k in range(8)]
    assert steps == [one_cycle(done, max_lr=0.05) for done in progress]


def test_seeds_differ_in_everything(tmp_path) -> None:
    records = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        assert run_main("--seed", seed, "--epochs", 2, "--out", folder) == 0
        records.append(epochs_of(folder))
    assert records[0][0]["loss"] != records[1][0]["loss"]


def test_accuracy_against_a_calculation_of_its_own(undisturbed: Path) -> None:
    data = make_synthetic(300, 60, 10, easy=0.5, hard=0.1, seed=0)
    model = make_model("small", 10)
    model.load_state_dict(torch.load(undisturbed / "model.pt", weights_only=True))
    model.eval()
    images = data.test_images.permute(0, 3, 1, 2).float() / 255
    images = normalize(images, list(data.mean), list(data.std))
    with torch.no_grad():
        right = (model(images).argmax(1) == data.test_labels).double().mean().item()
    assert epochs_of(undisturbed)[-1]["accuracy"] == pytest.approx(right, abs=1e-9)


class FakeMeter:
    """A card that takes 100 W by the tests' clock."""

    def __init__(self, device: torch.device, *, enabled: bool) -> None:
        self.enabled = enabled

    def __enter__(self) -> "FakeMeter":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def joules(self) -> float | None:
        return 100 * time.perf_counter() if self.enabled else None

    def read(self) -> dict:
        return {"samples": 3, "missed": {}, "absent": {} if self.enabled else {"all": "off"}}


@pytest.fixture
def slow_parts(monkeypatch) -> list[float]:
    """A clock that moves only where we say, and a card that takes power by it.

    A step takes 1 s, of it 0.25 s of update twice; choosing 5 s; waiting for a batch 0.125 s;
    evaluating 100 s; a checkpoint 1000 s; writing the epochs' record 10,000 s.
    """
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def takes(seconds: float, owner, name: str) -> None:
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            now[0] += seconds
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    takes(0.5, STEP, "__call__")
    takes(0.25, reference, "rescaled_mean")
    takes(0.25, InfoBatch, "record")
    takes(5, InfoBatch, "sample")
    takes(0.125, Plan, "batch")
    takes(100, train, "evaluate")
    takes(1000, checkpoint, "save")
    takes(10_000, record, "write_epochs")
    monkeypatch.setattr(train, "Nvml", FakeMeter)
    return now


def test_seconds_and_joules_are_told_apart_and_counted_once(tmp_path, slow_parts, capsys) -> None:
    folder = tmp_path / "run"
    assert run_main("--epochs", 2, "--delta", 0, "--checkpoint-every", 5, "--out", folder) == 0
    summary = json.loads((folder / "summary.json").read_text())
    # 12 steps an epoch; checkpoints after steps 5 and 10 of both epochs, and at the end. The
    # records are written before the first epoch, too, when no clock runs yet.
    expected = {
        "choose": 2 * 5,
        "wait": 24 * 0.125,
        "step": 24 * 0.5,
        "update": 24 * 0.5,
        "evaluation": 2 * 100,
        "checkpoint": 5 * 1000,
        "other": 2 * 10_000,
    }
    assert summary["phases"] == pytest.approx(expected)
    assert list(summary["phases"]) == list(expected)
    assert summary["train_seconds"] == pytest.approx(24 * 0.625)
    assert summary["pruning_seconds"] == pytest.approx(24 * 0.5 + 2 * 5)
    assert summary["evaluation_seconds"] == pytest.approx(200)
    assert summary["checkpoint_seconds"] == pytest.approx(5 * 1000)
    assert summary["seconds"] == pytest.approx(sum(expected.values()))
    assert slow_parts[0] == pytest.approx(summary["seconds"] + 10_000)
    assert summary["images_per_second"] == pytest.approx(600 / (24 * 1.125 + 10))
    assert summary["joules"] == pytest.approx(100 * summary["seconds"])
    assert summary["train_joules"] == pytest.approx(100 * (24 * 1.125 + 2 * 5))
    assert summary["joules_per_image"] == pytest.approx(3700 / 600)
    assert summary["joules_saved"] == 0
    assert summary["nvml"] == {"since_epoch": 1, "samples": 3, "missed": {}, "absent": {}}
    first, second = (json.loads(x) for x in (folder / "epochs.jsonl").read_text().splitlines())
    assert first["images_per_second"] == pytest.approx(300 / (12 * 1.125 + 5))
    assert first["phases"]["other"] == pytest.approx(0)  # its record comes after it is closed
    assert first["seconds"] == pytest.approx(12 * 1.125 + 5 + 100 + 2000)
    assert second["seconds"] == pytest.approx(first["seconds"] + 10_000)
    assert second["train_joules"] == pytest.approx(1850)
    assert second["joules"] == pytest.approx(100 * second["seconds"])
    out = capsys.readouterr().out
    assert (
        "energy     2,523,700 J: 6.1667 J an image trained on, and by that about 0 J saved" in out
    )


def test_joules_saved(tmp_path, slow_parts) -> None:
    folder = tmp_path / "run"
    assert run_main("--out", folder) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["samples_saved"] > 100
    an_image = summary["train_joules"] / summary["samples_trained"]
    assert summary["joules_per_image"] == pytest.approx(an_image)
    assert summary["joules_saved"] == pytest.approx(an_image * summary["samples_saved"])


def test_what_was_spent_before_an_interruption_is_not_lost(
    tmp_path, slow_parts, monkeypatch
) -> None:
    folder = tmp_path / "run"

    def stop(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    calls: list[int] = []
    step = STEP.__call__
    monkeypatch.setattr(STEP, "__call__", stop)
    arguments = ("--epochs", 1, "--host-syncs", "count", "--out", folder)
    assert run_main(*arguments) == 130
    before = slow_parts[0]
    slow_parts[0] += 777  # of these the run knows nothing
    assert train.main(["--resume", str(folder)]) == 0
    (line,) = (json.loads(x) for x in (folder / "epochs.jsonl").read_text().splitlines())
    # All but the writing of records before the clock runs, twice, and after the end; the first
    # checkpoint does not hold its own time.
    everything = slow_parts[0] - 777 - 3 * 10_000 - 1000 - 1000
    assert before < everything + 30_000
    assert line["seconds"] == pytest.approx(everything)
    assert line["phases"]["step"] == pytest.approx(12 * 0.5)
    assert line["joules"] == pytest.approx(100 * everything)
    assert line["host_syncs"] is None  # of the first part it is not known
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["nvml"]["since_epoch"] == 1
    assert summary["host_syncs"] is None


def test_an_epoch_half_of_which_was_not_measured(tmp_path, slow_parts, monkeypatch) -> None:
    def stop(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 20:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *args, **kwargs)

    calls: list[int] = []
    step = STEP.__call__
    monkeypatch.setattr(STEP, "__call__", stop)
    folder = tmp_path / "run"
    words = ("--epochs", 3, "--delta", 0, "--no-telemetry", "--out", folder)
    assert run_main(*words) == 130
    assert train.main(["--resume", str(folder), "--telemetry"]) == 0
    lines = [json.loads(x) for x in (folder / "epochs.jsonl").read_text().splitlines()]
    for name in ("phases", "joules", "train_joules", "pruning_seconds"):
        assert [line[name] is None for line in lines] == [True, True, False]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["phases"] is None
    assert summary["pruning_seconds"] is None
    assert summary["nvml"]["since_epoch"] == 2
    assert lines[2]["phases"]["step"] == pytest.approx(12 * 0.5)


def test_telemetry_off(tmp_path, capsys, slow_parts) -> None:
    folder = tmp_path / "run"
    assert run_main("--epochs", 2, "--no-telemetry", "--out", folder) == 0
    out = capsys.readouterr().out
    assert "phases" not in out
    assert "pruning 0" not in out
    assert "energy     not measured: off" in out
    summary = json.loads((folder / "summary.json").read_text())
    first = json.loads((folder / "epochs.jsonl").read_text().splitlines()[0])
    for one in (first, summary):
        for name in ("phases", "pruning_seconds", "joules", "train_joules"):
            assert one[name] is None
    assert first["score_histogram"] is None
    assert first["train_seconds"] == pytest.approx(12 * 1.125 + 5)
    assert first["images_per_second"] == pytest.approx(300 / (12 * 1.125 + 5))


def test_host_syncs_are_counted(tmp_path, capsys, monkeypatch) -> None:
    folder = tmp_path / "run"
    arguments = ("--epochs", 2, "--checkpoint-every", 5, "--host-syncs", "count", "--out", folder)
    assert run_main(*arguments) == 0
    lines = [json.loads(x) for x in (folder / "epochs.jsonl").read_text().splitlines()]
    assert [line["host_syncs"] for line in lines] == [1, 1]  # to draw the epoch
    assert json.loads((folder / "summary.json").read_text())["host_syncs"] == 2
    assert "host syncs 2 within 2 epochs" in capsys.readouterr().out

    def chatty(self, *args, **kwargs):
        step(self, *args, **kwargs)
        self.counts.sum().item()

    step, draw = STEP.__call__, InfoBatch.sample
    monkeypatch.setattr(STEP, "__call__", chatty)
    monkeypatch.setattr(
        InfoBatch, "sample", lambda self, *a: (self.scores.sum().item(), draw(self, *a))[1]
    )
    assert run_main("--epochs", 2, "--host-syncs", "count", "--out", tmp_path / "chatty") == 0
    chatter = [json.loads(x) for x in (tmp_path / "chatty/epochs.jsonl").read_text().splitlines()]
    for line in chatter:
        assert line["host_syncs"] == 2 + math.ceil(line["kept"] / 25)


def test_a_host_sync_that_is_forbidden_stops_the_run(tmp_path, capsys, monkeypatch) -> None:
    arguments = ("--epochs", 2, "--checkpoint-every", 5, "--host-syncs", "forbid", "--out")
    assert run_main(*arguments, tmp_path / "none") == 0

    def chatty(self, *args, **kwargs):
        step(self, *args, **kwargs)
        self.counts.sum().item()

    step = STEP.__call__
    monkeypatch.setattr(STEP, "__call__", chatty)
    capsys.readouterr()
    assert run_main(*arguments, tmp_path / "run") == 1
    assert capsys.readouterr().err == (
        "error: a host sync where none is allowed, by _local_scalar_dense\n"
    )
    compiled = (*TINY, "--compile", "--host-syncs", "count", "--out", tmp_path / "compiled")
    assert fails(capsys, *compiled) == "host_syncs must be off with --compile on a CPU, got count"
    assert not (tmp_path / "compiled").exists()
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    assert run_main("--epochs", 1, "--compile", "--out", tmp_path / "compiled") == 0


def test_the_limit_of_skipped_steps() -> None:
    meter = Nvml(torch.device("cpu"))
    step = SimpleNamespace(infobatch=InfoBatch(3, 1, device="cpu"))
    progress = Progress(step, Path("absent"), Config(), meter)  # type: ignore[arg-type]
    progress.check_finite(19)
    with pytest.raises(Diverged, match=r"^20 steps in a row had non-finite gradients in epoch 1"):
        progress.check_finite(20)


def test_resume_before_the_first_checkpoint_starts_over(finished: Path, tmp_path, capsys) -> None:
    folder = tmp_path / "early"
    folder.mkdir()
    shutil.copy(finished / "config.json", folder)
    assert train.main(["--resume", str(folder)]) == 0
    assert "from the start, as no checkpoint was written yet" in capsys.readouterr().out
    assert epochs_of(folder)[0]["kept"] == 300
    assert train.main(["--resume", str(folder)]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_weights_load_into_the_torchvision_model(tmp_path) -> None:
    folder = tmp_path / "r18"
    arguments = ["--model", "r18", "--synthetic-samples", 10, "--batch-size", 5, "--epochs", 1]
    assert run_main(*arguments, "--out", folder) == 0
    model = torchvision.models.resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    model.maxpool = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    model.load_state_dict(torch.load(folder / "model.pt", weights_only=True))


@pytest.mark.parametrize("optimizer", ["adam", "lars", "lamb"])
@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_optimizers_and_autocast(tmp_path, optimizer: str, amp: str) -> None:
    folder = tmp_path / "run"
    lr = {"adam": 0.003, "lars": 3.0, "lamb": 0.01}[optimizer]
    arguments = ["--optimizer", optimizer, "--amp", amp, "--max-lr", lr, "--epochs", 2]
    assert run_main(*arguments, "--out", folder, "--eval-every", 5) == 0
    epochs = epochs_of(folder)
    assert epochs[1]["loss"] < epochs[0]["loss"] < 3
    assert [line["accuracy"] is None for line in epochs] == [True, False]


def test_full_data_and_ablations(tmp_path) -> None:
    for name, arguments in (
        ("full", ["--delta", "0.0"]),
        ("none", ["--policy", "none"]),
        ("ratio", ["--ratio", "0"]),
    ):
        assert run_main(*arguments, "--epochs", 3, "--out", tmp_path / name) == 0
        assert [line["kept"] for line in epochs_of(tmp_path / name)] == [300] * 3
    whole = [epochs_of(tmp_path / name) for name in ("full", "none", "ratio")]
    assert whole[0] == whole[1] == whole[2]
    arguments = ["--policy", "random", "--no-rescale", "--no-anneal", "--delta", "0.5"]
    assert run_main(*arguments, "--out", tmp_path / "random") == 0
    assert [line["kept"] for line in epochs_of(tmp_path / "random")] == [300, 150, 150, 150]


ARRAYS = ("kept", "labels", "pictured", "pictures", "score_history", "scores", "tracked")


def arrays_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in ARRAYS}


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


POLICY_RUNS = [
    *([("--policy", policy) for policy in POLICIES]),
    ("--policy", "repb", "--score", "bls", "--target-saving", 0.1),
    ("--policy", "ucb", "--ratio-schedule", "pods", "--epochs", 7),
    ("--policy", "soft", "--target-saving", 0.2, "--whole-batches"),
]


@pytest.mark.parametrize("flags", POLICY_RUNS, ids=lambda flags: " ".join(map(str, flags)))
def test_every_policy_trains_and_those_that_remember_resume_bit_for_bit(
    tmp_path, monkeypatch, flags: tuple
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    plans: list[Plan] = []
    scores: list[torch.Tensor] = []
    sample, close = InfoBatch.sample, Progress.close_epoch

    def drawn(self, *args):
        plans.append(sample(self, *args))
        return plans[-1]

    def closed(self, *args, **kwargs):
        scores.append(self.infobatch.scores.clone())
        return close(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(InfoBatch, "sample", drawn)
        patch.setattr(Progress, "close_epoch", closed)
        assert run_main(*flags, "--out", whole) == 0
    # The run's records against the plans that were drawn.
    lines, arrays, summary = epochs_of(whole), arrays_of(whole), summary_of(whole)
    kept = [0] * 300
    for plan, line in zip(plans, lines, strict=True):
        for i in plan.indices.tolist():
            kept[i] += 1
        assert line["kept"] == len(plan)
        assert line["ratio"] == plan.ratio
        assert line["prunable"] == plan.num_prunable
        assert line["expected_saving"] == plan.ratio * plan.num_prunable / 300
    assert arrays["kept"].tolist() == kept
    assert sum(kept) == summary["samples_trained"]
    assert (summary["samples_saved"] > 0) == ("none" not in flags)
    mean = sum(line["expected_saving"] for line in lines) / len(lines)
    assert summary["expected_saving"] == pytest.approx(mean)
    assert summary["expected_saving"] == pytest.approx(summary["saved_share"], abs=0.05)
    data = make_synthetic(300, 60, 10, easy=0.5, hard=0.1, seed=0)
    np.testing.assert_array_equal(arrays["labels"], data.labels.numpy())
    np.testing.assert_array_equal(arrays["pictures"], data.images.numpy()[arrays["pictured"]])
    np.testing.assert_array_equal(arrays["scores"], scores[-1].numpy())
    np.testing.assert_array_equal(arrays["tracked"], np.arange(300))
    np.testing.assert_array_equal(arrays["score_history"], torch.stack(scores).numpy())

    if flags[1] not in ("repb", "ucb") and "--target-saving" not in flags:
        return  # nothing is remembered but the scores

    # A kill in the third epoch, after its checkpoint of three steps.
    class Killed(BaseException):
        pass

    steps, call = [], STEP.__call__
    last = sum(math.ceil(len(plan) / 25) for plan in plans[:2]) + 4

    def struck(self, *args):
        steps.append(1)
        if len(steps) == last:
            raise Killed
        call(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(STEP, "__call__", struck)
        with pytest.raises(Killed):
            run_main(*flags, "--checkpoint-every", 3, "--out", stopped)
    state = checkpoint.load(stopped / "checkpoint.pt")
    assert (state["epoch"], state["number"]) == (2, 3)
    assert train.main(["--resume", str(stopped)]) == 0
    assert epochs_of(stopped) == lines
    mine, theirs = (checkpoint.load(path / "checkpoint.pt") for path in (stopped, whole))
    mine["config"].pop("checkpoint_every")
    theirs["config"].pop("checkpoint_every")
    assert_equal(mine, theirs)
    for name, array in arrays_of(stopped).items():
        np.testing.assert_array_equal(array, arrays[name])


def test_a_target_is_met_and_told_of(tmp_path, capsys) -> None:
    folder = tmp_path / "met"
    arguments = ("--policy", "random", "--epochs", 6, "--ratio", 0.9)
    assert run_main(*arguments, "--target-saving", 0.4, "--out", folder) == 0
    out = capsys.readouterr().out
    summary = summary_of(folder)
    assert summary["samples_saved"] == 720  # 0.4 * 6 * 300
    assert summary["target_saving"] == 0.4
    assert "pruning    random: to save 40.0% of all samples" in out
    assert "target     48.0% of the samples out of each epoch that prunes" in out  # 0.4 / (5 / 6)
    assert "target     40.0% of the samples to save: reached, 40.0%" in out
    assert re.findall(r"  r (\S+)", out) == ["0.000", *["0.480"] * 5]
    assert "WARNING: target" not in out
    assert [line["kept"] for line in epochs_of(folder)] == [300, *[156] * 5]


def test_a_target_that_cannot_be_met_is_told_of(tmp_path, capsys) -> None:
    assert run_main("--target-saving", 0.9, "--out", tmp_path / "most") == 0
    out = capsys.readouterr().out
    told = (
        "WARNING: target_saving 0.9 cannot be reached: 3 of the 4 epochs can leave out samples, "
        "90% of them at most, and so the run can save 67.5% at most"
    )
    assert out.count(told) == 1
    assert re.search(r"90\.0% of the samples to save: NOT REACHED, \d\d\.\d%", out)
    for line in epochs_of(tmp_path / "most")[1:]:
        n = line["prunable"]
        assert line["ratio"] == pytest.approx(0.9)
        assert line["kept"] == 300 - n + max(1, round((1 - 0.9) * n))
    # Below what any policy can save, but more than lies below the mean of these scores.
    assert run_main("--target-saving", 0.6, "--out", tmp_path / "soft") == 0
    out = capsys.readouterr().out
    assert "cannot be reached" not in out
    # 0.6 x 4 epochs over the three that can prune, of nine in ten.
    told = "target     80.0% of the samples out of each epoch that prunes, possible while 88.9% are"
    assert told in out
    assert out.count("WARNING: target_saving 0.6 asks epoch 2 to leave out 240 samples") == 1
    assert "60.0% of the samples to save: NOT REACHED" in out


@pytest.mark.parametrize(("flag", "value"), [("policy", "none"), ("delta", 0.0)])
def test_a_target_needs_epochs_that_prune(flag, value, tmp_path, capsys) -> None:
    words = ("--target-saving", 0.1, f"--{flag}", value, "--out", tmp_path / "x")
    assert fails(capsys, *words) == (
        f"target_saving needs epochs that prune, got 0.1 with {flag} {value}"
    )


@pytest.mark.parametrize(
    ("kwargs", "scored", "asked", "says"),
    [
        ({}, 100, 60, None),
        (
            {},
            100,
            95,
            "of its 100 prunable ones it leaves out at most 90%, as those kept are weighted: 90",
        ),
        ({"rescale": False}, 100, 95, None),
        ({"rescale": False}, 100, 101, "of its 100 prunable ones it leaves out all but one: 99"),
        (
            {"policy": "random"},
            90,
            85,
            "of its 90 prunable ones it leaves out at most 90%, as those kept are weighted: 81",
        ),
        ({"policy": "hard"}, 90, 100, "of its 90 prunable ones it leaves out all but one: 89"),
        ({"policy": "hard"}, 0, 30, "of its 0 prunable ones it leaves out all but one: 0"),
    ],
)
def test_an_epoch_out_of_reach_is_warned_of(kwargs, scored, asked, says) -> None:
    # Of the three epochs the second and the third can prune: each is asked for half.
    target = 2 * asked / 600
    infobatch = InfoBatch(200, 3, delta=1.0, target_saving=target, device="cpu", **kwargs)
    infobatch.scores[:scored] = 0.5
    if infobatch.policy == "soft":
        infobatch.scores[scored:] = 1.5
    assert train.console.strained(infobatch.sample(0), infobatch) is None
    warning = train.console.strained(infobatch.sample(1), infobatch)
    asks = f"WARNING: target_saving {target:g} asks epoch 2 to leave out {asked} samples; "
    assert warning == (None if says is None else f"{asks}{says}; the rest falls to later epochs")
    if says is not None:
        warning = train.console.strained(infobatch.sample(2), infobatch)
        assert warning is not None
        assert warning.endswith("; so it is missed")


def test_a_schedule_is_told_of(tmp_path, capsys) -> None:
    flags = ("--policy", "hard", "--ratio-schedule", "pods", "--epochs", 12, "--no-anneal")
    assert run_main(*flags, "--out", tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "pruning    hard, no annealing, pods schedule: saves at most" in out
    ratios = [line["ratio"] for line in epochs_of(tmp_path / "run")]
    assert np.mean(ratios[1:]) == pytest.approx(0.5, abs=1e-12)
    shown = [float(ratio) for ratio in re.findall(r"  r (\S+)", out)]
    assert shown == pytest.approx(ratios, abs=6e-4)
    assert len(set(shown)) > 3
    assert run_main("--score", "bls", "--out", tmp_path / "bls") == 0
    assert "pruning    soft, bls scores: saves" in capsys.readouterr().out


def test_a_fraction_of_the_data(tmp_path, capsys, monkeypatch) -> None:
    taken = []
    make = train.make_loader

    def spy(kind, images, labels, *args, **kwargs):
        taken.append(images)
        return make(kind, images, labels, *args, **kwargs)

    monkeypatch.setattr(train, "make_loader", spy)
    # The images of a synthetic data set follow the seed: here they are the same ones.
    whole = make_synthetic(300, 60, 10, easy=0.5, hard=0.1, seed=0)
    monkeypatch.setattr(train, "make_synthetic", lambda *args, **kwargs: whole)
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        flags = ("--data-fraction", 0.1, "--batch-size", 10, "--epochs", 2, "--seed", seed)
        assert run_main(*flags, "--out", folder) == 0
        assert "30 training and 6 test images" in capsys.readouterr().out
        about = json.loads((folder / "config.json").read_text())
        assert about["samples"] == {"train": 30, "test": 6}
        assert about["config"]["data_fraction"] == 0.1
        assert epochs_of(folder)[0]["kept"] == 30
        assert arrays_of(folder)["labels"].tolist() == whole.part(0.1).labels.tolist()
        assert torch.equal(taken[-1], whole.part(0.1).images)
    assert torch.equal(taken[0], taken[1])
    assert train.main(["--evaluate", str(folder), "--device", "cpu"]) == 0
    assert "on the 6 test images" in capsys.readouterr().out


def test_twenty_skipped_steps_in_a_row_end_the_run(tmp_path, capsys) -> None:
    folder = tmp_path / "diverged"
    code = run_main("--out", folder, "--max-lr", "1e30", "--epochs", 9)
    assert code == 1
    error = capsys.readouterr().err
    assert re.match(r"error: \d+ steps in a row had non-finite gradients in epoch \d", error)
    assert error.count("\n") == 1
    assert not (folder / "summary.json").exists()
    if (folder / "checkpoint.pt").exists():
        assert str(folder / "checkpoint.pt") in error
        model = checkpoint.load(folder / "checkpoint.pt")["step"]["model"]
        assert all(value.isfinite().all() for value in model.values())


def fails(capsys, *arguments: object) -> str:
    """The one line of a mistake."""
    assert train.main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.out + captured.err
    return captured.err.removeprefix("error: ").strip()


def test_mistakes(finished: Path, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert fails(capsys, "--ratio", "1.5") == "ratio must be in [0, 1), got 1.5"
    assert fails(capsys, "--target-saving", 1) == "target_saving must be in (0, 1), got 1.0"
    assert fails(capsys, "--data-fraction", 0) == "data_fraction must be in (0, 1], got 0.0"
    message = fails(capsys, *TINY, "--policy", "sedp")
    assert message.startswith("policy must be one of soft, random, hard, orderdp, repb, ucb, seta")
    assert fails(capsys, *TINY, "--score", "x") == "score must be one of loss, bls, got x"
    message = fails(capsys, *TINY, "--ratio-schedule", "pod")
    assert message.endswith("got pod (did you mean pods?)")
    message = fails(capsys, *TINY, "--data-fraction", 0.01)
    assert message == "batch_size must be at most the 3 training samples, got 25"
    message = fails(capsys, "--resume", finished, "--policy", "repb")
    assert message.startswith("policy must stay soft on --resume (only --data-dir, ")
    message = fails(capsys, *TINY, "--batch-size", 301)
    assert message == "batch_size must be at most the 300 training samples, got 301"
    message = fails(capsys, *TINY, "--out", finished)
    assert message.startswith(f"out must be a new or empty folder, got {finished} with ")
    (tmp_path / "file").write_text("")
    message = fails(capsys, *TINY, "--out", tmp_path / "file" / "run")
    assert message.startswith("cannot make the folder")
    message = fails(capsys, "--resume", tmp_path / "absent")
    where = tmp_path / "absent"
    assert message == f"resume must be a run's folder, with config.json in it, got {where}"
    message = fails(capsys, "--evaluate", tmp_path / "absent.pt")
    assert message.startswith("cannot read checkpoint")
    message = fails(capsys, "--resume", finished, "--ratio", "0.3")
    assert message.startswith("ratio must stay 0.5 on --resume (only --data-dir, ")
    message = fails(capsys, "--resume", "a", "--evaluate", "b")
    assert message == "resume and evaluate exclude each other, got a and b"
    if not torch.cuda.is_available():
        message = fails(capsys, *TINY, "--device", "cuda")
        assert message == "device must be cpu or auto, as torch finds no CUDA device, got cuda"
    monkeypatch.setitem(sys.modules, "infobatch_fast.data.dali", None)
    (tmp_path / "mine").mkdir()
    for out in ("new", "mine"):
        assert "needs NVIDIA DALI" in fails(capsys, *TINY, "--loader", "dali", "--out", out)
    assert sorted(os.listdir(tmp_path)) == ["file", "mine"]
    assert os.listdir(tmp_path / "mine") == []


def test_broken_checkpoints(finished: Path, tmp_path, capsys) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(finished, folder)
    (folder / "summary.json").unlink()
    path = folder / "checkpoint.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "it is cut short, damaged, or no checkpoint" in fails(capsys, "--resume", folder)
    assert "it is cut short, damaged, or no checkpoint" in fails(capsys, "--evaluate", folder)
    path.write_bytes(whole)
    state = checkpoint.load(path)
    checkpoint.save(path, {**state, "config": {**state["config"], "ratio": 0.3}})
    assert "must be of this run's configuration, got another ratio" in fails(
        capsys, "--resume", folder
    )
    step = dict(state["step"])
    step["model"] = {**step["model"], "fc.weight": torch.zeros(3, 3)}
    checkpoint.save(path, {**state, "step": step})
    assert "does not fit this run" in fails(capsys, "--resume", folder)
    for broken in (
        {"history": [{}] * 4},
        {"history": [1] * 4},
        {"history": state["history"][:3]},
        {"history": [{k: v for k, v in x.items() if k != "joules"} for x in state["history"]]},
        {"epoch": "x"},
        {"step": 3},
        {"spent": {}},
        {"phases": {"step": 1.0}},
        {"plan": {"num_prunable": 0, "indices": torch.arange(9), "weights": torch.ones(8)}},
        {"plan": {"num_prunable": 0, "indices": torch.arange(301), "weights": torch.ones(301)}},
        {
            "plan": {"num_prunable": 0, "indices": torch.arange(300), "weights": torch.ones(300)},
            "number": 13,
        },
    ):
        checkpoint.save(path, {**state, **broken})
        assert "does not fit this run" in fails(capsys, "--resume", folder), broken
    checkpoint.save(path, {key: state[key] for key in ("config", "epoch")})
    assert "does not fit this run: KeyError" in fails(capsys, "--resume", folder)
    (folder / "summary.json").write_text("{}")
    assert "is no run's summary" in fails(capsys, "--resume", folder)
    (folder / "config.json").write_text("{")
    assert "is no JSON object" in fails(capsys, "--resume", folder)


def test_a_disk_that_fills_up_keeps_what_was_written(tmp_path, capsys, monkeypatch) -> None:
    folder = tmp_path / "full"
    real, calls = os.fsync, []

    def fsync(number: int) -> None:
        calls.append(number)
        if len(calls) > 12:
            raise OSError(28, "No space left on device")
        real(number)

    monkeypatch.setattr(os, "fsync", fsync)
    message = fails(capsys, *TINY, "--out", folder, "--checkpoint-every", 5)
    assert message.endswith(": No space left on device")
    monkeypatch.undo()
    assert not [name for name in os.listdir(folder) if name.endswith(".tmp")]
    checkpoint.load(folder / "checkpoint.pt")
    assert train.main(["--resume", str(folder)]) == 0


def test_no_data(tmp_path, capsys, monkeypatch) -> None:
    def unreachable(*args, **kwargs):
        raise OSError("network is unreachable")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", unreachable)
    monkeypatch.setattr("socket.socket.connect", unreachable)
    empty = tmp_path / "empty"
    empty.mkdir()
    arguments = ["--device", "cpu", "--data-dir", empty, "--out", tmp_path / "run"]
    message = fails(capsys, "--preset", "paper", *arguments)
    assert "cifar-10" in message
    assert not (tmp_path / "run").exists()
    message = fails(capsys, "--preset", "quick", "--dataset", "cifar10", *arguments)
    assert "cifar-10" in message
    message = fails(capsys, "--preset", "quick", *arguments)  # a folder was named
    assert "cifar-10" in message
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("INFOBATCH_DATA", str(empty))
    small = ["--synthetic-samples", 200, "--epochs", 1, "--loader", "torch"]
    arguments = ["--device", "cpu", "--out", tmp_path / "run", "--preset", "quick", *small]
    assert train.main([*map(str, arguments)]) == 0
    out = capsys.readouterr().out
    assert out.count("SYNTHETIC") == 2
    for name in ("config.json", "summary.json"):
        assert json.loads((tmp_path / "run" / name).read_text())["data"] == "synthetic"


@pytest.mark.parametrize("output", ["/dev/full", None])
def test_an_output_that_takes_nothing(tmp_path, output: str | None) -> None:
    folder = tmp_path / "run"
    words = " ".join([sys.executable, "-m", "infobatch_fast.train", *TINY, "--epochs 1"])
    redirect = f">{output}" if output else ">&-"
    command = f"{words} --loader torch --out {folder} {redirect}"
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert "Traceback" not in run.stderr
    if output is None:
        assert run.returncode == 0
    else:
        assert run.returncode == 2
        assert run.stderr == "error: cannot write the output: No space left on device\n"


def test_out_of_memory_says_what_to_lower(capsys, monkeypatch) -> None:
    def greedy(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 100 GiB")

    monkeypatch.setattr(train, "run", greedy)
    assert "lower --batch-size" in fails(capsys)


def test_whole_batches(tmp_path) -> None:
    folder = tmp_path / "whole"
    assert run_main("--whole-batches", "--batch-size", 40, "--out", folder) == 0
    kept = [line["kept"] for line in epochs_of(folder)]
    assert kept[0] == 300
    assert all(count % 40 == 0 for count in kept[1:])
    assert min(kept) < 300


@pytest.mark.gpu
def test_paper_preset_for_three_epochs_on_cuda(tmp_path, capsys) -> None:
    folder = tmp_path / "run"
    arguments = [
        "--preset",
        "paper",
        "--dataset",
        "synthetic",
        "--synthetic-samples",
        "4000",
        "--epochs",
        "3",
    ]
    assert train.main([*arguments, "--out", str(folder)]) == 0
    epochs = epochs_of(folder)
    assert "fed by DaliLoader" in capsys.readouterr().out
    assert epochs[0]["kept"] == 4000
    assert epochs[1]["kept"] < 4000
    assert epochs[1]["kept"] % 200 == 0
    assert json.loads((folder / "config.json").read_text())["device"]["type"] == "cuda"
