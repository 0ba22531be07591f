"""A run's files: whole or not there, checked before use, and executing nothing."""

import errno
import json
import os
import pickle
import random

import pytest
import torch

from infobatch_fast.errors import UserError
from infobatch_fast.train import folder
from infobatch_fast.train.records import EpochLine, parse, read_object, write_epochs

STATE = {"version": 1, "a": torch.arange(1000), "b": {"c": [1, 2.5, None, "x"]}}


def test_round_trip(tmp_path) -> None:
    path = tmp_path / "checkpoint.pt"
    (tmp_path / ".checkpoint.pt.tmp").write_bytes(b"half")  # of a write that was killed
    folder.save(path, STATE)
    loaded = folder.load(path)
    assert torch.equal(loaded.pop("a"), STATE["a"])
    assert loaded == {"version": 1, "b": STATE["b"]}
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("struck", ["fsync", "replace", "signal"])
def test_a_full_disk_and_a_signal_keep_the_old_checkpoint(tmp_path, monkeypatch, struck) -> None:
    path = tmp_path / "checkpoint.pt"
    folder.save(path, STATE)
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*args, **kwargs):
        raise KeyboardInterrupt if struck == "signal" else full

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace" if struck == "replace" else "fsync", fail)
        with pytest.raises(KeyboardInterrupt if struck == "signal" else UserError):
            folder.save(path, {"version": 1, "a": torch.zeros(5000)})
    assert torch.equal(folder.load(path)["a"], STATE["a"])
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_damage_anywhere_is_found_before_use(tmp_path) -> None:
    path = tmp_path / "checkpoint.pt"
    folder.save(path, STATE)
    content = path.read_bytes()
    damaged = [content[:length] for length in (0, 1, 10, *range(100, len(content), 997))]
    rng = random.Random(0)
    for _ in range(300):  # one flipped bit
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    refused = 0
    for case in damaged:
        path.write_bytes(case)
        try:
            loaded = folder.load(path)
        except UserError as error:
            refused += "cut short, damaged, or no checkpoint" in str(error)
        else:  # in what zip leaves unused, such as a date
            assert torch.equal(loaded["a"], STATE["a"])
            assert loaded["b"] == STATE["b"]
    assert refused > 0.7 * len(damaged)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_nothing_is_executed(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pt"
    torch.save({**STATE, "a": Malicious()}, path)
    with pytest.raises(UserError, match="cannot be loaded"):
        folder.load(path)
    path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(UserError, match="cannot be loaded"):
        folder.load(path)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_other_contents(tmp_path) -> None:
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(UserError, match=r"^checkpoint .*checkpoint\.pt must be a regular file"):
        folder.load(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="must hold a dictionary, got list"):
        folder.load(path)
    torch.save({"a": 1}, path)
    with pytest.raises(UserError, match=r"must be of version 1, got None"):
        folder.load(path)
    path.unlink()
    os.mkfifo(path)  # would be waited for
    with pytest.raises(UserError, match="must be a regular file"):
        folder.load(path)


LINE = EpochLine(
    **{"epoch": 1, "kept": 3, "prunable": 0, "loss": 1.0, "lr": 0.1, "accuracy": None},
    **{"images_per_second": 2.5, "skipped_steps": 0, "train_seconds": 1.0, "pruning_seconds": None},
    **{"evaluation_seconds": 0.0, "checkpoint_seconds": 0.0, "phases": {"step": 1.0}},
)


def test_epochs_are_appended_and_read_back(tmp_path) -> None:
    path = tmp_path / "epochs.jsonl"
    write_epochs(path, [LINE], "a")
    inode = path.stat().st_ino
    write_epochs(path, [LINE], "a")
    assert path.stat().st_ino == inode  # no file took the place of the first
    rows = path.read_text().splitlines()
    assert [parse(EpochLine, read_object(row, "line"), "line") for row in rows] == [LINE, LINE]
    older = {k: v for k, v in json.loads(rows[0]).items() if k != "startup_seconds"}
    assert parse(EpochLine, older, "line") == LINE
    for name, value in (("kept", "x"), ("kept", None), ("loss", [1]), ("phases", {"step": "y"})):
        with pytest.raises(UserError, match=rf"^line: {name} must be"):
            parse(EpochLine, {**older, name: value}, "line")
    older.pop("kept")
    with pytest.raises(UserError, match="kept"):
        parse(EpochLine, older, "line")


def test_the_commit_of_a_checkout_that_travelled_as_files(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("infobatch_fast.__file__", str(tmp_path / "infobatch_fast/__init__.py"))
    monkeypatch.delenv("INFOBATCH_COMMIT", raising=False)
    assert folder.commit() is None
    monkeypatch.setenv("INFOBATCH_COMMIT", "abc")
    assert folder.commit() == "abc"
