"""The trainer as a user runs it: records, resuming after a kill, and every mistake's one line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from infobatch_fast import checkpoint, train
from infobatch_fast.record import source_hash

TINY = (
    "--device cpu --dataset synthetic --synthetic-samples 300 --batch-size 25 --epochs 4 "
    "--max-lr 0.05"
).split()
TIMES = re.compile(r"_seconds$|images_per_second")


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
            if not (isinstance(key, str) and (TIMES.search(key) or key == "seconds")):
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
        "model.pt",
        "summary.json",
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
def test_a_signal_leaves_a_checkpoint_of_this_step(
    finished: Path, tmp_path, number: signal.Signals
) -> None:
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
    message = fails(capsys, *TINY, "--batch-size", 301)
    assert message == "batch_size must be at most the 300 training samples, got 301"
    message = fails(capsys, *TINY, "--out", finished)
    assert message.startswith(f"out must be a new or empty folder, got {finished} with ")
    (tmp_path / "file").write_text("")
    message = fails(capsys, *TINY, "--out", tmp_path / "file" / "run")
    assert message.startswith("cannot make the run's folder")
    message = fails(capsys, "--resume", tmp_path / "absent")
    assert (
        message == f"cannot read {tmp_path / 'absent' / 'config.json'}: No such file or directory"
    )
    message = fails(capsys, "--evaluate", tmp_path / "absent.pt")
    assert message.startswith("cannot read checkpoint")
    message = fails(capsys, "--resume", finished, "--ratio", "0.3")
    assert message.startswith("ratio must stay 0.5 on --resume (only --data-dir, ")
    if not torch.cuda.is_available():
        message = fails(capsys, *TINY, "--device", "cuda")
        assert message == "device must be cpu or auto, as torch finds no CUDA device, got cuda"
    assert os.listdir(tmp_path) == ["file"]


def test_broken_checkpoints(finished: Path, tmp_path, capsys) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(finished, folder)
    (folder / "summary.json").unlink()
    path = folder / "checkpoint.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "cut short, damaged, or not a checkpoint" in fails(capsys, "--resume", folder)
    assert "cut short, damaged, or not a checkpoint" in fails(capsys, "--evaluate", folder)
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
    checkpoint.save(path, {key: state[key] for key in ("config", "epoch")})
    assert "does not fit this run: KeyError" in fails(capsys, "--resume", folder)
    (folder / "config.json").write_text("{")
    assert "must hold a JSON object" in fails(capsys, "--resume", folder)


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
    small = ["--synthetic-samples", 200, "--epochs", 1, "--loader", "torch"]
    arguments = [*map(str, arguments), "--preset", "quick", *map(str, small)]
    assert train.main(arguments) == 0
    out = capsys.readouterr().out
    assert out.count("SYNTHETIC") == 2
    for name in ("config.json", "summary.json"):
        assert json.loads((tmp_path / "run" / name).read_text())["data"] == "synthetic"


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
def test_paper_preset_for_one_epoch_on_cuda(tmp_path) -> None:
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
    assert epochs[0]["kept"] == 4000
    assert epochs[1]["kept"] < 4000
    assert json.loads((folder / "config.json").read_text())["device"]["type"] == "cuda"
