"""A run's folder: config.json, epochs.jsonl, summary.json, and where its results come from."""

import fcntl
import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import infobatch_fast
from infobatch_fast.errors import UserError
from infobatch_fast.telemetry import nvml
from infobatch_fast.train.records import write_atomically

CONFIG = "config.json"
EPOCHS = "epochs.jsonl"
SUMMARY = "summary.json"
CHECKPOINT = "checkpoint.pt"
WEIGHTS = "model.pt"
RESULTS = "results.jsonl"  # beside the folders of many runs: a line a run


def make_folder(folder: Path) -> bool:
    """Make a run's folder if it is not there; returns whether it was made.

    Raises:
        UserError: it cannot be made.
    """
    try:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {_reason(error)}") from None
    return made


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a run's folder, by the system's lock on the folder.

    It leaves nothing behind, and ends with the process, however that ends.

    Raises:
        UserError: another process has it, or the folder cannot be opened.
    """
    try:
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"cannot open the run's folder {folder}: {_reason(error)}") from None
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is training in {folder}") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(number)


def check_empty(folder: Path) -> None:
    """Raise UserError if a run's folder holds something.

    What an atomic write left behind when it was killed is nothing.
    """
    try:
        content = [entry.name for entry in folder.iterdir() if not entry.name.endswith(".tmp")]
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {_reason(error)}") from None
    if content:
        hint = f" (continue that run with --resume {folder})" if CONFIG in content else ""
        raise UserError(
            f"out must be a new or empty folder, got {folder} with {content[0]} in it{hint}"
        )


def discard(folder: Path, made: bool) -> None:
    """Take back a run that came to nothing: its records, and the folder itself if it was `made`."""
    for name in (CONFIG, EPOCHS, f".{CONFIG}.tmp", f".{EPOCHS}.tmp"):
        with suppress(OSError):
            (folder / name).unlink()
    if made:
        with suppress(OSError):
            folder.rmdir()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write one JSON object, atomically.

    Raises:
        UserError: the disk is full or read-only.
    """
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object.

    Raises:
        UserError: it is missing or no JSON object.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise UserError(f"{path} must be a regular file, got something else")
        value = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {_reason(error)}") from None
    except ValueError as error:
        raise UserError(f"{path} is no JSON object: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is no JSON object: it holds a {type(value).__name__}")
    return value


def write_epochs(path: Path, epochs: list[dict[str, Any]]) -> None:
    """Write epochs.jsonl anew: an epoch a line, so that no kill can leave half a line.

    Raises:
        UserError: the disk is full or read-only.
    """
    write_atomically(path, "".join(json.dumps(epoch) + "\n" for epoch in epochs).encode())


def provenance(device: torch.device) -> dict[str, Any]:
    """Versions, commit, source hash and device of a run; no paths."""
    packages = ("torch", "torchvision", "nvidia-dali-cuda130", "numpy", "triton")
    return {
        "version": infobatch_fast.__version__,
        "commit": commit(),
        "source_hash": source_hash(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "device": describe(device),
    }


def describe(device: torch.device) -> dict[str, Any]:
    """What the run's device is, for the record and the header."""
    if device.type != "cuda":
        return {
            "type": device.type,
            "name": _processor(),
            "threads": torch.get_num_threads(),
        }
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **nvml.card(device),
    }


def source_hash() -> str:
    """SHA-256 over the package's Python files, kernels included, by name and content."""
    root = Path(infobatch_fast.__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*root.glob("*.py"), *root.glob("*/*.py")]):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def commit() -> str | None:
    """The checkout's commit, with "-dirty" where its sources differ; None outside a checkout."""
    root = Path(infobatch_fast.__file__).parent.parent
    # The package may lie inside a repository that is not its own.
    if (root / ".git").exists() and (root / "pyproject.toml").exists():
        try:
            head = _git(root, "rev-parse", "HEAD")
            changed = _git(root, "status", "--porcelain", "--", "infobatch_fast", "kernels")
        except (OSError, subprocess.SubprocessError):
            pass
        else:
            return head + ("-dirty" if changed else "")
    try:
        # A checkout that travelled as files alone carries its commit beside them.
        return (root / ".gpu" / "commit").read_text().strip()
    except OSError:
        return None


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    # Inside a git hook these name another repository.
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True, env=own)
    return run.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
