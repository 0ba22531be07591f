"""The download from a local server: whole and quiet, or given up with nothing left behind."""

import hashlib
import http.server
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cifar_files_made import archive_bytes, check, fails, shrink

from infobatch_fast.data import download
from infobatch_fast.data.cifar import DataMissing, load_cifar


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


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

    monkeypatch.setattr(download, "START_LIMIT_S", 0.3)
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
    monkeypatch.setattr(download, "START_LIMIT_S", 0.5)
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
