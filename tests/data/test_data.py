"""The order in which forms are looked for, and what is made of the one found."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cifar_files_made import REAL, SHAPES, check, fails, put_archive, put_folder, shrink

from infobatch_fast.data.cifar import DataMissing, default_data_dir, load_cifar, make_synthetic
from infobatch_fast.data.cifar_files import KINDS
from infobatch_fast.data.class_names import CLASSES


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@pytest.mark.parametrize(("name", "index"), SHAPES)
def test_folder(tmp_path: Path, name: str, index: int) -> None:
    folder = put_folder(tmp_path, name, index)
    check(load_cifar(name, tmp_path, download=False), name)
    check(load_cifar(name, str(folder), download=False), name)
    link = tmp_path / "link"
    link.symlink_to(folder)  # another name, the same files
    check(load_cifar(name, link, download=False), name)


@pytest.mark.parametrize(("name", "index"), SHAPES)
def test_archive(tmp_path: Path, name: str, index: int) -> None:
    put_archive(tmp_path, name, index)
    check(load_cifar(name, tmp_path, download=False), name)
    assert len(list(tmp_path.iterdir())) == 1  # nothing unpacked


def test_order_of_forms(tmp_path: Path) -> None:
    form = KINDS["cifar10"].forms
    (tmp_path / form[1].archive).write_bytes(b"broken")
    put_archive(tmp_path, "cifar10", 0)
    check(load_cifar("cifar10", tmp_path), "cifar10")
    (tmp_path / form[0].archive).write_bytes(b"broken")
    put_folder(tmp_path, "cifar10", 1)
    check(load_cifar("cifar10", tmp_path), "cifar10")
    (tmp_path / form[1].folder / "test_batch").write_bytes(b"broken")
    put_folder(tmp_path, "cifar10", 0)
    check(load_cifar("cifar10", tmp_path), "cifar10")


def test_to_copies_every_tensor() -> None:
    small = make_synthetic(4, 2).to("meta")
    tensors = (small.images, small.labels, small.test_images, small.test_labels)
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert small.name == "synthetic"


@pytest.mark.parametrize("fraction", [1e-9, 0.1, 0.25, 0.999, 1.0])
def test_part_is_the_same_share_of_both_splits(fraction: float) -> None:
    data = make_synthetic(1003, 60, 7, seed=2)
    part = data.part(fraction)
    assert part.labels.numel() == max(1, round(fraction * 1003))
    assert part.test_labels.numel() == max(1, round(fraction * 60))
    # Which images: found by their bytes, none twice, in the order that they had.
    for images, labels in (("images", "labels"), ("test_images", "test_labels")):
        number = {image.numpy().tobytes(): i for i, image in enumerate(getattr(data, images))}
        taken = [number[image.numpy().tobytes()] for image in getattr(part, images)]
        assert taken == sorted(set(taken))
        assert torch.equal(getattr(part, labels), getattr(data, labels)[taken])
        assert getattr(part, images).is_contiguous()
    assert (part.name, part.source, part.num_classes) == ("synthetic", "synthetic", 7)
    assert (part.mean, part.std) == (data.mean, data.std)


def test_part_is_uniform_and_takes_no_seed() -> None:
    data = make_synthetic(5000, 50, seed=1)
    places = replace(data, labels=torch.arange(5000), test_labels=torch.arange(50))
    taken = places.part(0.1).labels
    before = torch.get_rng_state()
    torch.manual_seed(9)
    again = replace(places, images=data.images.clone()).part(0.1)
    torch.set_rng_state(before)
    assert torch.equal(taken, again.labels)
    assert places.part(1) is places
    # Every tenth of the data set gives about its share: binomially 50 of 500, at most.
    counts = torch.histc(taken.float(), 10, 0, 5000)
    assert (counts - 50).abs().max() < 4 * (500 * 0.1 * 0.9) ** 0.5
    assert set(places.part(0.05).labels.tolist()) < set(taken.tolist())  # a larger share adds to it


def test_names_of_classes(tmp_path: Path) -> None:
    assert {name: len(names) for name, names in CLASSES.items()} == {"cifar10": 10, "cifar100": 100}
    for names in CLASSES.values():
        assert list(names) == sorted(set(names)) or names is CLASSES["cifar10"]
        assert len(set(names)) == len(names)
    assert CLASSES["cifar100"][::11] == (
        *("apple", "boy", "clock", "forest", "lizard"),
        *("otter", "raccoon", "snail", "tiger", "worm"),
    )
    for name, names in CLASSES.items():
        put_folder(tmp_path, name, 0)
        assert load_cifar(name, tmp_path, download=False).part(0.5).classes == names
    assert make_synthetic(4, 2).classes is None


def test_published_sizes() -> None:
    sizes = {name: (kind.train_records, kind.test_records) for name, kind in REAL.items()}
    assert sizes == {"cifar10": (10_000, 10_000), "cifar100": (50_000, 10_000)}


@pytest.mark.skipif(not os.environ.get("INFOBATCH_DATA"), reason="INFOBATCH_DATA is not set")
def test_genuine(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = REAL["cifar10"]
    monkeypatch.setitem(KINDS, "cifar10", kind)
    try:
        got = load_cifar("cifar10", default_data_dir(), download=False)
    except DataMissing:
        pytest.skip("INFOBATCH_DATA holds no CIFAR-10")
    names = default_data_dir() / "cifar-10-batches-bin" / "batches.meta.txt"
    if names.exists():
        assert got.classes == tuple(names.read_text().split())
    assert got.labels.bincount().tolist() == [5000] * 10
    assert got.test_labels.bincount().tolist() == [1000] * 10
    mean = got.images.sum((0, 1, 2), dtype=torch.int64) / (50_000 * 1024 * 255)
    torch.testing.assert_close(mean, torch.tensor(kind.mean), rtol=0, atol=1e-4)


def test_unknown_name(tmp_path: Path) -> None:
    with fails(r"dataset must be one of cifar10, cifar100, got cifar11 \(did you mean cifar10\?\)"):
        load_cifar("cifar11", tmp_path)


def test_form_in_place_of_folder(tmp_path: Path) -> None:
    path = tmp_path / "cifar-10-batches-bin"
    path.write_bytes(b"")
    with fails(rf"{re.escape(str(path))}/data_batch_1.bin must be readable, got .*Not a directory"):
        load_cifar("cifar10", tmp_path)
    with fails(f"data_dir must be a folder, got {re.escape(str(path))}"):
        load_cifar("cifar10", path)
    archive = tmp_path / "b" / "cifar-10-python.tar.gz"
    archive.mkdir(parents=True)
    with fails(f"{re.escape(str(archive))} must be a regular file"):
        load_cifar("cifar10", tmp_path / "b")
    with fails("must be readable, got .*null"):
        load_cifar("cifar10", "a\0b")


def test_download_off(tmp_path: Path) -> None:
    with pytest.raises(DataMissing) as caught:
        load_cifar("cifar100", tmp_path / "x", download=False)
    assert str(caught.value) == (
        f"data_dir {tmp_path}/x must hold one of cifar-100-binary, cifar-100-python, "
        "cifar-100-binary.tar.gz, cifar-100-python.tar.gz, got none and downloading is off: put "
        "one there, set INFOBATCH_DATA or --data-dir to the folder that has it, or use "
        "--dataset synthetic"
    )
    assert not list(tmp_path.iterdir())


def test_default_data_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INFOBATCH_DATA", "/some/where")
    assert default_data_dir() == Path("/some/where")
    monkeypatch.setenv("INFOBATCH_DATA", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert default_data_dir() == Path("/cache/infobatch_fast")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_data_dir() == tmp_path / ".cache" / "infobatch_fast"
    monkeypatch.delenv("INFOBATCH_DATA")

    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", homeless)
    with fails("INFOBATCH_DATA must be set where the user has no home folder"):
        default_data_dir()
