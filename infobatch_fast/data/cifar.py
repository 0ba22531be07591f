"""CIFAR-10 and CIFAR-100 from the files that were published; the download, for an empty folder."""

import contextlib
import hashlib
import io
import os
import socket
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from infobatch_fast.data.dataset import PIXELS, Dataset
from infobatch_fast.errors import UserError, reason, unknown_name

TIMEOUT = 15.0  # s without a byte after which a download is given up


class DataMissing(UserError):
    """No data in the folder, and no download could put it there."""


class Form(NamedTuple):
    """One of the two published forms: a folder, and the archive that holds it."""

    folder: str
    archive: str
    files: tuple[str, ...]  # the training set in order, then the test set


@dataclass(frozen=True)
class Kind:
    """What is fixed about a data set."""

    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    binary: Form
    pickled: Form
    records: tuple[int, ...]  # of each file
    label_bytes: int  # of a binary record; the last of them is the label used
    names: str  # the file of the binary form with the classes' names, a line each
    digest: str | None = None  # of the published records; None where no copy was at hand


_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_BATCHES_BIN = tuple(f"{name}.bin" for name in _BATCHES)
KINDS = {
    "cifar10": Kind(
        num_classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        binary=Form("cifar-10-batches-bin", "cifar-10-binary.tar.gz", _BATCHES_BIN),
        pickled=Form("cifar-10-batches-py", "cifar-10-python.tar.gz", _BATCHES),
        records=(10_000,) * 6,
        label_bytes=1,
        names="batches.meta.txt",
        digest="abf4b167a135b062ef28f7f742091acaf0d93435cacacaa70137c477b4a499cb",
    ),
    "cifar100": Kind(
        num_classes=100,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        binary=Form("cifar-100-binary", "cifar-100-binary.tar.gz", ("train.bin", "test.bin")),
        pickled=Form("cifar-100-python", "cifar-100-python.tar.gz", ("train", "test")),
        records=(50_000, 10_000),
        label_bytes=2,  # coarse, fine
        names="fine_label_names.txt",
    ),
}


def default_data_dir() -> Path:
    """`INFOBATCH_DATA` where set, else `infobatch_fast` in the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get("INFOBATCH_DATA") or f"{cache}/infobatch_fast").expanduser()


def load_cifar(name: str, data_dir: Path | str, *, download: bool = True) -> Dataset:
    """Read CIFAR-10 or CIFAR-100 (its fine labels) into CPU tensors.

    The first is read of: the binary folder, the Python folder, the binary archive, the Python
    archive, `data_dir` being itself one of the folders. A form that is there but broken is an
    error: no other form and no download stands in for it.

    `download` fetches the Python form into `data_dir` where none is there.

    Raises:
        UserError: an unknown name, or a file that is missing, unreadable or not as published.
        DataMissing: no form is there and it was not, or could not be, downloaded.
    """
    if name not in KINDS:
        raise UserError(unknown_name("dataset", name, KINDS))
    kind, folder = KINDS[name], Path(data_dir).expanduser().absolute()
    failure = "downloading is off"
    found = _find(kind, folder)
    if found is None and download:
        try:
            _download(name, kind.pickled, folder)
        except Exception as error:  # no network, no space, another MD5: of any type
            failure = f"the download failed ({reason(error)})"
        found = _find(kind, folder)
    if found is None:
        forms = kind.binary, kind.pickled
        names = ", ".join([*(form.folder for form in forms), *(form.archive for form in forms)])
        raise DataMissing(
            f"data_dir {folder} must hold one of {names}, got none and {failure}: put one there, "
            "set INFOBATCH_DATA or --data-dir to the folder that has it, or use --dataset synthetic"
        )
    form, path = found
    with _unpacked(form, path) as place:
        read = _read_binary(kind, place) if form is kind.binary else _read_pickled(name, place)
    train, test, classes, published = read
    tensors: list[Tensor] = []
    for images, labels in (train, test):
        tensors.append(torch.from_numpy(np.ascontiguousarray(images)))
        tensors.append(torch.tensor(labels, dtype=torch.int64))
    return Dataset(
        name,
        *tensors,
        num_classes=kind.num_classes,
        mean=kind.mean,
        std=kind.std,
        source="published" if published else "files",
        classes=classes,
    )


def _find(kind: Kind, folder: Path) -> tuple[Form, Path] | None:
    """The form to read, and its folder or archive."""
    forms = kind.binary, kind.pickled
    for holder in ("folder", "archive"):
        for form in forms:
            path = folder / getattr(form, holder)
            if os.path.lexists(path):  # a dangling link is broken data, not missing data
                return form, path
    for form in forms:
        if folder.name == form.folder or all((folder / name).is_file() for name in form.files):
            return (form, folder) if folder.exists() else None
    return None


@contextlib.contextmanager
def _unpacked(form: Form, path: Path, under: str | None = None) -> Iterator[Path]:
    """The folder itself, or an archive's in a temporary place, in the folder `under`."""
    if path.name != form.archive:
        yield path
        return
    with tempfile.TemporaryDirectory(dir=under) as scratch:
        try:
            with tarfile.open(path) as tar:
                tar.extractall(scratch, filter="data")
            yield Path(scratch) / form.folder
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
            raise UserError(f"{path} must be a sound .tar.gz, got {reason(error)}") from error


Read = tuple[Any, Any, tuple[str, ...] | None, bool]
"""Images (N, 32, 32, 3) uint8 with labels, of both splits; classes; and if all is as published."""


def _read_binary(kind: Kind, folder: Path) -> Read:
    tables = []
    for name, records in zip(kind.binary.files, kind.records, strict=True):
        path, record = folder / name, kind.label_bytes + PIXELS
        try:
            table = np.fromfile(path, np.uint8)
        except OSError as error:
            raise UserError(f"{path} must be readable, got {reason(error)}") from error
        if table.size != records * record:
            rule = f"must hold {records} records of {record} bytes"
            raise UserError(f"{path} {rule} = {records * record} bytes, got {table.size}")
        tables.append(table.reshape(records, record))
        highest = tables[-1][:, kind.label_bytes - 1].max()
        if highest >= kind.num_classes:
            raise UserError(f"{path}: labels must be in [0, {kind.num_classes}), got {highest}")
    splits = np.concatenate(tables[:-1]), tables[-1]
    images = [split[:, kind.label_bytes :].reshape(-1, 3, 32, 32) for split in splits]
    labels = [split[:, kind.label_bytes - 1] for split in splits]
    train, test = zip([of.transpose(0, 2, 3, 1) for of in images], labels, strict=True)
    names = folder / kind.names
    classes = tuple(names.read_text().split()) if names.is_file() else None
    return train, test, classes, _digest(*splits) == kind.digest


def _digest(*splits: np.ndarray) -> str:
    """Of the records of each split in whatever order, as copies repacked in another one exist."""
    whole = hashlib.sha256()
    for records in splits:
        whole.update(b"".join(sorted(hashlib.sha256(record).digest() for record in records)))
    return whole.hexdigest()


def _torchvision(name: str) -> Any:
    # Here, since torchvision takes seconds to import, and the binary form has no need of it.
    from torchvision import datasets

    return {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]


def _read_pickled(name: str, folder: Path) -> Read:
    """By torchvision. A pickle could run anything when it is read.

    So only files are read whose MD5 is the published one, which torchvision, too, looks at first.
    """
    from torchvision.datasets.utils import check_integrity

    published = _torchvision(name)
    meta = published.meta["filename"], published.meta["md5"]
    for file, md5 in (*published.train_list, *published.test_list, meta):
        if not check_integrity(folder / file, md5):
            raise UserError(f"{folder / file} must be there with the published MD5, {md5}")
    here = type(name, (published,), {"base_folder": ""})  # whatever the folder is called
    train, test = (here(folder, train=split) for split in (True, False))
    return (train.data, train.targets), (test.data, test.targets), tuple(train.classes), True


def _download(name: str, form: Form, folder: Path) -> None:
    """Put the Python form into `folder`, quietly: whole, or nothing of it."""
    from torchvision.datasets.utils import download_url

    published, silence, made = _torchvision(name), io.StringIO(), not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    try:
        socket.setdefaulttimeout(TIMEOUT)
        with (
            tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch,
            contextlib.redirect_stdout(silence),
            contextlib.redirect_stderr(silence),
        ):
            download_url(published.url, scratch, form.archive, published.tgz_md5)
            with _unpacked(form, Path(scratch) / form.archive, scratch) as place:
                place.rename(folder / form.folder)
    finally:
        socket.setdefaulttimeout(timeout)
        if made:
            with contextlib.suppress(OSError):  # it holds the data, as it should
                folder.rmdir()
