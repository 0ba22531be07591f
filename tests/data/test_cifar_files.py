"""Records, sizes, labels and archives: whatever the bytes, sound data or a `UserError`."""

import gzip
import io
import os
import re
import tarfile
from pathlib import Path

import pytest
from cifar_files_made import (
    LABELS,
    NAMES,
    PIXELS,
    QUIET,
    RECORDS,
    SHAPES,
    archive_bytes,
    array,
    binary,
    check,
    contents,
    fails,
    form_files,
    pickled,
    put_archive,
    put_folder,
    python2,
    refused_or,
    shrink,
    survives,
    tar_bytes,
)
from hypothesis import given
from hypothesis import strategies as st

from infobatch_fast.data import cifar_files
from infobatch_fast.data.cifar import load_cifar
from infobatch_fast.data.cifar_files import KINDS


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


@pytest.mark.parametrize(("name", "index"), SHAPES)
def test_missing_file(tmp_path: Path, name: str, index: int) -> None:
    put_archive(tmp_path, name, index)  # must not be read instead
    folder = put_folder(tmp_path, name, index)
    file = folder / KINDS[name].forms[index].files[-1]
    file.unlink()
    with fails(f"^{re.escape(str(file))} is missing: the data set must be whole$"):
        load_cifar(name, tmp_path)
    file.mkdir()
    with fails(f"^{re.escape(str(file))} must be a regular file, got something else$"):
        load_cifar(name, tmp_path)
    file.rmdir()
    os.mkfifo(file)
    with fails("must be a regular file"):
        load_cifar(name, tmp_path)


def test_missing_member(tmp_path: Path) -> None:
    form = KINDS["cifar10"].forms[0]
    files = form_files("cifar10", 0)
    del files["data_batch_3.bin"]
    path = tmp_path / form.archive
    path.write_bytes(tar_bytes([(f"{form.folder}/{n}", raw) for n, raw in files.items()]))
    with fails(f"{re.escape(str(path))}:{form.folder}/data_batch_3.bin is missing"):
        load_cifar("cifar10", tmp_path)


def test_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put_folder(tmp_path, "cifar10", 0)

    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", refuse)
    with fails(rf"{re.escape(str(folder))}/data_batch_1.bin must be readable, got .*Permission"):
        load_cifar("cifar10", tmp_path)


@pytest.mark.parametrize(("name", "size"), [("cifar10", 3 * 3073), ("cifar100", 3 * 3074)])
@pytest.mark.parametrize("change", [-1, 1, -3073, None])
def test_wrong_size(tmp_path: Path, name: str, size: int, change: int | None) -> None:
    folder = put_folder(tmp_path, name, 0)
    file = folder / KINDS[name].forms[0].files[1]
    got = 0 if change is None else size + change
    file.write_bytes((file.read_bytes() * 2)[:got])
    rule = f"must hold 3 records of {size // 3} bytes = {size} bytes, got {got}"
    with fails(f"^{re.escape(str(file))} {rule}$"):
        load_cifar(name, tmp_path)


def test_large_pickle_is_not_read(tmp_path: Path) -> None:
    folder = put_folder(tmp_path, "cifar10", 1)
    with open(folder / "data_batch_2", "r+b") as file:
        file.truncate(1 << 40)  # a hole: reading it would not end well
    with fails(r"data_batch_2 must be at most 36864 bytes, got 1099511627776"):
        load_cifar("cifar10", tmp_path)


@pytest.mark.parametrize(("name", "index"), SHAPES)
def test_label_out_of_range(tmp_path: Path, name: str, index: int) -> None:
    folder = put_folder(tmp_path, name, index)
    planes, labels = contents(name)[-1]
    limit = KINDS[name].num_classes
    labels[1] = limit
    file = folder / KINDS[name].forms[index].files[-1]
    file.write_bytes((binary, pickled)[index](name, planes, labels))
    rule = rf"the label of record 1 must be in \[0, {limit}\), got {limit}"
    with fails(f"^{re.escape(str(file))}: {rule}$"):
        load_cifar(name, tmp_path)


# Archives


def test_archive_with_other_members(tmp_path: Path) -> None:
    form = KINDS["cifar10"].forms[1]
    link = tarfile.TarInfo(f"{form.folder}/data_batch_1")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    hard = tarfile.TarInfo(f"{form.folder}/data_batch_2")
    hard.type, hard.linkname = tarfile.LNKTYPE, "../../x"
    device = tarfile.TarInfo(f"{form.folder}/test_batch")
    device.type = tarfile.CHRTYPE
    outside = tarfile.TarInfo("../../outside")
    raw = archive_bytes("cifar10", 1, extra=(link, hard, device, outside))
    (tmp_path / form.archive).write_bytes(raw)
    check(load_cifar("cifar10", tmp_path), "cifar10")


def zeros_archive(name: str, size: int) -> bytes:
    """A tar whose one member is `size` zeros, packed a thousandfold."""
    info = tarfile.TarInfo(name)
    info.size = size
    buffer = io.BytesIO(info.tobuf())
    with gzip.GzipFile(fileobj=(packed := io.BytesIO()), mode="w", compresslevel=1) as out:
        out.write(buffer.getvalue())
        for _ in range(size >> 20):
            out.write(bytes(1 << 20))
    return packed.getvalue()


def test_absurd_member_sizes(tmp_path: Path) -> None:
    form = KINDS["cifar10"].forms[1]
    path = tmp_path / form.archive
    path.write_bytes(zeros_archive(f"{form.folder}/data_batch_1", 32 << 20))
    with fails(f"{re.escape(str(path))}:.*/data_batch_1 must be at most 36864 bytes, got 33554432"):
        load_cifar("cifar10", tmp_path)
    path.write_bytes(zeros_archive("other", 32 << 20))
    with fails(f"{re.escape(str(path))} must be a sound .tar.gz, got it unpacks to far more"):
        load_cifar("cifar10", tmp_path)


@pytest.mark.parametrize("size", [-1, -512, -(10**6), 2**60])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE, b"D"])
def test_untrue_member_size(tmp_path: Path, size: int, kind: bytes) -> None:
    form = KINDS["cifar10"].forms[0]
    info = tarfile.TarInfo("x")
    info.type = kind
    header = bytearray(info.tobuf())
    header[124:136] = size.to_bytes(12, "big", signed=True)
    if size > 0:
        header[124] = 0x80
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    path = tmp_path / form.archive
    path.write_bytes(gzip.compress(info.tobuf() + bytes(header) + info.tobuf() + bytes(1024)))
    with fails(f"{re.escape(str(path))}( must be a sound .tar.gz|:.*data_batch_1.bin is missing)"):
        load_cifar("cifar10", tmp_path)


def test_member_twice(tmp_path: Path) -> None:
    form = KINDS["cifar10"].forms[0]
    raw = form_files("cifar10", 0)["test_batch.bin"]
    path = tmp_path / form.archive
    path.write_bytes(tar_bytes([(f"./{form.folder}/test_batch.bin", raw)] * 2))
    with fails("test_batch.bin must be in the archive once, got it twice"):
        load_cifar("cifar10", tmp_path)


def test_broken_archive(tmp_path: Path) -> None:
    path = put_archive(tmp_path, "cifar10", 1)
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[-6] ^= 1  # of the checksum
    plain = gzip.decompress(whole)
    broken = (b"", b"text", whole[:1000], whole[:-1], bytes(changed), plain, gzip.compress(b"no"))
    for raw in broken:
        path.write_bytes(raw)
        with fails(f"^{re.escape(str(path))}( must be a sound .tar.gz, got|:.* is missing)") as got:
            load_cifar("cifar10", tmp_path)
        assert "\n" not in str(got.value)
    path.write_bytes(gzip.compress(plain[:5000]))
    with fails(re.escape(str(path))):
        load_cifar("cifar10", tmp_path)


# Fuzz

SOUND = python2(array(PIXELS), LABELS)


@QUIET
@given(st.sampled_from(NAMES), st.binary(max_size=30), st.integers(0, 9300))
def test_fuzz_binary(name: str, raw: bytes, size: int) -> None:
    survives((raw * 1000)[:size], name, 0)
    size = RECORDS * (3073 if name == "cifar10" else 3074)
    survives((raw * size or bytes(size))[:size], name, 0)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, bytes]:
    """A place for an archive, a sound one whose bytes compress to little, and its tar."""
    form = KINDS["cifar10"].forms[1]
    whole = tar_bytes([(f"{form.folder}/{name}", SOUND) for name in form.files])
    return tmp_path_factory.mktemp("fuzz") / form.archive, whole, gzip.decompress(whole)


def archive_survives(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    kind = KINDS["cifar10"]
    with refused_or(str(path)):
        parts = cifar_files.read_archive(kind, kind.forms[1], path)
        assert len(parts) == len(kind.forms[1].files)
        assert all(images.shape == (RECORDS, 32, 32, 3) for images, _ in parts)


CHANGES = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4)


def change(raw: bytes, changes: list[tuple[float, int]], end: float) -> bytes:
    out = bytearray(raw)
    for place, value in changes:
        out[int(place * len(raw))] = value
    return bytes(out[: round(end * len(raw))])


@QUIET
@given(CHANGES, st.one_of(st.just(1.0), st.floats(0, 1)))
def test_fuzz_gzip(
    packed: tuple[Path, bytes, bytes], changes: list[tuple[float, int]], end: float
) -> None:
    path, whole, _ = packed
    archive_survives(path, change(whole, changes, end))


@QUIET
@given(CHANGES, st.integers(0, 5), st.one_of(st.just(1.0), st.floats(0, 1)))
def test_fuzz_tar(
    packed: tuple[Path, bytes, bytes], changes: list[tuple[float, int]], member: int, end: float
) -> None:
    path, _, plain = packed
    start = [i for i in range(0, len(plain), 512) if plain[i : i + 6] == b"cifar-"][member]
    header = bytearray(change(plain[start : start + 512], changes, 1.0))
    header[148:156] = b" " * 8  # a right checksum, so that the change is looked at
    header[148:156] = b"%06o\0 " % sum(header)
    raw = plain[:start] + bytes(header) + plain[start + 512 :]
    archive_survives(path, gzip.compress(raw[: round(end * len(raw))], 1))
