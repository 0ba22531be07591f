"""Tiny runs of the trainer in this process, and how tests look at what they left."""

import json
import re
from pathlib import Path

import numpy as np
import torch

from infobatch_fast.train import main

TINY = (
    "--device cpu --dataset synthetic --synthetic-samples 120 --batch-size 20 --epochs 4 "
    "--max-lr 0.05 --loader torch"
).split()
TIMES = re.compile(r"seconds$|images_per_second|^phases$|^spent$|^checkpoint_every$")
ARRAYS = ("kept", "labels", "pictured", "pictures", "score_history", "scores", "tracked")


def run(*arguments: object) -> int:
    return main([*TINY, *map(str, arguments)])


def resume(folder: Path, *arguments: object) -> int:
    return main(["--resume", str(folder), *map(str, arguments)])


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]


def epochs_of(folder: Path) -> list[dict]:
    """Without the times, which differ from run to run."""
    return [{k: v for k, v in line.items() if not TIMES.search(k)} for line in lines_of(folder)]


def summary_of(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def arrays_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: np.load(folder / f"{name}.npy", allow_pickle=False) for name in ARRAYS}


def fails(capsys, *arguments: object) -> str:
    """The one line of a mistake."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.out + captured.err
    return captured.err.removeprefix("error: ").strip()


def assert_alike(one: Path, other: Path) -> None:
    """Two finished runs are bit for bit the same, but for their times."""
    assert epochs_of(one) == epochs_of(other)
    for name in ("checkpoint.pt", "model.pt"):
        states = [torch.load(folder / name, weights_only=True) for folder in (one, other)]
        assert_equal(*states)
    for name, array in arrays_of(one).items():
        np.testing.assert_array_equal(array, arrays_of(other)[name])


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
