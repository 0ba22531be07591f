"""A run's folder: who trains in it, where its results come from, and its checkpoints."""

import fcntl
import hashlib
import os
import platform
import subprocess
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import infobatch_fast
from infobatch_fast.errors import UserError
from infobatch_fast.telemetry import nvml
from infobatch_fast.train.records import (
    BAD,
    CHECKPOINT,
    CONFIG,
    EPOCHS,
    atomically,
    doing,
    make_folder,
)

CHECKPOINT_VERSION = 1


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a run's folder, until this one ends at the latest."""
    with doing(f"open the run's folder {folder}"):
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    ours = [number]
    # Loaders' processes, which outlive a kill of this one by seconds, do not hold it.
    os.register_at_fork(after_in_child=lambda: ours and os.close(ours.pop()))
    try:
        with suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process is training in {folder}") from None
        yield
    finally:
        os.close(ours.pop())


def check_empty(folder: Path) -> None:
    """Raise UserError if a run's folder holds something."""
    with doing(f"read the folder {folder}"):  # a killed write may have left its temporary file
        content = [entry.name for entry in folder.iterdir() if not entry.name.endswith(".tmp")]
    if content:
        hint = f" (continue that run with --resume {folder})" if CONFIG in content else ""
        raise UserError(
            f"out must be a new or empty folder, got {folder} with {content[0]} in it{hint}"
        )


@contextmanager
def begun(folder: Path) -> Iterator[None]:
    """Keep a new run's folder; where the block fails and has recorded nothing, take it back."""
    made = make_folder(folder)
    with locked(folder):
        check_empty(folder)
        try:
            yield
        except Exception:  # the mended command may name the same folder
            if not any((folder / name).exists() for name in (EPOCHS, CHECKPOINT)):
                with suppress(OSError):
                    for name in (CONFIG, BAD, "events.out.tfevents.*"):
                        for path in folder.glob(name):
                            path.unlink()
                    if made:
                        folder.rmdir()
            raise


def provenance(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """Versions, commit, source hash and devices of a run; no paths."""
    packages = ("torch", "torchvision", "nvidia-dali-cuda130", "numpy", "triton")
    return {
        "version": infobatch_fast.__version__,
        "commit": commit(),
        "source_hash": source_hash(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in packages},
        "device": describe(device, processes),
    }


def describe(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """What the run's device is, or each process's, for the record and the header."""
    of = {"processes": processes} if processes > 1 else {}
    if device.type != "cuda":
        threads = torch.get_num_threads()
        return {"type": device.type, "name": _processor(), "threads": threads, **of}
    properties = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **nvml.card(device),
        **of,
    }


def source_hash() -> str:
    """SHA-256 by name and content of the Python files that a run depends on, kernels included."""
    root = Path(infobatch_fast.__file__).parent
    digest = hashlib.sha256()
    for path in sorted({*root.glob("*.py"), *root.glob("*/*.py")} - {*root.glob("report/*")}):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def commit() -> str | None:
    """The checkout's commit, with "-dirty" where its sources differ.

    Where a checkout travelled as files, INFOBATCH_COMMIT has it; None where nothing does.
    """
    root = Path(infobatch_fast.__file__).parent.parent
    # The package may lie inside a repository that is not its own.
    if (root / ".git").exists() and (root / "pyproject.toml").exists():
        with suppress(OSError, subprocess.SubprocessError):
            head = _git(root, "rev-parse", "HEAD")
            changed = _git(root, "status", "--porcelain", "--", "infobatch_fast", "kernels")
            return head + ("-dirty" if changed else "")
    return os.environ.get("INFOBATCH_COMMIT") or None


def _git(root: Path, *words: str) -> str:
    command = ["git", "-C", str(root), *words]
    run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return run.stdout.strip()


def _version(package: str) -> str | None:
    with suppress(PackageNotFoundError):
        return version(package)


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def save(path: Path, state: dict[str, Any]) -> None:
    """Save a dictionary of tensors and plain values, atomically and without a copy of it all."""
    with atomically(path) as file:
        torch.save(state, file)


def load(path: Path) -> dict[str, Any]:
    """A run's checkpoint, on the CPU."""
    state = load_tensors(path)
    if (found := state.get("version")) != CHECKPOINT_VERSION:
        raise UserError(f"checkpoint {path} must be of version {CHECKPOINT_VERSION}, got {found}")
    return state


def load_tensors(path: Path) -> dict[str, Any]:
    """What `save` or torch.save wrote, onto the CPU; executes nothing of it.

    A file that is damaged by as much as a bit, or holds something else, is a UserError.
    """
    if not path.is_file():  # a pipe would be waited for, a device never end
        raise UserError(f"checkpoint {path} must be a regular file, got none")
    try:
        with warnings.catch_warnings(action="ignore"):  # of files torch.save did not write
            if zipfile.is_zipfile(path):  # torch itself does not look at the sums
                with zipfile.ZipFile(path) as archive:
                    if damaged := archive.testzip():
                        raise zipfile.BadZipFile(damaged)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # nearly every kind is raised for a damaged or hostile file
        raise UserError(
            f"checkpoint {path} cannot be loaded ({type(error).__name__}): "
            "it is cut short, damaged, or no checkpoint"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"checkpoint {path} must hold a dictionary, got {type(state).__name__}")
    return state
