"""Folders of images on a card: its decoder against Pillow, and a training by it."""

import json
from pathlib import Path

import pytest
import torch
from folders_made import GOOD, make_tree, undecodable, write

from infobatch_fast.data.folder import load_folder
from infobatch_fast.data.loader import make_loader
from infobatch_fast.plan import Plan
from infobatch_fast.train import main

pytestmark = pytest.mark.gpu
dali_folder = pytest.importorskip("infobatch_fast.data.dali_folder")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_cards_decoder_gives_pillows_pixels_within_its_rounding(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(dali_folder.DaliFolderLoader, "smooth", True)
    write(tmp_path / "train" / "a", GOOD)
    write(tmp_path / "val" / "a", GOOD)
    data = load_folder(
        tmp_path, side=24, test_side=24, workers=2, max_bad_files=0, say=lambda line: None
    ).to(torch.device("cuda", 0))
    number = len(GOOD)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(0)).cuda()
    plan = Plan(0, number, 0, order, torch.ones(number, device="cuda"))
    pixels = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}
    twin, ours = (
        next(iter(make_loader(kind, data.images, data.labels, number, **pixels)[0].epoch(plan)))
        for kind in ("torch", "dali")
    )
    off = (twin[0] - ours[0]).abs().amax((1, 2, 3))
    names = [sorted(GOOD)[i] for i in order.tolist()]
    assert {name: most for name, most in zip(names, off.tolist(), strict=True) if most > 8} == {}
    assert (twin[0] - ours[0]).abs().mean() < 1


def test_a_run_is_captured_and_leaves_out_what_is_broken(tmp_path: Path) -> None:
    write(make_tree(tmp_path, train=40) / "train" / "cat", {"004.jpg": undecodable()})
    words = (
        "--preset imagenet --model r18 --train-size 64 --test-size 64 --batch-size 8 --epochs 4 "
    )
    words += "--max-lr 0.1 --max-bad-files 1 --loader dali --no-compile"
    out = tmp_path / "run"
    assert main([*words.split(), "--data-dir", str(tmp_path), "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["loader"], summary["captured"]) == ("DaliFolderLoader", True)
    assert (out / "bad_files.json").exists()
