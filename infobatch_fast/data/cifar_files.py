"""The published files of CIFAR-10 and CIFAR-100, out of a folder or an archive, as arrays.

Nothing in a file is trusted: every rule it breaks is a `UserError` that names the file.
Dimensions: R records of one file.
"""

import gzip
import io
import os
import stat
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from infobatch_fast.data.cifar_pickle import parse_pickle
from infobatch_fast.data.dataset import PIXELS
from infobatch_fast.errors import UserError, reason

Part = tuple[np.ndarray, np.ndarray]  # of one file: images (R, 32, 32, 3) uint8, labels (R,) int64


@dataclass(frozen=True)
class Form:
    """One published form of a data set; its files hold the training set in order, then the test."""

    folder: str
    archive: str
    files: tuple[str, ...]
    pickled: bool


@dataclass(frozen=True)
class Kind:
    """What is fixed about one of the two data sets."""

    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    forms: tuple[Form, ...]  # in the order in which they are looked for
    label_bytes: int  # of a binary record; the last of them is the label used
    label_key: str  # of a pickle
    train_records: int  # of each training file
    test_records: int = 10_000

    def records(self, form: Form, name: str) -> int:
        """R of the file `name`."""
        return self.test_records if name == form.files[-1] else self.train_records


_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_BATCHES_BIN = tuple(f"{name}.bin" for name in _BATCHES)
KINDS = {
    "cifar10": Kind(
        num_classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        forms=(
            Form("cifar-10-batches-bin", "cifar-10-binary.tar.gz", _BATCHES_BIN, pickled=False),
            Form("cifar-10-batches-py", "cifar-10-python.tar.gz", _BATCHES, pickled=True),
        ),
        label_bytes=1,
        label_key="labels",
        train_records=10_000,
    ),
    "cifar100": Kind(
        num_classes=100,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        forms=(
            Form(
                "cifar-100-binary",
                "cifar-100-binary.tar.gz",
                ("train.bin", "test.bin"),
                pickled=False,
            ),
            Form("cifar-100-python", "cifar-100-python.tar.gz", ("train", "test"), pickled=True),
        ),
        label_bytes=2,  # coarse, fine
        label_key="fine_labels",
        train_records=50_000,
    ),
}


def read_folder(kind: Kind, form: Form, folder: Path) -> list[Part]:
    """The files of a folder, in the order of `form.files`.

    Raises:
        UserError: a file is missing, unreadable or not as published.
    """
    parts = []
    for name in form.files:
        path = folder / name
        with _open(path) as file:
            try:
                size = os.fstat(file.fileno()).st_size
                _check_size(kind, form, name, str(path), size)
                raw = file.read(size)
            except OSError as error:
                raise UserError(f"{path} must be readable, got {reason(error)}") from error
        parts.append(_parse(kind, form, name, str(path), raw))
    return parts


def read_archive(kind: Kind, form: Form, path: Path) -> list[Part]:
    """The files of a .tar.gz, in the order of `form.files`; nothing is written to the disk.

    Raises:
        UserError: the archive is unreadable or broken, or a file is missing or not as published.
    """
    wanted = {f"{form.folder}/{name}": name for name in form.files}
    limit = 1_000_000 + 2 * PIXELS * sum(kind.records(form, name) for name in form.files)
    parts: dict[str, Part] = {}
    with _open(path) as file:
        try:
            stream = _Bounded(gzip.GzipFile(fileobj=file), limit)
            with tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20) as tar:
                for member in tar:
                    name = wanted.get(member.name.removeprefix("./"))
                    if name is None or not member.isreg() or member.issparse():
                        continue
                    where = f"{path}:{member.name}"
                    if name in parts:
                        raise UserError(f"{where} must be in the archive once, got it twice")
                    _check_size(kind, form, name, where, member.size)
                    content = tar.extractfile(member)
                    assert content is not None  # as of every regular file
                    parts[name] = _parse(kind, form, name, where, content.read())
            while stream.read(1 << 20):  # to the end, where gzip compares its checksum
                pass
        except UserError:
            raise
        except Exception as error:  # tarfile, gzip and zlib raise a dozen types on broken bytes
            raise UserError(f"{path} must be a sound .tar.gz, got {reason(error)}") from error
    for name in form.files:
        if name not in parts:
            raise UserError(f"{path}:{form.folder}/{name} is missing: the data set must be whole")
    return [parts[name] for name in form.files]


def _open(path: Path) -> io.BufferedReader:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise UserError(f"{path} must be a regular file, got something else")
        return open(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the data set must be whole") from None
    except OSError as error:
        raise UserError(f"{path} must be readable, got {reason(error)}") from error


class _Bounded(io.RawIOBase):
    """Reads a stream up to a limit in bytes, and says when it is read on after its end.

    A small archive can unpack to a disk full of zeros, and tarfile goes on reading blocks of
    nothing until it has skipped as much as a header claims: 2^60 bytes take years.
    """

    def __init__(self, stream: gzip.GzipFile, limit: int):
        self._stream, self._limit, self._ends = stream, limit, 0

    def read(self, size: int = -1, /) -> bytes:
        block = self._stream.read(size)
        self._limit -= len(block)
        if self._limit < 0:
            raise ValueError("it unpacks to far more than the data set")
        self._ends += not block
        if self._ends > 4:
            raise EOFError("it ends inside a member")
        return block


def _check_size(kind: Kind, form: Form, name: str, where: str, size: int) -> None:
    """Raise `UserError` before a file of the wrong size is read."""
    records = kind.records(form, name)
    record = kind.label_bytes + PIXELS
    if form.pickled and size > 4 * PIXELS * records:
        raise UserError(f"{where} must be at most {4 * PIXELS * records} bytes, got {size}")
    if not form.pickled and size != record * records:
        raise UserError(
            f"{where} must hold {records} records of {record} bytes = {record * records} bytes, "
            f"got {size}"
        )


def _parse(kind: Kind, form: Form, name: str, where: str, raw: bytes) -> Part:
    """One file's bytes as images and labels.

    Raises:
        UserError: the bytes break a rule of the published form.
    """
    _check_size(kind, form, name, where, len(raw))  # again: files change while they are read
    records = kind.records(form, name)
    if form.pickled:
        try:
            planes, labels = parse_pickle(raw, records, kind.label_key)
        except Exception as error:  # a malformed pickle can raise nearly every type there is
            raise UserError(f"{where} must be a CIFAR pickle: {reason(error)}") from error
    else:
        table = np.frombuffer(raw, np.uint8).reshape(records, -1)
        planes, labels = table[:, kind.label_bytes :], table[:, kind.label_bytes - 1].tolist()
    for record, label in enumerate(labels):
        if not 0 <= label < kind.num_classes:
            raise UserError(
                f"{where}: the label of record {record} must be in [0, {kind.num_classes}), "
                f"got {str(label)[:60]}"
            )
    images = planes.reshape(records, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(labels, np.int64)
