"""The index of a folder of images: its order, what it refuses, and when it looks anew."""

import os
from pathlib import Path

import numpy as np
import pytest
from folders_made import BAD, GOOD, write
from torchvision.datasets import ImageFolder

from infobatch_fast.data.tree import BadFiles, read_tree
from infobatch_fast.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "train" / "b" / "deeper", {"one.png": GOOD["rgb.png"]})
    write(tmp_path / "train" / "b", GOOD | {"notes.txt": b"not looked at"})
    write(tmp_path / "train" / "a", {"x.JPG": GOOD["grey.jpeg"], "ü.jpg": GOOD["jpeg.jpg"]})
    return tmp_path / "train"


def read(folder: Path, most: int = 0):
    told: list[str] = []
    bad = BadFiles(most)
    return read_tree(folder, bad, told.append), bad.why, told


def test_the_order_and_labels_are_those_of_torchvision(folder: Path) -> None:
    tree, bad, _ = read(folder)
    theirs = ImageFolder(str(folder))
    assert [str(folder / os.fsdecode(name)) for name in tree.names] == [p for p, _ in theirs.imgs]
    assert (tree.labels.tolist(), list(tree.classes)) == (theirs.targets, theirs.classes)
    assert bad == {}
    sides = dict(zip(tree.names.tolist(), map(tuple, tree.sides.tolist()), strict=True))
    assert [sides.pop(name) for name in (b"b/lying.jpg", b"b/lying.tif")] == [(60, 48)] * 2
    assert set(sides.values()) == {(48, 60)}
    assert tree.sizes.sum() == sum((folder / os.fsdecode(n)).stat().st_size for n in tree.names)


def test_bad_files_are_named_counted_and_left_out(folder: Path) -> None:
    write(folder / "c", {name: content for name, (content, _) in BAD.items()})
    (folder / "c" / "nowhere.jpg").symlink_to("absent")
    with pytest.raises(UserError, match=r"^max_bad_files must .*got 5 and 6 that.* and 3 more$"):
        read(folder, most=5)
    tree, bad, _ = read(folder, most=6)
    for name, (_, why) in BAD.items():
        assert bad[f"train/c/{name}"].startswith(why)
    assert bad["train/c/nowhere.jpg"].startswith("No such file")
    assert len(bad) == 6
    assert len(tree.names) == len(GOOD) + 3
    assert tree.classes == ("a", "b", "c")


@pytest.mark.parametrize("content", [{}, {"a/text.txt": b"text"}, {"lone.jpg": GOOD["jpeg.jpg"]}])
def test_a_folder_without_images_is_told_of(tmp_path: Path, content: dict[str, bytes]) -> None:
    with pytest.raises(UserError, match="must be a folder that can be read"):
        read(tmp_path / "absent")
    (tmp_path / "train").mkdir()
    write(tmp_path / "train", content)
    with pytest.raises(UserError, match="must hold a folder of images for each class, got no"):
        read(tmp_path / "train")


def test_only_what_changed_is_looked_into_again(folder: Path, cache: Path) -> None:
    def number(told: list[str]) -> int:
        return int(told[0].split()[3]) if told else 0

    def looked() -> int:
        tree, _, told = read(folder, most=1)
        again, bad, more = read(folder, most=1)
        assert number(more) == len(bad)  # which may be sound by then
        for one, other in zip(tree, again, strict=True):
            np.testing.assert_array_equal(one, other)
        return number(told)

    assert looked() == len(GOOD) + 3
    assert looked() == 0
    write(folder / "b", {"jpeg.jpg": GOOD["lying.jpg"], "more.jpg": BAD["text.jpg"][0]})
    os.utime(folder / "b" / "some.bmp", ns=(0, 1))
    assert looked() == 3
    (folder / "b" / "more.jpg").unlink()
    assert looked() == 0
    (kept,) = cache.rglob("*.npz")
    for damage in (b"", kept.read_bytes()[:-200]):
        kept.write_bytes(damage)
        assert looked() == len(GOOD) + 3


def test_without_a_cache_every_file_is_looked_into(folder: Path, cache: Path) -> None:
    cache.write_bytes(b"")  # no folder
    assert all(read(folder)[2] for _ in range(2))
