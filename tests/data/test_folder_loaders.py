"""Loaders of folders: the two agree, read and decode what is asked for, and lose what is broken."""

import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from folders_made import GOOD, make_tree, undecodable, write
from PIL import Image
from torch import Tensor

from infobatch_fast.data import folder as folder_module
from infobatch_fast.data.augment import middle_windows, random_windows
from infobatch_fast.data.dataset import Dataset
from infobatch_fast.data.folder import Files, load_folder
from infobatch_fast.data.loader import Loader, make_loader
from infobatch_fast.errors import UserError
from infobatch_fast.plan import Plan
from infobatch_fast.train.distributed import Ranks
from infobatch_fast.train.loop import for_testing

needs_dali = pytest.mark.skipif(find_spec("nvidia.dali") is None, reason="DALI is not installed")
either = pytest.mark.parametrize("kind", ["torch", pytest.param("dali", marks=needs_dali)])
PIXELS: dict[str, Any] = {"mean": (0.0,) * 3, "std": (1 / 255,) * 3}  # output = pixel value
SIDE = 24


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def load(root: Path, **options: Any) -> Dataset:
    options = {"side": SIDE, "test_side": 32, "workers": 0, "say": lambda line: None} | options
    return load_folder(root, **options)


def loader(kind: str, data: Dataset, batch_size: int = 8, **options: Any) -> Loader:
    return make_loader(kind, data.images, data.labels, batch_size, **PIXELS, seed=5, **options)[0]


def plan_of(data: Dataset, count: int, epoch: int = 0) -> Plan:
    number = len(data.labels)
    order = torch.randperm(number, generator=torch.Generator().manual_seed(epoch))[:count]
    return Plan(epoch, number, 0, order, 1 + order.float())


def epoch(loader: Loader, plan: Plan, start: int = 0) -> list[tuple[Tensor, Tensor, Any]]:
    batches = [(images.clone(), y, batch) for images, y, batch in loader.epoch(plan, start)]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x, *_ in batches)
    return batches


@pytest.fixture
def kinds(tmp_path: Path) -> Dataset:
    write(tmp_path / "train" / "a", GOOD)
    write(tmp_path / "val" / "a", GOOD)
    return load(tmp_path)


@needs_dali
def test_every_kind_is_decoded_alike_bit_for_bit(kinds: Dataset, monkeypatch) -> None:
    def unscaled(self: Files, numbers: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        windows = torch.tensor([[7, 5, SIDE, SIDE]]).repeat(len(numbers), 1)
        return windows, numbers % 2 == 0

    monkeypatch.setattr(Files, "windows", unscaled)
    plan = plan_of(kinds, len(GOOD))
    twin, ours = (epoch(loader(kind, kinds, 20), plan)[0][0] for kind in ("torch", "dali"))
    assert torch.equal(twin.round(), ours.round())
    names = dict(enumerate(sorted(GOOD)))
    colour = {names[int(i)]: x for i, x in zip(plan.indices, twin.round(), strict=True)}
    for other in ("png_as.jpg", "some.bmp", "some.tif", "some.ppm", "alpha.png"):
        assert torch.equal(colour[other], colour["rgb.png"]) == (
            (sorted(GOOD).index(other) - sorted(GOOD).index("rgb.png")) % 2 == 0
        )
    for grey in ("grey.jpeg", "deep.png"):
        assert torch.equal(colour[grey][0], colour[grey][2])
        assert (colour[grey].amax() - colour[grey].amin()) > 50


@needs_dali
def test_scaled_images_differ_by_rounding(kinds: Dataset) -> None:
    plan = plan_of(kinds, len(GOOD))
    for augment in (True, False):
        pair = [epoch(loader(kind, kinds, 20, augment=augment), plan) for kind in ("torch", "dali")]
        (twin, *_), (ours, *_) = pair[0][0], pair[1][0]
        off = (twin - ours).abs()
        assert off.max() <= 3
        assert off.mean() < 0.5


@either
def test_batches_are_the_plans_wherever_an_epoch_starts(kind: str, tmp_path: Path) -> None:
    data = load(make_tree(tmp_path), workers=1)
    ours = loader(kind, data)
    for number, count in enumerate((20, 13, 8, 3)):
        plan = plan_of(data, count, number)
        batches = epoch(ours, plan)
        assert torch.equal(torch.cat([b.indices for *_, b in batches]), plan.indices)
        assert torch.equal(torch.cat([b.weights for *_, b in batches]), plan.weights)
        assert torch.equal(torch.cat([y for _, y, _ in batches]), data.labels[plan.indices])
        again = epoch(loader(kind, data), plan, 1)
        for (x, *_), (y, *_) in zip(batches[1:], again, strict=True):
            assert torch.equal(x, y)
        next(iter(ours.epoch(plan)))  # left early
    plan = plan_of(data, 3)
    ((images, *_),) = epoch(ours, plan)
    windows, flips = data.images.windows(plan.indices, 5, 0, torch.arange(3), True)
    by_hand = [
        folder_module.decode(data.images.read(row)[0], window, flip, SIDE)
        for row, window, flip in zip(
            plan.indices.tolist(), windows.tolist(), flips.tolist(), strict=True
        )
    ]
    off = images.permute(0, 2, 3, 1) - torch.stack([torch.from_numpy(x) for x in by_hand])
    assert off.abs().max() <= (3 if kind == "dali" else 1e-4)


def test_workers_live_as_long_as_their_loader(tmp_path: Path) -> None:
    data, others = load(make_tree(tmp_path), workers=2), set(active_children())
    ours, without, alive = loader("torch", data), loader("torch", load(tmp_path)), []

    def workers() -> set[int | None]:
        return {process.pid for process in set(active_children()) - others}

    for number, start in enumerate((0, 0, 1)):
        plan = plan_of(data, 20 - number, number)
        for pair in zip(epoch(ours, plan, start), epoch(without, plan, start), strict=True):
            (images, labels, batch), (same_images, same_labels, same) = pair
            assert torch.equal(images, same_images)
            assert torch.equal(labels, same_labels)
            assert torch.equal(batch.indices, same.indices)
        alive.append(workers())
    assert [len(each) for each in alive] == [2, 2, 2]
    assert alive[0] == alive[1] == alive[2]
    plan = plan_of(data, 13)
    pairs = zip(ours.epoch(plan), ours.epoch(plan), strict=True)  # at once
    assert all(torch.equal(one, other) for (one, *_), (other, *_) in pairs)
    next(iter(ours.epoch(plan)))  # left early
    assert not workers()
    epoch(ours, plan)
    assert len(workers()) == 2
    del ours, pairs
    assert not workers()


LEFT = """
from test_folder_loaders import *
data = load(Path(sys.argv[1]), workers=1)
ours, others = loader("torch", data), loader("torch", data)
epoch(ours, plan_of(data, 20))
begun = iter(others.epoch(plan_of(data, 20)))
next(begun)
"""


def test_python_exits_whatever_the_workers_do(tmp_path: Path) -> None:
    folders = [str(Path(folder_module.__file__).parents[2]), str(Path(__file__).parent)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders)}
    command = [sys.executable, "-c", LEFT, str(make_tree(tmp_path))]
    subprocess.run(command, check=True, timeout=120, env=environment)


@either
def test_a_test_gives_every_image_once_in_its_middle(kind: str, tmp_path: Path) -> None:
    data = replace(load(make_tree(tmp_path, val=5)), mean=(0.0,) * 3, std=(1 / 255,) * 3)
    tests = for_testing(data, kind, Ranks())
    (images, labels, _), (again, *_) = [next(iter(tests)) for _ in range(2)]
    assert torch.equal(images, again)
    assert labels.tolist() == [0] * 5 + [1] * 5
    height, width = 40, 70  # of the first
    side = round(224 / 256 * 40)
    left, top = (width - side) // 2, (height - side) // 2
    with Image.open(tmp_path / "val" / "cat" / "000.jpg") as image:
        middle = image.crop((left, top, left + side, top + side)).resize((32, 32), 2)
    expected = torch.from_numpy(np.array(middle)).permute(2, 0, 1)
    assert (images[0] - expected).abs().max() <= 3


@either
@pytest.mark.parametrize("cache", ["on", "off"])
def test_what_is_pruned_is_neither_read_nor_decoded(kind, cache, tmp_path: Path) -> None:
    data = load(make_tree(tmp_path), workers=1, cache=cache)
    ours, sizes, counts = loader(kind, data), data.images.tree.sizes, data.images.counts
    half = plan_of(data, 10)
    epoch(ours, half)
    assert counts.decoded == 10
    assert counts.read == sizes[half.indices.numpy()].sum()
    epoch(ours, plan_of(data, 20, 1))
    assert counts.decoded == 30
    expected = sizes.sum() if cache == "on" else sizes.sum() + sizes[half.indices.numpy()].sum()
    assert counts.read == expected


def test_files_are_kept_where_they_take_a_quarter_of_the_memory(tmp_path, monkeypatch) -> None:
    data = load(make_tree(tmp_path))
    total = sum(int(files.tree.sizes.sum()) for files in (data.images, data.test_images))
    for memory, held in ((4 * total, True), (4 * total - 1, False)):
        monkeypatch.setattr(folder_module, "_memory", lambda memory=memory: memory)
        assert (load(tmp_path).images.held is not None) == held
        assert load(tmp_path, cache="on").images.held is not None
        assert load(tmp_path, cache="off").images.held is None


@either
@pytest.mark.parametrize("broken", ["undecodable", "gone", "changed"])
def test_a_file_that_fails_is_left_out_and_named(kind: str, broken: str, tmp_path: Path) -> None:
    write(make_tree(tmp_path) / "train" / "cat", {"004.jpg": undecodable()})
    data = load(tmp_path, max_bad_files=2, cache="off", workers=1)
    sizes, counts = data.images.tree.sizes, data.images.counts
    file = tmp_path / "train" / "cat" / "004.jpg"
    why = {"gone": "No such file", "changed": "changed since", "undecodable": "unrecognized data"}
    if broken != "undecodable":
        file.unlink() if broken == "gone" else file.write_bytes(GOOD["jpeg.jpg"])
    ours = loader(kind, data)
    sound = load(make_tree(tmp_path / "sound"), cache="off")
    for number in (5, 0):  # it comes in the last of three batches, and in the first
        plan, read = plan_of(data, 20, number), counts.read
        pairs = zip(epoch(ours, plan), epoch(loader(kind, sound), plan), strict=True)
        for (images, labels, batch), (expected, same_labels, same) in pairs:
            here = batch.indices != 4
            assert torch.equal(batch.weights, same.weights * here)
            assert torch.equal(images[here], expected[here])
            assert torch.equal(labels, same_labels)
            assert images[~here].amax((2, 3)).equal(images[~here].amin((2, 3)))  # of one colour
        if number == 0:
            assert counts.read - read == sizes.sum() - sizes[4]  # it is not read again
    assert list(data.bad.why) == ["train/cat/004.jpg"]
    assert data.bad.why["train/cat/004.jpg"].startswith(why[broken])


@needs_dali
def test_a_head_that_dali_alone_refuses_ends_no_process(tmp_path: Path) -> None:
    jpeg = GOOD["jpeg.jpg"]
    head = jpeg.index(b"\xff\xdb")
    write(make_tree(tmp_path, train=60), {"train/cat/004.jpg": jpeg[:head] + b"\0\0" + jpeg[head:]})
    data = load(tmp_path, max_bad_files=1, workers=1)
    ours = loader("dali", data, 20)
    for number in range(3):
        batches = [batch for *_, batch in epoch(ours, plan_of(data, 120, number))]
        lost = torch.cat([batch.indices[batch.weights == 0] for batch in batches])
        assert lost.tolist() == [4]
    assert data.bad.why == {"train/cat/004.jpg": "not decoded by DALI"}


@either
def test_too_many_that_fail_end_it(kind: str, tmp_path: Path) -> None:
    names = ("train/cat/002.jpg", "train/dog/007.jpg", "val/dog/001.jpg")
    write(make_tree(tmp_path), dict.fromkeys(names, undecodable()))
    data = load(tmp_path, max_bad_files=1)
    with pytest.raises(UserError, match="max_bad_files must not be passed, got 1 and 2"):
        epoch(loader(kind, data, 20), plan_of(data, 20))
    data = load(tmp_path, max_bad_files=3)
    ((_, labels, batch),) = for_testing(data, kind, Ranks())
    assert labels[batch.weights > 0].tolist() == [0, 0, 0, 1, 1]
    assert len(labels) == 6  # with a grey one for what cannot be decoded


def test_parts_held_out_images_and_pictures_are_of_their_samples(tmp_path: Path) -> None:
    data = load(make_tree(tmp_path))
    whole = data.images.tree.names
    split = data.part(0.5).with_validation(4)
    assert (len(split.images), len(split.test_images)) == (6, 4)
    rows = torch.cat([split.images.rows, split.test_images.rows])
    assert len(set(rows.tolist())) == 10
    assert torch.equal(torch.cat([split.labels, split.test_labels]), data.labels[rows])
    pictures, all_pictures = split.pictures(torch.tensor([2, 0])), data.pictures(torch.arange(20))
    assert torch.equal(pictures, all_pictures[split.images.rows[[2, 0]]])
    assert data.fingerprint() != split.fingerprint()
    assert data.fingerprint() == load(tmp_path).fingerprint()
    assert len(whole) == 20


def test_a_class_without_an_image_to_train_on_is_a_mistake(tmp_path: Path) -> None:
    write(make_tree(tmp_path) / "val" / "eel", {"a.jpg": GOOD["jpeg.jpg"]})
    with pytest.raises(UserError, match=r"val must hold classes of .*train, got eel$"):
        load(tmp_path)
    write(tmp_path / "train" / "eel", {"a.txt": b"no image"})
    with pytest.raises(UserError, match=r"train.eel must hold an image, .* got none$"):
        load(tmp_path)


def test_windows_do_not_depend_on_how_an_epoch_is_cut() -> None:
    sides = torch.randint(1, 400, (500, 2), generator=torch.Generator().manual_seed(0))
    at = torch.arange(500)
    whole = random_windows(3, 4, at, sides)
    for start in range(0, 500, 77):
        some = random_windows(3, 4, at[start : start + 77], sides[start : start + 77])
        assert all(torch.equal(a, b[start : start + 77]) for a, b in zip(some, whole, strict=True))
    for windows in (whole[0], middle_windows(sides)):
        assert (windows[:, :2] >= 0).all()
        assert (windows[:, 2:] >= 1).all()
        assert (windows[:, :2] + windows[:, 2:] <= sides).all()
    assert not torch.equal(whole[0], random_windows(3, 5, at, sides)[0])
