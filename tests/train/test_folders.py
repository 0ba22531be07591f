"""The trainer on folders of images, and on the user's own parts."""

import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from folders_made import make_tree, undecodable, write
from runs import assert_alike, fails, lines_of, resume, summary_of
from torch import nn
from torchvision import models

from infobatch_fast.errors import UserError
from infobatch_fast.train import config, main
from infobatch_fast.train.ledger import Ledger
from infobatch_fast.train.models import make_model

TINY = "--device cpu --preset quick --batch-size 4 --epochs 4 --max-lr 0.05 --workers 1".split()


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # where runs/ goes


def train(folder: Path, *arguments: object, dataset: str = "folder") -> int:
    where = ["--dataset", dataset, "--data-dir", str(folder)]
    where += "--train-size 24 --test-size 24".split() * (dataset == "folder")
    return main([*TINY, *where, *map(str, arguments)])


@pytest.mark.parametrize("kind", ["torch", "dali"])
def test_a_run_stopped_within_an_epoch_resumes_bit_for_bit(
    kind, tmp_path, monkeypatch, capsys
) -> None:
    if kind == "dali":
        pytest.importorskip("nvidia.dali")
    data = make_tree(tmp_path / "data", train=8)
    options = ["--loader", kind, "--checkpoint-every", 1]
    assert train(data, *options, "--out", tmp_path / "whole") == 0
    save, saved = Ledger.save, []

    def stop(self: Ledger, *arguments: Any) -> None:
        save(self, *arguments)
        saved.append(arguments)
        if self.epoch == 1 and arguments[1:] == (1,):
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Ledger, "save", stop)
    assert train(data, *options, "--out", tmp_path / "parts") == 130
    again = f"--resume {tmp_path / 'parts'} --data-dir {data}"
    assert capsys.readouterr().err.strip() == f"stopped; continue with {again}"
    assert saved[-1][1:] == (2,)
    monkeypatch.setattr(Ledger, "save", save)
    other = make_tree(tmp_path / "other", train=9)
    message = fails(capsys, "--resume", tmp_path / "parts", "--data-dir", other)
    assert message.startswith("data_dir must hold the data of the run")
    assert resume(tmp_path / "parts", "--data-dir", data) == 0
    assert_alike(tmp_path / "whole", tmp_path / "parts")
    assert sum(line["kept"] for line in lines_of(tmp_path / "whole")) < 4 * 16


def test_what_is_left_out_is_told_recorded_and_limited(tmp_path: Path, capsys) -> None:
    files = {"cat/003.jpg": undecodable(), "cat/004.jpg": b"no image"}
    write(make_tree(tmp_path / "data") / "train", files)
    message = fails(capsys, *TINY, "--dataset", "folder", "--data-dir", str(tmp_path / "data"))
    assert message == (
        "max_bad_files must not be passed, got 0 and 1 that cannot be read as images: "
        "train/cat/004.jpg (no image)"
    )
    out = tmp_path / "run"
    few = "--dataset folder --max-bad-files 1 --data-dir data --out run".split()
    assert "got 1 and 2 that cannot" in fails(capsys, *TINY, *few)
    assert not out.exists()  # which is free for the mended command
    assert train(tmp_path / "data", "--max-bad-files", 2, "--loader", "torch", "--out", out) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "left out are" in line]
    assert ["1 that" in told[0], "2 that" in told[1], len(told)] == [True, True, 2]
    assert list(json.loads((out / "bad_files.json").read_text())["why"]) == [
        "train/cat/004.jpg",
        "train/cat/003.jpg",
    ]
    assert summary_of(out)["samples_trained"] + summary_of(out)["samples_saved"] == 4 * 19
    weights = str(out / "model.pt")
    more = ["--data-dir", str(tmp_path / "data"), "--max-bad-files", "1"]
    assert main(["--evaluate", weights, *more]) == 0
    accuracy = summary_of(out)["accuracy_last"]
    assert f"test accuracy {accuracy:.2%}" in capsys.readouterr().out


def test_imagenet_is_the_recipe_of_its_issue() -> None:
    settings = config.parse("--preset imagenet --data-dir x".split(), cuda=True)
    named = ("dataset", "model", "batch_size", "epochs", "optimizer", "max_lr", "label_smoothing")
    assert [getattr(settings, name) for name in named] == [
        *("folder", "r50", 1024, 90, "lars", 6.4, 0.1),
    ]
    assert (settings.train_size, settings.test_size, settings.graph) == (176, 224, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--dataset folder", "data_dir must be given with --dataset folder, got none"),
        ("--dataset folder --data-dir absent", "absent/train must be a folder that can be read"),
        ("--dataset folder --workers -1", "workers must be at least 0, got -1"),
        ("--train-size 24", "train_size must be given with --dataset folder alone, got 24"),
        ("--dataset folders", "dataset must be one of .*, got folders (did you mean folder?)"),
        ("--dataset absent:make --data-dir x", "dataset absent:make cannot be imported"),
        (
            "--model absent:make --dataset synthetic --synthetic-samples 60",
            "model absent:make cannot be imported",
        ),
        (
            "--model os:getcwd --dataset synthetic --synthetic-samples 60",
            "model os:getcwd failed: TypeError",
        ),
        ("--dataset os:listdir --data-dir .", "dataset os:listdir must give two data sets"),
        (f"--dataset {__name__}:own_data --data-dir some --loader dali", "loader must be torch"),
    ],
)
def test_a_mistake_is_one_line(words: str, message: str, capsys) -> None:
    told = fails(capsys, *TINY, *words.split())
    assert all(part in told for part in message.split(".*")), told


# The user's own parts, by this module's name


class Own(torch.utils.data.Dataset):
    classes = ("dark", "bright", "neither")

    def __init__(self, number: int, targets: Any = None, widths: Any = None) -> None:
        self.targets = targets or [i % 3 for i in range(number)]
        self.number, self.widths = number, widths or {}

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, number: int) -> tuple[torch.Tensor, int]:
        label = self.targets[number]
        return torch.randn(3, 12, self.widths.get(number, 14)).double() + label, label


def own_data(folder: Path) -> tuple[Own, Own]:
    assert folder == Path("some")
    return Own(24), Own(9)


def own_network(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 14, num_classes))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"targets": [0, 1]}, "got ValueError: targets torch.int64 of shape (2,) for 24"),
        ({"targets": [0.5] * 24}, "got ValueError: targets torch.float32 of shape (24,) for 24"),
        ({"targets": [3] * 24}, "got ValueError: a label 3 of 3 classes"),
        ({"targets": [-1] * 24}, "got ValueError: a label -1 of 3 classes"),
        ({"widths": {7: 13}}, "of (3, 12, 14), got sample 7: an image of shape (3, 12, 13)"),
        ({"widths": {7: "x"}}, "must give images of (3, 12, 14), got sample 7: TypeError"),
    ],
)
def test_a_mistake_in_own_data_is_one_line(data, message, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.modules[__name__], "made", lambda folder: (Own(24, **data), Own(9)))
    words = f"--dataset {__name__}:made --data-dir some --out run".split()
    assert message in fails(capsys, *TINY, *words)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda classes: None, "AttributeError"),
        (lambda classes: own_network(classes + 1), "(2, 4)"),
        (lambda classes: nn.Linear(5, classes), "RuntimeError: mat1"),
        (lambda classes: own_network(classes).requires_grad_(False), "none that is trained"),
        (lambda classes: sys.exit(3), "SystemExit: 3"),
    ],
)
def test_a_mistake_in_an_own_network_is_one_line(network, message, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys.modules[__name__], "made", network)
    words = f"--dataset {__name__}:own_data --data-dir some --model {__name__}:made --out run"
    told = fails(capsys, *TINY, *words.split())
    asked = f"model {__name__}:made must make logits (2, 3) of images (2, 3, 12, 14), got {message}"
    assert told.startswith((asked, f"model {__name__}:made failed: {message}"))
    assert not Path("run").exists()


def test_a_network_is_tried_on_test_images_before_it_trains() -> None:
    with pytest.raises(UserError, match=r"of images \(2, 3, 20, 20\), got RuntimeError"):
        make_model(f"{__name__}:own_network", 3, (12, 14), (20, 20))


made: Any = None  # by a test


def test_own_data_and_an_own_network(tmp_path: Path, capsys) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    own = ["--model", f"{__name__}:own_network", "--log", "tensorboard"]
    for name, workers in (("one", 1), ("two", 2)):
        out = ["--workers", workers, "--out", tmp_path / name]
        assert train(Path("some"), *own, *out, dataset=f"{__name__}:own_data") == 0
    assert (
        "24 training and 9 test images, 3 classes, fed by WorkerLoader" in capsys.readouterr().out
    )
    one, two = (torch.load(tmp_path / name / "model.pt") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)  # drawn by seed and position
    log = EventAccumulator(str(tmp_path / "one")).Reload()
    kept = [event.value for event in log.Scalars("kept")]
    assert kept == [line["kept"] for line in lines_of(tmp_path / "one")]


def test_weights_and_biases_have_the_epochs_of_a_run(tmp_path: Path, monkeypatch, capsys) -> None:
    asked, told = {}, []

    class Logged:
        @staticmethod
        def log(numbers: dict[str, float], step: int) -> None:
            told.append((step, numbers["kept"]))

    def init(**given: Any) -> type[Logged]:
        asked.update(given)
        return Logged

    own = ["--model", f"{__name__}:own_network", "--log", "wandb"]
    out, data = tmp_path / "named", f"{__name__}:own_data"
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "log wandb needs it: pip install wandb" in fails(
        capsys, *TINY, "--dataset", data, "--data-dir", "some", *own, "--out", "without"
    )
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    assert train(Path("some"), *own, "--out", out, dataset=data) == 0
    assert told == [(line["epoch"], line["kept"]) for line in lines_of(out)]
    assert (asked.pop("dir"), asked.pop("config")["log"]) == (out, "wandb")
    assert asked == {"name": "named", "resume": "auto"}  # of one name, runs differ by their ids


def test_networks_of_timm_and_of_torchvision_itself() -> None:
    pytest.importorskip("timm")
    before = torch.get_rng_state()
    one, again = (make_model("timm:resnet10t", 7, (64, 64), seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert torch.equal(torch.get_rng_state(), before)
    assert one["fc.bias"].shape == (7,)
    theirs: Any = models.resnet18(num_classes=7)
    theirs.load_state_dict(make_model("r18", 7, (64, 80)).state_dict())
    assert theirs.conv1.stride == (2, 2)
    assert make_model("r18", 7, (64, 63)).get_submodule("conv1").stride == (1, 1)
