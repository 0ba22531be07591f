"""Small CIFAR data sets in every published form, for the tests that read them."""

import contextlib
import io
import struct
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from infobatch_fast.data import cifar_files
from infobatch_fast.data.cifar_files import KINDS
from infobatch_fast.data.dataset import Dataset
from infobatch_fast.errors import UserError

REAL = dict(KINDS)
RECORDS = 3  # of each file of the small data sets, instead of 10,000 and 50,000
PIXELS = bytes(RECORDS * 3072)
LABELS = [0, 1, 2]
NAMES = ("cifar10", "cifar100")
SHAPES = [(name, index) for name in NAMES for index in (0, 1)]  # index: 0 binary, 1 pickles
QUIET = settings(
    max_examples=150,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every file hold `RECORDS` records."""
    for name, kind in REAL.items():
        few = replace(kind, train_records=RECORDS, test_records=RECORDS)
        monkeypatch.setitem(KINDS, name, few)


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
    names = KINDS[name].forms[index].files
    return {n: make(name, *c) for n, c in zip(names, contents(name), strict=True)}


def put_folder(root: Path, name: str, index: int) -> Path:
    folder = root / KINDS[name].forms[index].folder
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
    folder = KINDS[name].forms[index].folder
    files = form_files(name, index)
    # Not in the order of use, and with files that nobody reads, as the published ones.
    members = [(f"{folder}/{file}", files[file]) for file in reversed(files)]
    return tar_bytes([(f"{folder}/readme.html", b"<p>"), *members], **more)


def put_archive(root: Path, name: str, index: int) -> Path:
    path = root / KINDS[name].forms[index].archive
    path.write_bytes(archive_bytes(name, index))
    return path


def check(got: Dataset, name: str) -> None:
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


# Errors


def parse(raw: bytes, name: str = "cifar10", index: int = 1) -> cifar_files.Part:
    kind = KINDS[name]
    form = kind.forms[index]
    return cifar_files._parse(kind, form, form.files[0], "FILE", raw)


def fails(message: str) -> contextlib.AbstractContextManager[pytest.ExceptionInfo[UserError]]:
    return pytest.raises(UserError, match=message)


def survives(raw: bytes, name: str = "cifar10", index: int = 1) -> None:
    with refused_or("FILE"):
        images, labels = parse(raw, name, index)
        assert images.shape == (RECORDS, 32, 32, 3)
        assert images.dtype == np.uint8
        assert labels.shape == (RECORDS,)
        assert ((labels >= 0) & (labels < KINDS[name].num_classes)).all()


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
