"""Checkpoints are whole or not there, and execute nothing."""

import errno
import os
import pickle

import pytest
import torch

from infobatch_fast.errors import UserError
from infobatch_fast.train import checkpoint


def test_round_trip(tmp_path) -> None:
    path = tmp_path / "checkpoint.pt"
    state = {"a": torch.arange(5), "b": {"c": [1, 2.5, None, "x"]}, "d": torch.tensor(float("nan"))}
    checkpoint.save(path, state)
    loaded = checkpoint.load(path)
    assert torch.equal(loaded["a"], state["a"])
    assert loaded["b"] == state["b"]
    assert loaded["d"].isnan()
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch, call: str) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"a": 1})
    error = OSError(errno.ENOSPC, "No space left on device")

    def fail(*args, **kwargs):
        raise error

    target = "builtins.open" if call == "open" else f"os.{call}"
    monkeypatch.setattr(target, fail)
    with pytest.raises(UserError, match=r"^cannot write .*checkpoint.pt: No space left on device$"):
        checkpoint.save(path, {"a": 2})
    monkeypatch.undo()
    assert checkpoint.load(path)["a"] == 1
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_leftover_of_a_killed_write_is_overwritten(tmp_path) -> None:
    (tmp_path / ".checkpoint.pt.tmp").write_bytes(b"half")
    checkpoint.save(tmp_path / "checkpoint.pt", {"a": 1})
    assert os.listdir(tmp_path) == ["checkpoint.pt"]
    os.mkfifo(tmp_path / ".checkpoint.pt.tmp")  # would be waited for
    checkpoint.save(tmp_path / "checkpoint.pt", {"a": 1})
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_signal_while_writing_leaves_the_old_one_alone(tmp_path, monkeypatch) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"a": 1})

    def struck(number: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", struck)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {"a": 2})
    monkeypatch.undo()
    assert checkpoint.load(path)["a"] == 1
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_cut_short_anywhere(tmp_path) -> None:
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, {"a": torch.arange(1000)})
    content = path.read_bytes()
    for length in [0, 1, 10, *range(100, len(content), 397), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(
            UserError,
            match=r"checkpoint\.pt cannot be loaded \(\w+\): it is cut short, damaged, or no",
        ):
            checkpoint.load(path)


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_nothing_is_executed(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "checkpoint.pt"
    torch.save({"version": checkpoint.VERSION, "a": Malicious()}, path)
    with pytest.raises(UserError, match="cannot be loaded"):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(UserError, match="cannot be loaded"):
        checkpoint.load(path)
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_other_contents(tmp_path) -> None:
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(UserError, match=r"^cannot read checkpoint .*: No such file or directory$"):
        checkpoint.load(path)
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="must hold a dictionary, got list"):
        checkpoint.load(path)
    torch.save({"a": 1}, path)
    with pytest.raises(UserError, match=r"must be of version 1, got None"):
        checkpoint.load(path)
