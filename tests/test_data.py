import contextlib
import gzip
import hashlib
import http.server
import io
import os
import pickle
import re
import socket
import struct
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infobatch_fast import data
from infobatch_fast.data import DataMissing, load_cifar, make_synthetic
from infobatch_fast.errors import UserError

REAL = dict(data._KINDS)
RECORDS = 3  # of each file of the small data sets, instead of 10,000 and 50,000
NAMES = ("cifar10", "cifar100")
SHAPES = [(name, index) for name in NAMES for index in (0, 1)]  # index: 0 binary, 1 pickles
QUIET = settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in data._KINDS.items():
        few = replace(kind, train_records=RECORDS, test_records=RECORDS)
        monkeypatch.setitem(data._KINDS, name, few)


def small_kind(name: str = "cifar10") -> data._Kind:
    return replace(data._KINDS[name], train_records=RECORDS, test_records=RECORDS)


def contents(name: str) -> list[tuple[np.ndarray, list[int]]]:
    """For each file its planes (R, 3, 32, 32) and labels."""
    rng = np.random.default_rng(7)
    files, classes = (6, 10) if name == "cifar10" else (2, 100)
    return [
        (
            rng.integers(0, 256, (RECORDS, 3, 32, 32), np.uint8),
            rng.integers(0, classes, RECORDS).tolist(),
        )
        for _ in range(files)
    ]


def binary(name: str, planes: np.ndarray, labels: list[int]) -> bytes:
    coarse = b"\x13" if name == "cifar100" else b""
    pairs = zip(planes, labels, strict=True)
    return b"".join(coarse + bytes([label]) + image.tobytes() for image, label in pairs)


def text(value: bytes) -> bytes:
    """A Python 2 string, as its pickles hold it."""
    if len(value) < 256:
        return b"U" + bytes([len(value)]) + value
    return b"T" + struct.pack("<i", len(value)) + value


def array(
    pixels: bytes,
    shape: tuple[int, ...] = (RECORDS, 3072),
    *,
    module: bytes = b"numpy.core.multiarray",
    code: bytes = b"u1",
    empty: bytes = b"K\x00\x85",
    fortran: bytes = b"\x89",
    fields: bytes = b"NNN",
) -> bytes:
    sizes = b"".join(b"J" + struct.pack("<i", size) for size in shape)
    return (
        b"c" + module + b"\n_reconstruct\ncnumpy\nndarray\n" + empty + text(b"b") + b"\x87R"
        b"(K\x01(" + sizes + b"tcnumpy\ndtype\n" + text(code) + b"K\x00K\x01\x87R"
        b"(K\x03" + text(b"|") + fields + b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        + fortran + text(pixels) + b"tb"
    )  # fmt: skip


def python2(array_code: bytes, labels: bytes | list[int], key: bytes = b"labels") -> bytes:
    if isinstance(labels, list):
        labels = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return (
        b"\x80\x02}q\x01(" + text(b"batch_label") + text(b"training batch 1 of 5")
        + text(key) + labels + text(b"data") + array_code + b"u."
    )  # fmt: skip


def pickled(name: str, planes: np.ndarray, labels: list[int]) -> bytes:
    key = b"labels" if name == "cifar10" else b"fine_labels"
    return python2(array(planes.tobytes()), labels, key)


def form_files(name: str, index: int) -> dict[str, bytes]:
    make = (binary, pickled)[index]
    names = data._KINDS[name].forms[index].files
    return {n: make(name, *c) for n, c in zip(names, contents(name), strict=True)}


def put_folder(root: Path, name: str, index: int) -> Path:
    folder = root / data._KINDS[name].forms[index].folder
    folder.mkdir(parents=True)
    for file, raw in form_files(name, index).items():
        (folder / file).write_bytes(raw)
    return folder


def tar_bytes(members: list[tuple[str, bytes]], extra: tuple[tarfile.TarInfo, ...] = ()) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as tar:
        for info in extra:
            tar.addfile(info)
        for name, raw in members:
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return buffer.getvalue()


def archive_bytes(name: str, index: int, **more: tuple[tarfile.TarInfo, ...]) -> bytes:
    folder = data._KINDS[name].forms[index].folder
    files = form_files(name, index)
    # Not in the order of use, and with files that nobody reads, as the published ones.
    members = [(f"{folder}/{file}", files[file]) for file in reversed(files)]
    return tar_bytes([(f"{folder}/readme.html", b"<p>"), *members], **more)


def put_archive(root: Path, name: str, index: int) -> Path:
    path = root / data._KINDS[name].forms[index].archive
    path.write_bytes(archive_bytes(name, index))
    return path


def check(got: data.Dataset, name: str) -> None:
    """Every pixel and label, and what is fixed about the data set."""
    *train, (test_planes, test_labels) = contents(name)
    images = np.stack([plane for planes, _ in train for plane in planes])
    # Independent of the module's transpose: pixel (y, x) of colour c is byte 1024 c + 32 y + x.
    flat = images.reshape(len(images), 3072)
    for n, y, x, c in [(0, 0, 0, 0), (1, 5, 31, 1), (len(flat) - 1, 31, 2, 2)]:
        assert got.images[n, y, x, c].item() == flat[n, 1024 * c + 32 * y + x]
    assert np.array_equal(got.images.numpy(), np.moveaxis(images, 1, 3))
    assert np.array_equal(got.test_images.numpy(), np.moveaxis(test_planes, 1, 3))
    assert got.labels.tolist() == [label for _, labels in train for label in labels]
    assert got.test_labels.tolist() == test_labels
    for tensor in (got.images, got.test_images):
        assert tensor.dtype == torch.uint8
        assert tensor.is_contiguous()
    assert got.labels.dtype == got.test_labels.dtype == torch.int64
    fixed = {
        "cifar10": (10, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        "cifar100": (100, (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    }
    assert (got.num_classes, got.mean, got.std) == fixed[name]
    assert (got.name, got.source) == (name, "genuine")


# Reading


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
    form = data._KINDS["cifar10"].forms
    (tmp_path / form[1].archive).write_bytes(b"broken")
    put_archive(tmp_path, "cifar10", 0)
    check(load_cifar("cifar10", tmp_path), "cifar10")
    (tmp_path / form[0].archive).write_bytes(b"broken")
    put_folder(tmp_path, "cifar10", 1)
    check(load_cifar("cifar10", tmp_path), "cifar10")
    (tmp_path / form[1].folder / "test_batch").write_bytes(b"broken")
    put_folder(tmp_path, "cifar10", 0)
    check(load_cifar("cifar10", tmp_path), "cifar10")


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("key", ["labels", b"labels"])
def test_python3_pickles(tmp_path: Path, protocol: int, key: str | bytes) -> None:
    folder = put_folder(tmp_path, "cifar10", 1)
    pixels = "data" if isinstance(key, str) else b"data"
    for file, (planes, labels) in zip(
        data._KINDS["cifar10"].forms[1].files, contents("cifar10"), strict=True
    ):
        content = {key: labels, pixels: planes.reshape(RECORDS, 3072), "filenames": ["a.png"] * 3}
        (folder / file).write_bytes(pickle.dumps(content, protocol))
    check(load_cifar("cifar10", tmp_path), "cifar10")


def test_fortran_order_pickle() -> None:
    planes, labels = contents("cifar10")[0]
    pixels = np.asfortranarray(planes.reshape(RECORDS, 3072)).tobytes(order="F")
    raw = python2(array(pixels, module=b"numpy._core.multiarray", fortran=b"\x88"), labels)
    images, _ = parse(raw)
    assert np.array_equal(images, np.moveaxis(planes, 1, 3))


def test_to_copies_every_tensor() -> None:
    small = make_synthetic(4, 2).to("meta")
    tensors = (small.images, small.labels, small.test_images, small.test_labels)
    assert all(tensor.device.type == "meta" for tensor in tensors)
    assert small.name == "synthetic"


def test_published_sizes() -> None:
    sizes = {kind.name: (kind.train_records, kind.test_records) for kind in REAL.values()}
    assert sizes == {"cifar10": (10_000, 10_000), "cifar100": (50_000, 10_000)}


@pytest.mark.skipif(not os.environ.get("INFOBATCH_DATA"), reason="INFOBATCH_DATA is not set")
def test_genuine(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = REAL["cifar10"]
    monkeypatch.setitem(data._KINDS, "cifar10", kind)
    try:
        got = load_cifar("cifar10", data.default_data_dir(), download=False)
    except DataMissing:
        pytest.skip("INFOBATCH_DATA holds no CIFAR-10")
    assert got.labels.bincount().tolist() == [5000] * 10
    assert got.test_labels.bincount().tolist() == [1000] * 10
    mean = got.images.sum((0, 1, 2), dtype=torch.int64) / (50_000 * 1024 * 255)
    torch.testing.assert_close(mean, torch.tensor(kind.mean), rtol=0, atol=1e-4)


# Errors


def parse(raw: bytes, name: str = "cifar10", index: int = 1) -> tuple[np.ndarray, np.ndarray]:
    kind = small_kind(name)
    form = kind.forms[index]
    return data._parse(kind, form, form.files[0], "FILE", raw)


def fails(message: str) -> contextlib.AbstractContextManager[pytest.ExceptionInfo[UserError]]:
    return pytest.raises(UserError, match=message)


def test_unknown_name(tmp_path: Path) -> None:
    with fails(r"dataset must be one of cifar10, cifar100, got cifar11 \(did you mean cifar10\?\)"):
        load_cifar("cifar11", tmp_path)


@pytest.mark.parametrize(("name", "index"), SHAPES)
def test_missing_file(tmp_path: Path, name: str, index: int) -> None:
    put_archive(tmp_path, name, index)  # must not be read instead
    folder = put_folder(tmp_path, name, index)
    file = folder / data._KINDS[name].forms[index].files[-1]
    file.unlink()
    with fails(f"^{re.escape(str(file))} is missing: the data set must be whole$"):
        load_cifar(name, tmp_path)
    file.mkdir()
    with fails(f"^{re.escape(str(file))} must be a regular file, got a folder or a device$"):
        load_cifar(name, tmp_path)
    file.rmdir()
    os.mkfifo(file)
    with fails("must be a regular file"):
        load_cifar(name, tmp_path)


def test_missing_member(tmp_path: Path) -> None:
    form = data._KINDS["cifar10"].forms[0]
    files = form_files("cifar10", 0)
    del files["data_batch_3.bin"]
    path = tmp_path / form.archive
    path.write_bytes(tar_bytes([(f"{form.folder}/{n}", raw) for n, raw in files.items()]))
    with fails(f"{re.escape(str(path))}:{form.folder}/data_batch_3.bin is missing"):
        load_cifar("cifar10", tmp_path)


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
    file = folder / data._KINDS[name].forms[0].files[1]
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
    limit = data._KINDS[name].num_classes
    labels[1] = limit
    file = folder / data._KINDS[name].forms[index].files[-1]
    file.write_bytes((binary, pickled)[index](name, planes, labels))
    rule = rf"the label of record 1 must be in \[0, {limit}\), got {limit}"
    with fails(f"^{re.escape(str(file))}: {rule}$"):
        load_cifar(name, tmp_path)


PIXELS = bytes(RECORDS * 3072)
LABELS = [0, 1, 2]
BAD_PICKLES = {
    "empty": (b"", "must be a CIFAR pickle"),
    "text": (b"hello", "must be a CIFAR pickle"),
    "no stop": (b"\x80\x02}", "exhausted before seeing STOP"),
    "stack": (b"\x80\x02R.", "must be a CIFAR pickle"),
    "not a dict": (b"\x80\x02].", "it must be a dict, got a list"),
    "no data": (b"\x80\x02}.", "the key data is missing"),
    "no labels": (python2(array(PIXELS), LABELS, b"fine_labels"), "the key labels is missing"),
    "few labels": (python2(array(PIXELS), [0, 1]), "labels must be a list of 3, got a list of 2"),
    "a tuple": (python2(array(PIXELS), b"K\x00K\x01K\x02\x87"), r"list of 3, got \(0, 1, 2\)"),
    "a label": (python2(array(PIXELS), b"](K\x00U\x01aK\x01e"), r"labels\[1\] must .* got 'a'"),
    "True": (python2(array(PIXELS), b"](K\x00\x88K\x01e"), r"labels\[1\] must .* got a bool"),
    "negative": (
        python2(array(PIXELS), b"](K\x00K\x01J\xff\xff\xff\xffe"),
        r"label of record 2 must be in \[0, 10\), got -1",
    ),
    "huge label": (
        python2(array(PIXELS), b"](K\x00K\x01\x8a\xff" + b"\x7f" * 255 + b"e"),
        r"record 2 must be in \[0, 10\), got 6287\d{56}$",
    ),
    "a string": (python2(text(PIXELS), LABELS), "data must be a numpy array, got '"),
    "a list": (python2(b"]", LABELS), "data must be a numpy array, got a list"),
    "no state": (python2(array(PIXELS)[:60], LABELS), "must be a CIFAR pickle"),
    "float": (python2(array(PIXELS, code=b"f4"), LABELS), "data must be uint8, got 'f4'"),
    "int8": (python2(array(PIXELS, code=b"i1"), LABELS), "data must be uint8, got 'i1'"),
    "object": (python2(array(PIXELS, code=b"O8"), LABELS), "data must be uint8, got 'O8'"),
    "fields": (
        python2(array(PIXELS, fields=b"NK\x01N"), LABELS),
        "data must be uint8, got a dtype with fields",
    ),
    "shape": (
        python2(array(PIXELS, (3072, RECORDS)), LABELS),
        r"data must have the shape \(3, 3072\), got \(3072, 3\)",
    ),
    "huge shape": (
        python2(array(PIXELS, (2**31 - 1, 2**31 - 1)), LABELS),
        r"data must have the shape \(3, 3072\), got \(2147483647, 2147483647\)",
    ),
    "huge at first": (
        python2(array(PIXELS, empty=b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86"), LABELS),
        "data must be rebuilt from an empty ndarray",
    ),
    "short": (python2(array(PIXELS[:-1]), LABELS), "data must hold 9216 bytes"),
    "memo": (b"\x80\x02}r\xff\xff\xff\x7f.", "it numbers an object 2147483647"),
    "long bytes": (b"\x80\x02\x8e" + b"\xff" * 7 + b"\x7f.", "must be a CIFAR pickle"),
    "long array": (b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.", "must be a CIFAR pickle"),
    "tuples": (b"\x80\x02}K\x00" + b"2\x86" * 60 + b"K\x00s.", "it holds the opcode DUP"),
    "tuples in memo": (
        b"\x80\x02}K\x00" + b"q\x00h\x00\x86" * 60 + b"K\x00s.",
        "it holds more tuples than an array has",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_PICKLES)
def test_bad_pickle(case: str) -> None:
    raw, message = BAD_PICKLES[case]
    with fails(message) as caught:
        parse(raw)
    assert str(caught.value).startswith("FILE")
    assert "\n" not in str(caught.value)


def reduce(module: bytes, name: bytes, args: bytes) -> bytes:
    return b"c" + module + b"\n" + name + b"\n(" + args + b"tR"


MARK = "infobatch-was-here"
COMMAND = text(f"touch {MARK}".encode())
MALICIOUS = {
    "system": (reduce(b"os", b"system", COMMAND), "forbidden global os.system"),
    "posix": (reduce(b"posix", b"system", COMMAND), "forbidden global posix.system"),
    "eval": (
        reduce(b"builtins", b"eval", text(f"open({MARK!r}, 'w')".encode())),
        "forbidden global builtins.eval",
    ),
    "python 2": (reduce(b"__builtin__", b"eval", text(b"1")), "global __builtin__.eval"),
    "getattr": (reduce(b"builtins", b"getattr", text(b"os")), "global builtins.getattr"),
    "frompyfunc": (reduce(b"numpy", b"frompyfunc", b"K\x01K\x01"), "global numpy.frompyfunc"),
    "numpy load": (reduce(b"numpy", b"load", text(b"x")), "forbidden global numpy.load"),
    "dotted": (
        b"\x8c\x05numpy\x8c\x0bndarray.put\x93.",
        "forbidden global numpy.ndarray.put",
    ),
    "odd name": (b"\x8c\x03a\nb\x8c\x02\xc3\xa9\x93.", r"forbidden global a\\nb.\\xe9"),
    "nested": (
        b"cnumpy\ndtype\n(" + reduce(b"os", b"system", COMMAND) + b"tR",
        "forbidden global os.system",
    ),
    "codec": (
        reduce(b"_codecs", b"encode", text(b"x") + text(b"zlib")),
        "_codecs.encode for other than latin1",
    ),
    "inst": (b"(" + COMMAND + b"ios\nsystem\n", "opcode INST"),
    "obj": (b"(cnumpy\nndarray\n" + COMMAND + b"o", "opcode OBJ"),
    "newobj": (b"cnumpy\nndarray\n)\x81", "opcode NEWOBJ"),
    "extension": (b"\x82\x01", "opcode EXT1"),
    "persistent": (b"K\x01Q", "opcode BINPERSID"),
    "state of a global": (b"cnumpy\ndtype\n}" + text(b"a") + b"K\x00sb", "state of dtype"),
    "slots of a global": (b"cnumpy\ndtype\nN}" + text(b"a") + b"K\x00s\x86b", "of dtype"),
    "call of an array": (array(PIXELS) + b")R", "not callable"),
}  # fmt: skip


@pytest.mark.parametrize("case", MALICIOUS)
def test_malicious_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    folder = put_folder(tmp_path / "d", "cifar10", 1)
    code, message = MALICIOUS[case]
    # An otherwise sound file: what is hidden in a key that nobody reads counts as well.
    raw = python2(array(PIXELS), LABELS)[:-2] + text(b"more") + code + b"u."
    (folder / "data_batch_4").write_bytes(raw)
    with fails(f"{re.escape(str(folder))}/data_batch_4 must be a CIFAR pickle: .*{message}"):
        load_cifar("cifar10", tmp_path / "d")
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


class Bomb:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {MARK}",)


def test_object_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = np.empty((RECORDS, 3072), object)
    with fails("data must be uint8, got 'O8'"):
        parse(pickle.dumps({"data": plain[:, :1], "labels": LABELS}, 2))
    plain[1, 1] = Bomb()
    with fails("must be (at most|a CIFAR pickle: it names the forbidden global posix.system)"):
        parse(pickle.dumps({"data": plain, "labels": LABELS}, 2))
    assert not list(tmp_path.iterdir())


# Archives


def test_archive_with_other_members(tmp_path: Path) -> None:
    form = data._KINDS["cifar10"].forms[1]
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
    form = data._KINDS["cifar10"].forms[1]
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
    form = data._KINDS["cifar10"].forms[0]
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
    form = data._KINDS["cifar10"].forms[0]
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


# Fuzz: anything but sound data is a UserError, whatever the bytes


def survives(raw: bytes, name: str = "cifar10", index: int = 1) -> None:
    with refused_or("FILE"):
        images, labels = parse(raw, name, index)
        assert images.shape == (RECORDS, 32, 32, 3)
        assert images.dtype == np.uint8
        assert labels.shape == (RECORDS,)
        assert ((labels >= 0) & (labels < small_kind(name).num_classes)).all()


@contextlib.contextmanager
def refused_or(where: str) -> Iterator[None]:
    """Let a `UserError` pass that names `where` in one line, and nothing else."""
    message = where
    try:
        yield
    except UserError as error:
        message = str(error)
    assert message.startswith(where)
    assert "\n" not in message


SOUND = python2(array(PIXELS), LABELS)
SOUND3 = pickle.dumps({"data": np.zeros((RECORDS, 3072), np.uint8), "labels": LABELS}, 4)


@st.composite
def damaged(draw: st.DrawFn, sound: bytes) -> bytes:
    """Some bytes changed, mostly outside the long run of zeros that the pixels are; maybe cut."""
    start = sound.index(bytes(2000)) + 100
    ends = st.one_of(st.integers(0, start), st.integers(start + 8000, len(sound) - 1))
    raw = bytearray(sound)
    for _ in range(draw(st.integers(0, 4))):
        raw[min(draw(ends), len(sound) - 1)] = draw(st.integers(0, 255))
    return bytes(raw[: draw(st.one_of(st.just(len(raw)), st.integers(0, len(raw))))])


CODES = st.sampled_from([bytes([code]) for code in range(256)])
PIECES = st.one_of(
    CODES,
    st.binary(max_size=9),
    st.sampled_from(list(b"Rbtsuea})(]\x85\x86\x87")).map(lambda code: bytes([code])),
    st.sampled_from([b"cnumpy\nndarray\n", b"cnumpy\ndtype\n", b"c_codecs\nencode\n", b"U\x02u1"]),
    st.sampled_from([b"cnumpy.core.multiarray\n_reconstruct\n", b"U\x04data", b"U\x06latin1"]),
    st.sampled_from([b"K\x00", b"K\x01", b"q\x00", b"h\x00", b"h\x01"]),
)


@QUIET
@given(st.binary(max_size=200))
def test_fuzz_random_pickle(raw: bytes) -> None:
    survives(raw)
    survives(b"\x80\x02" + raw + b".")


@QUIET
@given(st.lists(PIECES, max_size=40))
def test_fuzz_opcodes(pieces: list[bytes]) -> None:
    survives(b"\x80\x02" + b"".join(pieces) + b".")
    survives(SOUND[:-2] + b"".join(pieces) + b"u.")


@settings(QUIET, max_examples=400)
@given(st.one_of(damaged(SOUND), damaged(SOUND3)))
def test_fuzz_damaged_pickle(raw: bytes) -> None:
    survives(raw)


@QUIET
@given(st.sampled_from(NAMES), st.binary(max_size=30), st.integers(0, 9300))
def test_fuzz_binary(name: str, raw: bytes, size: int) -> None:
    survives((raw * 1000)[:size], name, 0)
    size = RECORDS * (3073 if name == "cifar10" else 3074)
    survives((raw * size or bytes(size))[:size], name, 0)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, bytes]:
    """A place for an archive, a sound one whose bytes compress to little, and its tar."""
    form = data._KINDS["cifar10"].forms[1]
    whole = tar_bytes([(f"{form.folder}/{name}", SOUND) for name in form.files])
    return tmp_path_factory.mktemp("fuzz") / form.archive, whole, gzip.decompress(whole)


def archive_survives(path: Path, raw: bytes) -> None:
    path.write_bytes(raw)
    kind = small_kind()
    with refused_or(str(path)):
        parts = data._read_archive(kind, kind.forms[1], path)
        assert set(parts) == set(kind.forms[1].files)
        assert all(images.shape == (RECORDS, 32, 32, 3) for images, _ in parts.values())


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


# Download


class Server:
    """A local server of one file, which can hang before or in the middle of it."""

    def __init__(self, raw: bytes):
        self.raw, self.send, self.hang = raw, len(raw), False
        self.release = threading.Event()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.send_response(200)
                self.send_header("Content-Length", str(len(outer.raw)))
                self.end_headers()

            def do_GET(self) -> None:
                self.do_HEAD()
                if outer.hang:
                    outer.release.wait(10)
                self.wfile.write(outer.raw[: outer.send])
                self.wfile.flush()
                if outer.send < len(outer.raw):
                    outer.release.wait(10)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/cifar.tar.gz"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.release.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    from torchvision.datasets import CIFAR10

    server = Server(archive_bytes("cifar10", 1))
    monkeypatch.setattr(CIFAR10, "url", server.url)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(server.raw).hexdigest())
    yield server
    server.close()


def fails_clean(root: Path, message: str, folder: str = "a/b") -> None:
    """The load fails for the reason given and leaves the folder and the timeout as they were."""
    before = sorted(root.rglob("*"))
    timeout = socket.getdefaulttimeout()
    with pytest.raises(DataMissing, match=message) as caught:
        load_cifar("cifar10", root / folder)
    assert sorted(root.rglob("*")) == before
    assert socket.getdefaulttimeout() == timeout
    assert "\n" not in str(caught.value)


def test_download(tmp_path: Path, server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "folder"
    check(load_cifar("cifar10", folder), "cifar10")
    assert [path.name for path in folder.iterdir()] == ["cifar-10-python.tar.gz"]
    assert (folder / "cifar-10-python.tar.gz").read_bytes() == server.raw
    assert capfd.readouterr() == ("", "")
    server.close()
    check(load_cifar("cifar10", folder), "cifar10")  # from the disk


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


def test_download_checksum(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.raw = server.raw[:-1] + b"x"
    fails_clean(tmp_path, r"the download failed \(File not found or corrupted")
    from torchvision.datasets import utils

    def write(url: str, root: str, filename: str, md5: str) -> None:
        Path(root, filename).write_bytes(b"<html>")

    monkeypatch.setattr(utils, "download_url", write)  # one that compares nothing
    fails_clean(tmp_path, r"the MD5 of .*cifar.tar.gz must be [0-9a-f]{32}, got another")


def test_download_never_starts(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.datasets import utils

    monkeypatch.setattr(data, "START_LIMIT_S", 0.3)
    release, late = threading.Event(), []

    def resolve(url: str, root: str, filename: str, md5: str) -> None:
        release.wait(10)  # a name server that does not answer; no socket timeout ends this
        try:
            Path(root, filename).write_bytes(b"late")
        except OSError as error:
            late.append(type(error))

    start = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(utils, "download_url", resolve)
        fails_clean(tmp_path, r"no byte of http://.* came within 0.3 s")
        fails_clean(tmp_path, "no byte of", ".")
    assert time.monotonic() - start < 5
    release.set()
    for _ in range(500):
        if len(late) == 2:
            break
        time.sleep(0.01)
    assert late == [FileNotFoundError] * 2
    assert not list(tmp_path.iterdir())
    server.hang = True
    fails_clean(tmp_path, "(no byte of http://.* came within 0.3 s|timed out)")


def test_download_stalls(tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "START_LIMIT_S", 0.5)
    server.send = 40_000
    assert server.send < len(server.raw)
    fails_clean(tmp_path, r"the download failed \(timed out\)")
    fails_clean(tmp_path, "timed out", ".")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("a\nb")])
def test_download_breaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    from torchvision.datasets import utils

    def half(url: str, root: str, filename: str, md5: str) -> None:
        Path(root, filename).write_bytes(b"half")
        raise error

    monkeypatch.setattr(utils, "download_url", half)
    (tmp_path / "kept").mkdir()
    fails_clean(tmp_path, r"the download failed \((.*No space left on device|a b)\)", "kept")
    fails_clean(tmp_path, r"the download failed", "kept/new")


def test_download_into_a_closed_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    fails_clean(tmp_path, r"the download failed \(.*Not a directory", "file/below")


def test_broken_form_is_not_downloaded(tmp_path: Path, server: Server) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    with fails("cifar-10-batches-py/data_batch_1 is missing"):
        load_cifar("cifar10", tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_default_data_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INFOBATCH_DATA", "/some/where")
    assert data.default_data_dir() == Path("/some/where")
    monkeypatch.setenv("INFOBATCH_DATA", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert data.default_data_dir() == Path("/cache/infobatch_fast")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.default_data_dir() == tmp_path / ".cache" / "infobatch_fast"
    monkeypatch.delenv("INFOBATCH_DATA")

    def homeless() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", homeless)
    with fails("INFOBATCH_DATA must be set where the user has no home folder"):
        data.default_data_dir()


# Synthetic


def same(a: data.Dataset, b: data.Dataset, *names: str) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in names)


ALL = ("images", "labels", "test_images", "test_labels")


def test_synthetic_is_a_function_of_its_seed() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = make_synthetic(5000, 300, seed=3)  # more than one chunk
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same(first, make_synthetic(5000, 300, seed=3), *ALL)
    other = make_synthetic(5000, 300, seed=4)
    assert not any(same(first, other, name) for name in ALL)
    fewer = make_synthetic(7, 300, seed=3)
    assert same(first, fewer, "test_images", "test_labels")
    assert not torch.equal(first.images[:300], first.test_images)


def test_synthetic_form() -> None:
    got = make_synthetic(5003, 61, 4, seed=-1)
    assert got.images.shape == (5003, 32, 32, 3)
    assert got.test_images.shape == (61, 32, 32, 3)
    assert got.images.dtype == torch.uint8
    assert got.images.is_contiguous()
    assert sorted(got.labels.bincount().tolist()) == [1250, 1251, 1251, 1251]
    assert sorted(got.test_labels.bincount().tolist()) == [15, 15, 15, 16]
    assert got.labels.dtype == torch.int64
    assert (got.name, got.source, got.num_classes) == ("synthetic", "synthetic", 4)
    assert (got.mean, got.std) == ((0.5,) * 3, (0.25,) * 3)
    # The order is random: the number of equal neighbours is that of independent labels.
    equal = (got.labels[1:] == got.labels[:-1]).float().mean().item()
    assert abs(equal - 0.25) < 4 * (0.25 * 0.75 / 5002) ** 0.5
    pixels = got.images.float() / 255
    assert abs(pixels.mean().item() - 0.5) < 0.05
    assert 0.15 < pixels.std().item() < 0.35
    assert ((got.images == 0) | (got.images == 255)).float().mean().item() < 0.1


@pytest.mark.parametrize("counts", [(1, 1, 2), (1, 1, 1000), (4096, 1, 2), (4097, 3, 3)])
def test_synthetic_sizes(counts: tuple[int, int, int]) -> None:
    got = make_synthetic(*counts)
    assert len(got.images) == len(got.labels) == counts[0]
    assert len(got.test_images) == len(got.test_labels) == counts[1]
    assert 0 <= int(got.labels.min()) <= int(got.labels.max()) < counts[2]
    assert got.images[-1].float().std() > 5  # the last one is an image as well


@pytest.mark.parametrize(
    ("easy", "hard"), [(0.5, 0.1), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.3, 0.7), (0.9, 0.1)]
)
def test_synthetic_shares(easy: float, hard: float) -> None:
    n = 4000
    images = make_synthetic(n, 1, easy=easy, hard=hard).images.float()
    # Second differences leave little of the smooth patterns: the noise tells the level.
    rough = (images[:, 2:] - 2 * images[:, 1:-1] + images[:, :-2]).std((1, 2, 3)) / 6**0.5 / 64
    low, middle, high = data._NOISE
    got_easy = (rough < (low + middle) / 2).float().mean().item()
    got_hard = (rough > (middle + high) / 2).float().mean().item()
    for got, share in ((got_easy, easy), (got_hard, hard)):
        assert abs(got - share) <= 4 * (share * (1 - share) / n) ** 0.5 + 0.005


def test_synthetic_can_be_learned() -> None:
    """Nearest neighbour: easy samples mostly right, hard ones mostly wrong, neither at chance."""

    def accuracy(easy: float, hard: float) -> float:
        got = make_synthetic(8000, 400, easy=easy, hard=hard)
        train, test = (
            torch.nn.functional.avg_pool2d(i.permute(0, 3, 1, 2).float(), 4).flatten(1)
            for i in (got.images, got.test_images)
        )
        nearest = got.labels[torch.cdist(test, train).argmin(1)]
        return (nearest == got.test_labels).float().mean().item()

    clear, usual, unclear = accuracy(1, 0), accuracy(0.5, 0.1), accuracy(0, 1)
    assert clear > usual > unclear > 0.1
    assert clear > 0.7
    assert unclear < 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"easy": 1.5}, r"synthetic_easy must be in \[0, 1\], got 1.5"),
        ({"easy": float("nan")}, r"synthetic_easy must be in \[0, 1\], got nan"),
        ({"hard": -0.1}, r"synthetic_hard must be in \[0, 1\], got -0.1"),
        (
            {"easy": 0.7, "hard": 0.4},
            r"synthetic_easy \+ synthetic_hard must be at most 1, got 0.7 \+ 0.4",
        ),
        ({"num_samples": 0}, "synthetic_samples must be an integer >= 1, got 0"),
        ({"num_samples": 1.5}, "synthetic_samples must be an integer >= 1, got 1.5"),
        ({"num_test": 0}, "synthetic_test must be an integer >= 1, got 0"),
        ({"num_classes": 1}, "synthetic_classes must be an integer >= 2, got 1"),
        ({"num_samples": 10**15}, "synthetic_samples must fit into the memory of cpu, got 1000"),
    ],
)
def test_synthetic_errors(arguments: dict[str, float], message: str) -> None:
    with fails(f"^{message}"):
        make_synthetic(**arguments)  # type: ignore[arg-type]
