"""CIFAR-10/100 on disk to uint8 tensors, the download for an empty folder, and synthetic images.

Dimensions: N training samples, M test samples, C classes, R records of one file, B one chunk.
Nothing in a data file is trusted: every rule it breaks is a `UserError` that names the file.
"""

import contextlib
import gzip
import hashlib
import io
import os
import pickle
import pickletools
import shutil
import socket
import stat
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from infobatch_fast.errors import UserError, unknown_name

START_LIMIT_S = 15.0
"""Seconds without a first byte after which a download is given up; also the socket timeout."""

_PIXELS = 3 * 32 * 32
_CHUNK = 4096  # synthetic samples at a time: 50 MB of float32 pixels, a few times over


class DataMissing(UserError):
    """No data in the folder, and no download could put it there."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images and labels of both splits, whole in the memory of one device."""

    name: str  # cifar10, cifar100 or synthetic
    images: Tensor  # (N, 32, 32, 3) uint8, contiguous
    labels: Tensor  # (N,) int64 in [0, num_classes)
    test_images: Tensor  # (M, 32, 32, 3) uint8, contiguous
    test_labels: Tensor  # (M,) int64
    num_classes: int
    mean: tuple[float, float, float]  # of red, green and blue in [0, 1]
    std: tuple[float, float, float]
    source: str  # "genuine" or "synthetic"

    def to(self, device: torch.device | str) -> "Dataset":
        """The same data with its four tensors on `device`."""
        names = ("images", "labels", "test_images", "test_labels")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


@dataclass(frozen=True)
class _Form:
    """One published form of a data set; its files hold the training set in order, then the test."""

    folder: str
    archive: str
    files: tuple[str, ...]
    pickled: bool


@dataclass(frozen=True)
class _Kind:
    """What is fixed about one of the two data sets."""

    name: str
    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    forms: tuple[_Form, ...]  # in the order in which they are looked for
    label_bytes: int  # of a binary record; the last of them is the label used
    label_key: str  # of a pickle
    train_records: int  # of each training file
    test_records: int = 10_000

    def records(self, form: _Form, name: str) -> int:
        return self.test_records if name == form.files[-1] else self.train_records


_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
_KINDS = {
    "cifar10": _Kind(
        name="cifar10",
        num_classes=10,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
        forms=(
            _Form(
                "cifar-10-batches-bin",
                "cifar-10-binary.tar.gz",
                tuple(f"{name}.bin" for name in _BATCHES),
                pickled=False,
            ),
            _Form("cifar-10-batches-py", "cifar-10-python.tar.gz", _BATCHES, pickled=True),
        ),
        label_bytes=1,
        label_key="labels",
        train_records=10_000,
    ),
    "cifar100": _Kind(
        name="cifar100",
        num_classes=100,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        forms=(
            _Form(
                "cifar-100-binary",
                "cifar-100-binary.tar.gz",
                ("train.bin", "test.bin"),
                pickled=False,
            ),
            _Form("cifar-100-python", "cifar-100-python.tar.gz", ("train", "test"), pickled=True),
        ),
        label_bytes=2,  # coarse, fine
        label_key="fine_labels",
        train_records=50_000,
    ),
}


def default_data_dir() -> Path:
    """`INFOBATCH_DATA` where set, else `infobatch_fast` in the user's cache folder.

    Raises:
        UserError: neither is set and the user has no home folder.
    """
    if chosen := os.environ.get("INFOBATCH_DATA"):
        return Path(chosen)
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(cache) if cache else Path.home() / ".cache") / "infobatch_fast"
    except RuntimeError:
        raise UserError("INFOBATCH_DATA must be set where the user has no home folder") from None


def load_cifar(name: str, data_dir: Path | str, *, download: bool = True) -> Dataset:
    """Read CIFAR-10 or CIFAR-100 (its fine labels) into CPU tensors.

    The forms looked for, the first found being read: the binary folder, the Python folder, the
    binary archive, the Python archive, and `data_dir` being itself one of the two folders. A form
    that is there but broken is an error: no other form and no download stands in for it.

    Args:
        name: `cifar10` or `cifar100`.
        data_dir: The folder that holds, or is to hold, one of the forms.
        download: Fetch the Python archive into `data_dir` where no form is there.

    Raises:
        UserError: an unknown name, or a file that is missing, unreadable or not as published.
        DataMissing: no form is there and it was not, or could not be, downloaded.
    """
    if name not in _KINDS:
        raise UserError(unknown_name("dataset", name, _KINDS))
    kind = _KINDS[name]
    folder = Path(os.path.abspath(os.path.expanduser(data_dir)))
    failure = "downloading is off"
    found = _find(kind, folder)
    if found is None and download:
        try:
            _download(kind, folder)
        except Exception as error:
            failure = f"the download failed ({_reason(error)})"
        found = _find(kind, folder)
    if found is None:
        names = ", ".join([f.folder for f in kind.forms] + [f.archive for f in kind.forms])
        raise DataMissing(
            f"data_dir {folder} must hold one of {names}, got none and {failure}: put one there, "
            "set INFOBATCH_DATA or --data-dir to the folder that has it, or use --dataset synthetic"
        )
    form, path = found
    read = _read_archive if path.name == form.archive else _read_folder
    parts = read(kind, form, path)
    train = [parts[name] for name in form.files[:-1]]
    test_images, test_labels = parts[form.files[-1]]
    return Dataset(
        name=name,
        images=torch.from_numpy(np.concatenate([images for images, _ in train])),
        labels=torch.from_numpy(np.concatenate([labels for _, labels in train])),
        test_images=torch.from_numpy(test_images),
        test_labels=torch.from_numpy(test_labels),
        num_classes=kind.num_classes,
        mean=kind.mean,
        std=kind.std,
        source="genuine",
    )


_Part = tuple[np.ndarray, np.ndarray]  # (R, 32, 32, 3) uint8, (R,) int64


def _reason(error: BaseException) -> str:
    """What an exception says, as one line of bounded length."""
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:300]


def _find(kind: _Kind, folder: Path) -> tuple[_Form, Path] | None:
    """The first form in `folder`, and the path of its folder or archive."""
    if _exists(folder) and not folder.is_dir():
        raise UserError(f"data_dir must be a folder, got {folder}")
    for form in kind.forms:
        if _exists(folder / form.folder):
            return form, folder / form.folder
    for form in kind.forms:
        if _exists(folder / form.archive):
            return form, folder / form.archive
    for form in kind.forms:
        whole = all((folder / name).is_file() for name in form.files)
        if whole or (folder.name == form.folder and _exists(folder)):
            return form, folder
    return None


def _exists(path: Path) -> bool:
    # Not Path.exists: a dangling link and a folder closed to us are broken data, not missing data.
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise UserError(f"{path} must be readable, got {_reason(error)}") from error
    return True


def _open(path: Path) -> io.BufferedReader:
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise UserError(f"{path} must be a regular file, got a folder or a device")
        return open(path, "rb")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: the data set must be whole") from None
    except OSError as error:
        raise UserError(f"{path} must be readable, got {_reason(error)}") from error


def _read_folder(kind: _Kind, form: _Form, folder: Path) -> dict[str, _Part]:
    parts = {}
    for name in form.files:
        path = folder / name
        with _open(path) as file:
            try:
                size = os.fstat(file.fileno()).st_size
                _check_size(kind, form, name, str(path), size)
                raw = file.read(size)
            except OSError as error:
                raise UserError(f"{path} must be readable, got {_reason(error)}") from error
        parts[name] = _parse(kind, form, name, str(path), raw)
    return parts


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


def _read_archive(kind: _Kind, form: _Form, path: Path) -> dict[str, _Part]:
    wanted = {f"{form.folder}/{name}": name for name in form.files}
    limit = 1_000_000 + 2 * _PIXELS * sum(kind.records(form, name) for name in form.files)
    parts: dict[str, _Part] = {}
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
                    raw = content.read() if content else b""
                    parts[name] = _parse(kind, form, name, where, raw)
            while stream.read(1 << 20):  # to the end, where gzip compares its checksum
                pass
        except UserError:
            raise
        except Exception as error:  # tarfile, gzip and zlib raise a dozen types on broken bytes
            raise UserError(f"{path} must be a sound .tar.gz, got {_reason(error)}") from error
    for name in form.files:
        if name not in parts:
            raise UserError(f"{path}:{form.folder}/{name} is missing: the data set must be whole")
    return parts


def _check_size(kind: _Kind, form: _Form, name: str, where: str, size: int) -> None:
    """Raise `UserError` before a file of the wrong size is read."""
    records = kind.records(form, name)
    record = kind.label_bytes + _PIXELS
    if form.pickled and size > 4 * _PIXELS * records:
        raise UserError(f"{where} must be at most {4 * _PIXELS * records} bytes, got {size}")
    if not form.pickled and size != record * records:
        raise UserError(
            f"{where} must hold {records} records of {record} bytes = {record * records} bytes, "
            f"got {size}"
        )


def _parse(kind: _Kind, form: _Form, name: str, where: str, raw: bytes) -> _Part:
    """One file's bytes as images (R, 32, 32, 3) and labels (R,).

    Raises:
        UserError: the bytes break a rule of the published form.
    """
    records = kind.records(form, name)
    _check_size(kind, form, name, where, len(raw))
    if form.pickled:
        planes, labels = _parse_pickle(raw, records, kind.label_key, where)
    else:
        table = np.frombuffer(raw, np.uint8).reshape(records, -1)
        planes, labels = table[:, kind.label_bytes :], table[:, kind.label_bytes - 1]
    for record, label in enumerate(labels):
        if not 0 <= label < kind.num_classes:
            raise UserError(
                f"{where}: the label of record {record} must be in [0, {kind.num_classes}), "
                f"got {_show(int(label))}"
            )
    images = planes.reshape(records, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.array(labels, np.int64)


# Opcodes that a pickle of dicts, lists, strings, integers and one array is made of. Left out are
# those that name objects by other ways than find_class, and those that reserve memory unread.
_OPCODES = """
PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINSTRING SHORT_BINSTRING
BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_LIST EMPTY_TUPLE
EMPTY_DICT APPEND APPENDS SETITEM SETITEMS TUPLE TUPLE1 TUPLE2 TUPLE3 BINPUT LONG_BINPUT MEMOIZE
BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD
"""
_GLOBALS = {
    ("numpy.core.multiarray", "_reconstruct"): "array",
    ("numpy._core.multiarray", "_reconstruct"): "array",
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
}


class _Built:
    """What a pickle made by a call: the callable's name, its arguments and the state given later.

    The pickle never touches numpy: its calls are written down, checked, and carried out by us.
    """

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]):
        self.name, self.args, self.state = name, args, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Global:
    """Stands in for an importable name."""

    __slots__ = ("name",)

    def __init__(self, name: str):
        self.name = name

    def __call__(self, *args: Any) -> Any:
        if self.name != "encode":
            return _Built(self.name, args)
        text, codec = args  # how Python 3 writes bytes in protocol 2
        if type(text) is not str or type(codec) is not str or codec != "latin1":
            raise pickle.UnpicklingError("it calls _codecs.encode for other than latin1")
        return text.encode("latin1")

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError(f"it sets the state of {self.name}")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in _GLOBALS:
            name = ascii(f"{module_name}.{global_name}")[1:-1][:100]
            raise pickle.UnpicklingError(f"it names the forbidden global {name}")
        return _Global(_GLOBALS[module_name, global_name])


def _show(value: object) -> str:
    """A bounded description of an untrusted value (a nested one can print as gigabytes)."""
    if type(value) is tuple and len(value) < 5 and all(type(v) is int for v in value):
        return str(value)[:60]
    return repr(value)[:60] if type(value) in (int, str) else f"a {type(value).__name__}"


def _parse_pickle(raw: bytes, records: int, label_key: str, where: str) -> tuple[np.ndarray, Any]:
    """Pixels (R, 3072) uint8 and a list of R integers out of a pickle, without running it."""
    try:
        allowed, tuples = set(_OPCODES.split()), 0
        for opcode, argument, _ in pickletools.genops(raw):
            if opcode.name not in allowed:
                raise ValueError(f"it holds the opcode {opcode.name}")
            # The memo is a list as long as its largest number.
            if "PUT" in opcode.name and isinstance(argument, int) and argument > 1_000_000:
                raise ValueError(f"it numbers an object {argument}")
            tuples += opcode.name.startswith("TUPLE")
            if tuples > 16:  # a published file has 6 to 8; hashing nested ones takes 2^depth steps
                raise ValueError("it holds more tuples than an array has")
        content = _Unpickler(io.BytesIO(raw), encoding="latin1").load()
        if type(content) is not dict:
            raise ValueError(f"it must be a dict, got {_show(content)}")
        values = []
        for key in ("data", label_key):
            if key not in content and key.encode() not in content:
                raise ValueError(f"the key {key} is missing")
            values.append(content[key] if key in content else content[key.encode()])
        data, labels = values
        if type(labels) is not list or len(labels) != records:
            length = f" of {len(labels)}" if type(labels) is list else ""
            raise ValueError(
                f"{label_key} must be a list of {records}, got {_show(labels)}{length}"
            )
        for record, label in enumerate(labels):
            if type(label) is not int:
                raise ValueError(f"{label_key}[{record}] must be an integer, got {_show(label)}")
        return _array(data, (records, _PIXELS)), labels
    except Exception as error:  # a malformed pickle can raise nearly every type there is
        raise UserError(f"{where} must be a CIFAR pickle: {_reason(error)}") from error


def _array(value: object, shape: tuple[int, int]) -> np.ndarray:
    """The uint8 array of `shape` that a pickle described.

    Raises:
        ValueError: it described anything else.
    """
    state = value.state if isinstance(value, _Built) and value.name == "array" else None
    if not isinstance(value, _Built) or type(state) is not tuple or len(state) != 5:
        raise ValueError(f"data must be a numpy array, got {_show(value)}")
    args = value.args
    if len(args) != 3 or getattr(args[0], "name", "") != "ndarray" or args[1] != (0,):
        raise ValueError("data must be rebuilt from an empty ndarray")
    _, got, dtype, fortran, buffer = state
    code = dtype.args[0] if isinstance(dtype, _Built) and dtype.args else None
    if type(code) is bytes:
        code = code.decode("latin1")
    if not isinstance(dtype, _Built) or dtype.name != "dtype" or code not in ("u1", "|u1", "uint8"):
        raise ValueError(f"data must be uint8, got {_show(code)}")
    fields = dtype.state[2:5] if type(dtype.state) is tuple else ()
    if any(field is not None for field in fields):
        raise ValueError("data must be uint8, got a dtype with fields")
    if type(got) is not tuple or got != shape:
        raise ValueError(f"data must have the shape {shape}, got {_show(got)}")
    if type(buffer) is str:
        buffer = buffer.encode("latin1")
    if type(buffer) is not bytes or len(buffer) != shape[0] * shape[1]:
        raise ValueError(f"data must hold {shape[0] * shape[1]} bytes")
    return np.frombuffer(buffer, np.uint8).reshape(shape, order="F" if fortran else "C")


def _download(kind: _Kind, folder: Path) -> None:
    """Put the Python archive into `folder`; on failure leave everything as it was.

    Raises:
        Exception: of any type: no network, no space, a checksum that differs.
    """
    from torchvision.datasets import CIFAR10, CIFAR100, utils

    published = {"cifar10": CIFAR10, "cifar100": CIFAR100}[kind.name]
    name, md5 = published.filename, published.tgz_md5
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    scratch = None
    timeout = socket.getdefaulttimeout()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".download-", dir=folder))
        file = scratch / name
        socket.setdefaulttimeout(START_LIMIT_S)
        with _quiet():
            fetch = partial(utils.download_url, published.url, str(scratch), name, md5)
            _watch(fetch, file, published.url)
        if not utils.check_integrity(str(file), md5):
            raise OSError(f"the MD5 of {published.url} must be {md5}, got another")
        with open(file, "rb") as written:
            os.fsync(written.fileno())
        os.replace(file, folder / name)
    finally:
        socket.setdefaulttimeout(timeout)
        for _ in range(10):  # again where a thread given up was just making its file
            if scratch is not None and scratch.exists():
                shutil.rmtree(scratch, ignore_errors=True)
        for path in made:  # the innermost first; one that holds the archive stays
            with contextlib.suppress(OSError):
                path.rmdir()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars out of logs."""
    with contextlib.ExitStack() as stack:
        if sys.stdout is None or not sys.stdout.isatty():
            stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
        yield


def _watch(fetch: Callable[[], None], file: Path, url: str) -> None:
    """Run `fetch`, which writes `file`; give up where no byte is there after `START_LIMIT_S`.

    A thread, since name resolution knows no timeout. One given up is left behind: its folder is
    gone, so it can no longer open its file.
    """
    outcome: list[BaseException | None] = []

    def work() -> None:
        try:
            fetch()
            outcome.append(None)
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    deadline = time.monotonic() + START_LIMIT_S
    started = False
    while thread.is_alive():
        thread.join(0.05)
        with contextlib.suppress(OSError):
            started = started or file.stat().st_size > 0
        if not started and thread.is_alive() and time.monotonic() > deadline:
            raise TimeoutError(f"no byte of {url} came within {START_LIMIT_S:g} s")
    if outcome[0] is not None:
        raise outcome[0]


def make_synthetic(
    num_samples: int = 50_000,
    num_test: int = 10_000,
    num_classes: int = 10,
    *,
    easy: float = 0.5,
    hard: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Dataset:
    """Images of smooth class patterns, some clear and some not: a task on which pruning can work.

    An image is one of its class's patterns, shifted, at some contrast, plus a smooth random
    pattern and pixel noise. Easy samples carry little of both, hard ones much, and part of
    another class's pattern besides; the rest lie between. Every number comes from `seed` through
    generators of its own. The test set depends on the seed, `num_classes` and the shares, not on
    `num_samples`. A CPU and a GPU give different images.

    Args:
        num_samples: N, at least 1.
        num_test: M, at least 1.
        num_classes: C, at least 2; each class gets N/C samples, rounded up or down.
        easy: The share of easy samples.
        hard: The share of hard samples.
        seed: Any integer.
        device: Where the images are made and stay.

    Raises:
        UserError: an argument out of its range, or more images than `device` has memory for.
    """
    for name, count, least in (
        ("synthetic_samples", num_samples, 1),
        ("synthetic_test", num_test, 1),
        ("synthetic_classes", num_classes, 2),
    ):
        if not isinstance(count, int) or count < least:
            raise UserError(f"{name} must be an integer >= {least}, got {count}")
    for name, share in (("synthetic_easy", easy), ("synthetic_hard", hard)):
        if not 0 <= share <= 1:
            raise UserError(f"{name} must be in [0, 1], got {share}")
    if easy + hard > 1 + 1e-9:  # 1e-9: shares such as 0.9 and 0.1 need not add up in binary
        raise UserError(f"synthetic_easy + synthetic_hard must be at most 1, got {easy} + {hard}")
    generator = _generator(seed, "patterns", device)
    size = (num_classes, _VARIANTS, 3, _WAVES, _WAVES)
    patterns = torch.randn(size, generator=generator, device=device)
    sets = []
    for split, count in (("train", num_samples), ("test", num_test)):
        try:
            sets += _synthesize(patterns, count, easy, hard, _generator(seed, split, device))
        except RuntimeError as error:  # torch's out-of-memory errors on every device
            raise UserError(
                f"synthetic_samples must fit into the memory of {device}, got {count} samples of "
                f"{_PIXELS} bytes ({_reason(error)})"
            ) from error
    return Dataset(
        name="synthetic",
        images=sets[0],
        labels=sets[1],
        test_images=sets[2],
        test_labels=sets[3],
        num_classes=num_classes,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        source="synthetic",
    )


_WAVES = 5  # cosine waves a side
_VARIANTS = 6  # patterns of a class
# Strength of the smooth random pattern (the class pattern has 1) and of the pixel noise in
# standard deviations of the image: easy, between, hard. Chosen by training a small network.
_CLUTTER = (0.5, 1.2, 1.6)
_NOISE = (0.1, 0.3, 0.6)


def _generator(seed: int, use: str, device: torch.device | str) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed} {use}".encode(), digest_size=7).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little"))


def _synthesize(
    patterns: Tensor, count: int, easy: float, hard: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Images (count, 32, 32, 3) uint8 and labels (count,) from patterns (C, V, 3, W, W)."""
    device = patterns.device
    images = torch.empty(count, 32, 32, 3, dtype=torch.uint8, device=device)
    labels = torch.randperm(count, generator=generator, device=device) % len(patterns)
    for start in range(0, count, _CHUNK):
        part = slice(start, start + _CHUNK)
        images[part] = _draw(patterns, labels[part], easy, hard, generator)
    return images, labels


def _draw(
    patterns: Tensor, labels: Tensor, easy: float, hard: float, generator: torch.Generator
) -> Tensor:
    """One image (B, 32, 32, 3) uint8 for each of the labels (B,)."""
    b, device = len(labels), labels.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def pick(low: int, high: int) -> Tensor:
        return torch.randint(low, high, (b,), generator=generator, device=device)

    place = uniform(b, 1, 1, 1)
    level = 1 - (place < easy).long() + (place >= 1 - hard).long()  # 0 easy, 1 between, 2 hard
    clutter, noise = (torch.tensor(values, device=device)[level] for values in (_CLUTTER, _NOISE))
    own = patterns[labels, pick(0, _VARIANTS)]  # (B, 3, W, W)
    other = patterns[(labels + pick(1, len(patterns))) % len(patterns), pick(0, _VARIANTS)]
    share = (0.3 + 0.3 * uniform(b, 1, 1, 1)) * (level == 2)
    contrast = 0.6 + 0.8 * uniform(b, 1, 1, 1)
    smooth = contrast * torch.lerp(own, other, share) + clutter * normal(b, 3, _WAVES, _WAVES)
    pixel = torch.arange(32, device=device) + 0.5
    waves = torch.arange(_WAVES, device=device) * (torch.pi / 32)
    shift = 8 * uniform(2, b, 1, 1) - 4  # in pixels, either way
    rows, columns = torch.cos((pixel[:, None] + shift) * waves)  # (B, 32, W) each
    image = torch.einsum("bcij,byi,bxj->byxc", smooth, rows, columns) / _WAVES
    image += noise * normal(b, 32, 32, 3)
    return (image * 64 + 128).clamp_(0, 255).to(torch.uint8)
