"""CIFAR from every form and the download: sound data, or one line that says what is wrong.

Small files stand in for the published ones, and their MD5 for the published MD5.
"""

import hashlib
import http.server
import io
import os
import pickle
import socket
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import datasets

from infobatch_fast.data import cifar
from infobatch_fast.data.cifar import KINDS, DataMissing, default_data_dir, load_cifar
from infobatch_fast.data.dataset import Dataset
from infobatch_fast.errors import UserError

RECORDS = 3  # of each file
REAL = dict(KINDS)
PUBLISHED = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
NAMES = {name: [f"class{i}" for i in range(kind.num_classes)] for name, kind in REAL.items()}
each = pytest.mark.parametrize("name", ["cifar10", "cifar100"])
both = pytest.mark.parametrize("form", ["binary", "pickled"])


def contents(name: str) -> list[tuple[np.ndarray, list[int]]]:
    """For each file its pixels (R, 3072) and labels."""
    rng, kind = np.random.default_rng(7), REAL[name]
    labels = [rng.integers(0, kind.num_classes, RECORDS) for _ in kind.records]
    return [(rng.integers(0, 256, (RECORDS, 3072), np.uint8), some.tolist()) for some in labels]


def files_of(name: str, form: str) -> dict[str, bytes]:
    kind, files = REAL[name], {}
    shape = REAL[name].binary if form == "binary" else REAL[name].pickled
    for file, (pixels, labels) in zip(shape.files, contents(name), strict=True):
        if form == "binary":
            before = np.full((RECORDS, kind.label_bytes), 19, np.uint8)
            before[:, -1] = labels
            files[file] = np.concatenate([before, pixels], axis=1).tobytes()
        else:
            key = "labels" if name == "cifar10" else "fine_labels"
            files[file] = pickle.dumps({"data": pixels, key: labels}, 2)
    if form == "binary":
        return files | {kind.names: "\n".join(NAMES[name]).encode()}
    meta = PUBLISHED[name].meta
    return files | {meta["filename"]: pickle.dumps({meta["key"]: NAMES[name]}, 2)}


def put_folder(root: Path, name: str, form: str) -> Path:
    folder = root / getattr(REAL[name], form).folder
    folder.mkdir(parents=True)
    for file, raw in files_of(name, form).items():
        (folder / file).write_bytes(raw)
    return folder


def packed(name: str, form: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for file, raw in files_of(name, form).items():
            info = tarfile.TarInfo(f"{getattr(REAL[name], form).folder}/{file}")
            info.size = len(raw)
            tar.addfile(info, io.BytesIO(raw))
    return buffer.getvalue()


def put_archive(root: Path, name: str, form: str) -> Path:
    path = root / getattr(REAL[name], form).archive
    path.write_bytes(packed(name, form))
    return path


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kind in REAL.items():
        monkeypatch.setitem(KINDS, name, replace(kind, records=(RECORDS,) * len(kind.records)))
        published, files = PUBLISHED[name], files_of(name, "pickled")
        md5 = {file: hashlib.md5(raw).hexdigest() for file, raw in files.items()}
        for which in ("train_list", "test_list"):
            few = [[file, md5[file]] for file, _ in getattr(published, which)]
            monkeypatch.setattr(published, which, few)
        meta = published.meta | {"md5": md5[published.meta["filename"]]}
        monkeypatch.setattr(published, "meta", meta)


def check(got: Dataset, name: str, source: str) -> None:
    """Every pixel and label, and what is fixed about the data set."""
    for images, labels, some in (
        (got.images, got.labels, contents(name)[:-1]),
        (got.test_images, got.test_labels, contents(name)[-1:]),
    ):
        flat = np.concatenate([pixels for pixels, _ in some])
        # Not by the module's transpose: pixel (y, x) of colour c is byte 1024 c + 32 y + x.
        y, x, c = np.ogrid[:32, :32, :3]
        assert np.array_equal(images.numpy(), flat[:, 1024 * c + 32 * y + x])
        assert labels.tolist() == [label for _, of_file in some for label in of_file]
        assert images.is_contiguous()
        assert labels.dtype == torch.int64
    kind = REAL[name]
    assert (got.num_classes, got.mean, got.std) == (kind.num_classes, kind.mean, kind.std)
    assert (got.name, got.source, got.classes) == (name, source, tuple(NAMES[name]))


@each
@both
def test_folders_and_archives(tmp_path: Path, name: str, form: str) -> None:
    source = "published" if form == "pickled" else "files"
    folder = put_folder(tmp_path / "a", name, form)
    (tmp_path / "link").symlink_to(folder)  # another name, the same files
    (tmp_path / "b").mkdir()
    put_archive(tmp_path / "b", name, form)
    for place in (tmp_path / "a", str(folder), tmp_path / "link", tmp_path / "b"):
        check(load_cifar(name, place, download=False), name, source)
    assert len(list((tmp_path / "b").iterdir())) == 1  # nothing unpacked


@pytest.mark.parametrize(
    ("change", "source"),
    [
        (lambda records: records[::-1], "files"),  # a test image among those to train on
        (lambda records: np.r_[records[14::-1], records[:14:-1]], "published"),  # another order
        (lambda records: records ^ (np.arange(3073) == 3072), "files"),  # a bit of each last pixel
    ],
)
def test_published_are_the_same_records_in_any_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change, source: str
) -> None:
    folder, kind = put_folder(tmp_path, "cifar10", "binary"), KINDS["cifar10"]
    paths = [folder / file for file in kind.binary.files]
    records = np.concatenate([np.fromfile(path, np.uint8) for path in paths]).reshape(18, -1)
    digest = cifar._digest(records[:15], records[15:])
    monkeypatch.setitem(KINDS, "cifar10", replace(kind, digest=digest))
    check(load_cifar("cifar10", tmp_path), "cifar10", "published")
    for path, some in zip(paths, change(records).reshape(6, -1), strict=True):
        path.write_bytes(some.tobytes())
    assert load_cifar("cifar10", tmp_path).source == source


@pytest.mark.skipif(not os.environ.get("INFOBATCH_DATA"), reason="INFOBATCH_DATA is not set")
def test_the_real_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    got = load_cifar("cifar10", default_data_dir(), download=False)
    assert got.source == "published"
    assert got.classes is not None
    assert got.classes[::3] == ("airplane", "cat", "frog", "truck")
    assert got.labels.bincount().tolist() == [5000] * 10
    assert got.test_labels.bincount().tolist() == [1000] * 10
    mean = got.images.sum((0, 1, 2), dtype=torch.int64) / (50_000 * 1024 * 255)
    torch.testing.assert_close(mean, torch.tensor(got.mean), rtol=0, atol=1e-4)


def test_what_is_broken_is_an_error_and_nothing_stands_in(tmp_path: Path) -> None:
    """In the order in which forms are looked for: each broken, with all that come later sound."""
    put_archive(tmp_path, "cifar10", "pickled")
    check(load_cifar("cifar10", tmp_path), "cifar10", "published")
    archive = put_archive(tmp_path, "cifar10", "binary")
    check(load_cifar("cifar10", tmp_path), "cifar10", "files")
    for broken in (b"broken", b"", archive.read_bytes()[:9000]):
        archive.write_bytes(broken)
        with pytest.raises(UserError, match=rf"^{archive}(:| must be a sound .tar.gz)"):
            load_cifar("cifar10", tmp_path)
    pickled = put_folder(tmp_path, "cifar10", "pickled")
    check(load_cifar("cifar10", tmp_path), "cifar10", "published")
    (pickled / "test_batch").unlink()
    with pytest.raises(UserError, match=rf"^{pickled}/test_batch must be there"):
        load_cifar("cifar10", tmp_path)
    binary = put_folder(tmp_path, "cifar10", "binary")
    check(load_cifar("cifar10", tmp_path), "cifar10", "files")
    (binary / "test_batch.bin").unlink()
    for place in (tmp_path, binary):
        with pytest.raises(UserError, match=rf"^{binary}/test_batch.bin must be readable"):
            load_cifar("cifar10", place)


@each
@pytest.mark.parametrize(
    ("form", "damage", "rule"),
    [
        ("binary", lambda raw: raw[:-1], r"must hold 3 records of 307. bytes = .* got .*"),
        ("binary", lambda raw: b"", "must hold 3 .* got 0"),
        ("binary", lambda raw: b"\xc8" * len(raw), r"labels must be in \[0, 10*\), got 200"),
        ("pickled", lambda raw: bytes([raw[0] ^ 1]) + raw[1:], "must be there with .* MD5"),
        ("pickled", lambda raw: pickle.dumps(os.getpid), "must be there with .* MD5"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, form: str, damage, rule: str) -> None:
    folder = put_folder(tmp_path, name, form)
    file = folder / getattr(REAL[name], form).files[-1]
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match=f"^{file}:? {rule}") as caught:
        load_cifar(name, tmp_path)
    assert "\n" not in str(caught.value)


def test_no_data_and_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(DataMissing, match=rf"^data_dir {tmp_path}/x .* downloading is off"):
        load_cifar("cifar100", tmp_path / "x", download=False)
    with pytest.raises(UserError, match=r"^dataset must .*, got cifar11 "):
        load_cifar("cifar11", tmp_path)
    assert not list(tmp_path.iterdir())


def test_default_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value, expected in (
        ("HOME", "/home/me", "/home/me/.cache/infobatch_fast"),
        ("XDG_CACHE_HOME", "/cache", "/cache/infobatch_fast"),
        ("INFOBATCH_DATA", "/some/where", "/some/where"),
    ):
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        monkeypatch.setenv("INFOBATCH_DATA", "")
        monkeypatch.setenv(name, value)
        assert default_data_dir() == Path(expected)


# The download, from a local server


class Server(http.server.ThreadingHTTPServer):
    """Serves one file, the first `sent` bytes of it; then it hangs, if that was not all."""

    raw, sent = b"", 10**9

    def __init__(self) -> None:
        self.over = threading.Event()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/cifar.tar.gz"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.raw)))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.server.raw[: self.server.sent])
        self.wfile.flush()
        if self.server.sent < len(self.server.raw):
            self.server.over.wait(10)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    server = Server()
    server.raw = packed("cifar10", "pickled")
    monkeypatch.setattr(datasets.CIFAR10, "url", server.url)
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(server.raw).hexdigest())
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.over.set()
    server.shutdown()
    server.server_close()


def test_download(tmp_path: Path, server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "folder"
    check(load_cifar("cifar10", folder), "cifar10", "published")
    assert [path.name for path in folder.iterdir()] == ["cifar-10-batches-py"]
    assert capfd.readouterr() == ("", "")
    server.sent = 0
    check(load_cifar("cifar10", folder), "cifar10", "published")  # from the disk


@pytest.mark.parametrize(
    ("sent", "flip", "why"), [(0, 0, "timed out"), (9_000, 0, "timed out"), (10**9, 1, "corrupted")]
)
def test_a_download_that_fails_leaves_nothing(
    tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, sent: int, flip: int, why: str
) -> None:
    monkeypatch.setattr(cifar, "TIMEOUT", 0.3)
    server.sent, server.raw = sent, server.raw[:-1] + bytes([server.raw[-1] ^ flip])
    timeout = socket.getdefaulttimeout()
    with pytest.raises(DataMissing, match=rf"the download failed \(.*{why}") as caught:
        load_cifar("cifar10", tmp_path / "new")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert socket.getdefaulttimeout() == timeout
