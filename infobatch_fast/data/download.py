"""The published CIFAR archive from its site into a folder: whole, or nothing at all."""

import contextlib
import io
import os
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

START_LIMIT_S = 15.0
"""Seconds without a first byte after which a download is given up; also the socket timeout."""


def download_archive(name: str, folder: Path) -> None:
    """Put the Python archive into `folder`; on failure leave everything as it was.

    Args:
        name: `cifar10` or `cifar100`.
        folder: Made where it is not there.

    Raises:
        Exception: of any type: no network, no space, a checksum that differs.
    """
    # Imported here: nothing but a download needs it.
    from torchvision.datasets import CIFAR10, CIFAR100, utils

    published = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    url, archive, md5 = published.url, published.filename, published.tgz_md5
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    scratch = None
    timeout = socket.getdefaulttimeout()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".download-", dir=folder))
        file = scratch / archive
        socket.setdefaulttimeout(START_LIMIT_S)
        with _quiet():
            _watch(partial(utils.download_url, url, str(scratch), archive, md5), file, url)
        if not utils.check_integrity(str(file), md5):
            raise OSError(f"the MD5 of {url} must be {md5}, got another")
        with open(file, "rb") as written:
            os.fsync(written.fileno())
        os.replace(file, folder / archive)
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
    if sys.stdout is not None and sys.stdout.isatty():
        yield
        return
    hidden = io.StringIO()
    with contextlib.redirect_stdout(hidden), contextlib.redirect_stderr(hidden):
        yield


def _watch(fetch: Callable[[], None], file: Path, url: str) -> None:
    """Run `fetch`, which writes `file`; give up where no byte is there after `START_LIMIT_S`.

    A thread, since name resolution knows no timeout. One given up is left behind: its folder is
    gone, so it can no longer open its file.
    """
    errors: list[BaseException] = []

    def work() -> None:
        try:
            fetch()
        except BaseException as error:
            errors.append(error)

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
    if errors:
        raise errors[0]
